"""Rows and files of results: the form that all measurements share (`bench/record.py`), with counts as exact integers."""
from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tilewise.bench import record

PUBLISHED = Path(__file__).with_name("published.tsv")


def row(part: str, case: str, setting: Mapping[str, Any], contenders: Mapping[str, Mapping[str, Any]],
        **more: Any) -> dict[str, Any]:
    """A case of a result. contenders: by name what is known of each, such as count (bytes of traffic) or seconds."""
    entries = {name: {"state": "timed", "reason": ""} | dict(known) for name, known in contenders.items()}
    return {"part": part, "case": case, "setting": dict(setting), "contenders": entries, "times_faster": {}} | more


def result(rows: Sequence[Mapping[str, Any]], lines: Sequence[str], quick: bool = False, device: str = "cpu") -> dict[str, Any]:
    return record.stamp() | {"benchmark": "traffic", "device": device, "quick": quick, "complete": True, "rows": list(rows),
                             "lines": list(lines)}


class Printed(NamedTuple):
    """A published number. x: the sequence length, or 0."""
    version: str
    method: str
    x: int
    value: float
    unit: str
    hardware: str
    source: str


@functools.cache
def published(figure: str) -> tuple[Printed, ...]:
    """The published numbers of a figure or table (`published.tsv`)."""
    with PUBLISHED.open(newline="") as file:
        rows = [r for r in csv.DictReader(file, delimiter="\t") if r["figure"] == figure]
    return tuple(Printed(r["version"], r["method"], int(r["x"] or 0), float(r["value"]), r["unit"], r["hardware"], r["source"])
                 for r in rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right; the first row is its head."""
    first, *others = (max(len(r[i]) for r in rows) for i in range(len(rows[0])))
    return ["  ".join([r[0].ljust(first), *(cell.rjust(w) for cell, w in zip(r[1:], others, strict=True))]).rstrip()
            for r in rows]


def giga(n: float) -> str:
    return f"{n / 1e9:,.2f}" if n < 1e11 else f"{n / 1e9:,.0f}"
