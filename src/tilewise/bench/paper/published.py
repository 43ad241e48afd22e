"""What the papers print, from the CSV files beside this one; each file says where it comes from."""
from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from tilewise.bench import suite
from tilewise.bench.contest import Outcome
from tilewise.bench.record import Row

A100_40GB, A100 = "A100-40GB", "A100"       # of FlashAttention; of Flash-Decoding, which does not say which
Published = dict[str, dict[str, Any]]       # "who, where" -> a value in SI units, and the hardware


@dataclass(frozen=True)
class Trial(suite.Trial):
    """One whose rows say, by mode, what a paper printed."""
    published: Mapping[str, Published] = field(default_factory=dict)

    def rows(self, found: dict[str, Outcome], promised: bool = True) -> list[Row]:
        rows = super().rows(found, promised)
        return [row | Row(published=self.published[mode]) for row, mode in zip(rows, self.modes, strict=True)]


@cache
def cells(name: str) -> tuple[dict[str, str], ...]:
    """The lines of a file, such as "flash_attention", by its columns' names."""
    text = resources.files(__package__).joinpath(f"data/{name}.csv").read_text()
    return tuple(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def flash_attention(table: int, seqlen: int) -> Published:
    """Of one column of FlashAttention's tables 9 to 20 seconds, of table 21 bytes."""
    return {f"{cell['method']}, {A100_40GB}": _cell(A100_40GB, float(cell["value"]), *UNITS[cell["unit"]])
            for cell in cells("flash_attention") if (cell["table"], cell["seqlen"]) == (f"T{table}", str(seqlen))}


def flash_attention_2(mode: str, head_dim: int, causal: bool, seqlen: int) -> Published:
    """TFLOP/s; mode: "forward", "backward" or "forward+backward"."""
    wanted = mode, str(head_dim), "causal" if causal else "full", str(seqlen)
    return {f"{cell['method']}, {cell['hardware'].split('-')[0]}": _cell(cell["hardware"], float(cell["tflops"]), "tflops", 1)
            for cell in cells("flash_attention_2")
            if (cell["mode"], cell["head_dim"], cell["mask"], cell["seqlen"]) == wanted}


def flash_decoding(batch: int, seqlen: int) -> Published:
    """Seconds."""
    return {f"{cell['method']}, {A100}": _cell(A100, float(cell["microseconds"]), "seconds", 1e-6)
            for cell in cells("flash_decoding") if (cell["batch"], cell["seqlen"]) == (str(batch), str(seqlen))}


UNITS = {"ms": ("seconds", 1e-3), "MB": ("bytes", 2**20)}


def _cell(hardware: str, value: float, quantity: str, unit: float) -> dict[str, Any]:
    return {quantity: value * unit, "hardware": hardware}
