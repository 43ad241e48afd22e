"""FlashAttention's tables 9 to 21 (Dao et al. 2022, appendix E.6): runtime and memory from N 128 to 64k, fusion by fusion.

Batch 16, 8 heads of dimension 64, fp16; dropout 0.1 and key padding (lengths uniform in [N - 20, N]), each with and without.
Tables 9 to 11, 12 to 14, 15 to 17 and 18 to 20 are forward, backward and both of one setting; table 21 is memory, which with
table 11 is the paper's figure 3. "tilewise block-sparse" is a fixed butterfly within the paper's budget, min(1/8, 256/N).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from tilewise.bench.paper import memory, passes, published, tables
from tilewise.bench.paper.inputs import Cut, Setting
from tilewise.bench.paper.methods import of_flash_attention
from tilewise.bench.paper.race import Row

TITLE = "FlashAttention, tables 9-21"
LENGTHS = tuple(2**i for i in range(7, 17))
FUSIONS = {9: (0.1, True), 12: (0.0, True), 15: (0.1, False), 18: (0.0, False)}     # first table: dropout, padding mask
MEMORY = 21
PAPER = Cut(16, 8, 65536)
CPU, CPU_QUICK, CUDA_QUICK = Cut(1, 2, 4096, "float32"), Cut(1, 2, 256, "float32", 0.1), Cut(16, 8, 1024, seconds=0.5)


@dataclass(frozen=True)
class Measurement:
    """One column of some tables: forward, backward and both, or memory."""
    tables: tuple[int, ...]
    setting: Setting

    def modes(self) -> dict[int, str]:
        return {MEMORY: "memory"} if self.tables == (MEMORY,) else dict(zip(self.tables, passes.WORK, strict=True))

    def cases(self) -> list[str]:
        return [f"table {table} N {self.setting.seqlen}" for table in self.tables]

    def __str__(self) -> str:
        return f"tables {self.tables[0]}-{self.tables[-1]} N {self.setting.seqlen}"


def cut_for(device: torch.device, quick: bool) -> Cut:
    if device.type == "cuda":
        return CUDA_QUICK if quick else PAPER
    return CPU_QUICK if quick else CPU


def measurements(device: torch.device, quick: bool = False) -> list[Measurement]:
    """All columns of all tables that a device does."""
    cut = cut_for(device, quick)
    lengths = [n for n in LENGTHS if n <= cut.longest]
    found = [Measurement((first, first + 1, first + 2), made(cut, n, *FUSIONS[first])) for first in FUSIONS for n in lengths]
    return found + [Measurement((MEMORY,), made(cut, n)) for n in lengths]


def made(cut: Cut, seqlen: int, dropout: float = 0.0, padding: bool = False) -> Setting:
    return Setting(cut.batch, seqlen, cut.heads, 64, cut.dtype, dropout=dropout, padding=padding, seconds=cut.seconds)


def measure(measurement: Measurement, device: torch.device) -> list[Row]:
    """A row for each of its tables."""
    setting, modes = measurement.setting, measurement.modes()
    if measurement.tables == (MEMORY,):
        found = {"memory": memory.measure(setting, device)}
    else:
        found = passes.measure(setting, of_flash_attention(setting, device), device)
    return [{"case": case, "setting": asdict(setting) | {"table": table, "mode": mode}, **found[mode],
             "published": published.flash_attention(table, setting.seqlen)}
            for case, (table, mode) in zip(measurement.cases(), modes.items(), strict=True)]


def lines(rows: Sequence[Row], device: torch.device, quick: bool) -> list[str]:
    """The tables as the paper prints them, published methods below ours."""
    found, words = [TITLE], cut_for(device, quick).words(PAPER)
    for table, of_table in tables.grouped(rows, lambda row: row["setting"]["table"]).items():
        setting = of_table[0]["setting"]
        fusion = [*["dropout 0.1"] * (setting["dropout"] > 0), *["padding mask"] * setting["padding"]]
        quantity, unit, name = ("bytes", 2**-20, "MB") if table == MEMORY else ("seconds", 1000, "ms")
        title = f"table {table}: {', '.join([setting['mode'], *fusion])}; {name}"
        found += tables.grid(title, [(str(row["setting"]["seqlen"]), row) for row in of_table], quantity, unit)
    return found + tables.remarks(rows) + ([f"cut: {words}"] if words else [])
