"""What one run of the demo found, and the few numbers that say it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

from tilewise.demo.measure import Row
from tilewise.demo.settings import Settings
from tilewise.train import Point

STANDARD, TILEWISE = "reference", "auto"


@dataclass(frozen=True)
class Results:
    """Everything the page shows. `standard` and `tilewise` are the same training with one or the other attention."""

    settings: Settings
    machine: dict[str, str]
    text: str
    parameters: int
    standard: list[Point]
    tilewise: list[Point]
    prompt: str
    sample: str
    rows: list[Row]
    plan: str
    seconds: float

    def loss_difference(self) -> float:
        """Largest distance between the two loss curves, nats per byte."""
        return max(abs(a.loss - b.loss) for a, b in zip(self.standard, self.tilewise, strict=True))

    def measured(self, backend: str) -> dict[int, Row]:
        """The rows of one attention that were not refused, by length."""
        return {row.length: row for row in self.rows if row.backend == backend and not row.refused}

    def refused(self, backend: str) -> int | None:
        """The length at which memory ran out, if it did."""
        return next((row.length for row in self.rows if row.backend == backend and row.refused), None)

    def headline(self) -> Headline:
        """The ratios, taken at the longest context that standard attention could do."""
        standard, tilewise = self.measured(STANDARD), self.measured(TILEWISE)
        length = max(standard.keys() & tilewise.keys())
        a, b = standard[length], tilewise[length]
        return Headline(length, max(tilewise), a.seconds / b.seconds, a.bytes / max(1, b.bytes), self.loss_difference())

    def to_json(self) -> str:
        """All of it, for other programs."""
        data = asdict(self) | {"headline": self.headline()._asdict()}
        for name in ("standard", "tilewise"):
            data[name] = [point._asdict() for point in getattr(self, name)]
        return json.dumps(data, indent=1)


class Headline(NamedTuple):
    """At `length`, Tilewise is `speedup` times as fast in 1/`memory` of the memory; it went on to `longest`."""

    length: int
    longest: int
    speedup: float
    memory: float
    loss_difference: float
