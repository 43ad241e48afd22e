"""FlashAttention's tables 9 to 21 (Dao et al. 2022, appendix E.6): runtime and memory from N 128 to 64k, fusion by fusion.

Batch 16, 8 heads of dimension 64, fp16; dropout 0.1 and key padding (lengths uniform in [N - 20, N]), each with and without.
Tables 9 to 11, 12 to 14, 15 to 17 and 18 to 20 are forward, backward and both of one setting; table 21 is memory, which with
table 11 is the paper's figure 3. "tilewise block-sparse" is a fixed butterfly within the paper's budget, min(1/8, 256/N).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from tilewise.bench.contest import PASSES
from tilewise.bench.paper import memory, passes, published, tables
from tilewise.bench.paper.cut import Cut, Cuts
from tilewise.bench.paper.inputs import Setting
from tilewise.bench.paper.methods import butterfly
from tilewise.bench.record import Row
from tilewise.bench.suite import Trial, Wanted

TITLE = "FlashAttention, tables 9-21"
LENGTHS = tuple(2**i for i in range(7, 17))
FUSIONS = {9: (0.1, True), 12: (0.0, True), 15: (0.1, False), 18: (0.0, False)}     # first table: dropout, padding mask
MEMORY = 21


@dataclass(frozen=True)
class Sizes(Cut):
    batch: int = 16
    heads: int = 8
    longest: int = 65536


CUTS = Cuts(Sizes(), Sizes(seconds=0.5, longest=1024), Sizes("float32", batch=1, heads=2, longest=4096),
            Sizes("float32", 0.1, batch=1, heads=2, longest=256))


def trials(wanted: Wanted) -> list[Trial]:
    """All columns of all tables that a device does."""
    cut = CUTS.of(wanted.device, wanted.quick)
    assert isinstance(cut, Sizes)
    lengths = [n for n in LENGTHS if n <= cut.longest]
    return [trial(first, made(cut, n, dropout, padding), wanted, cut.seconds)
            for first, (dropout, padding) in (FUSIONS | {MEMORY: (0.0, False)}).items() for n in lengths]


def made(cut: Sizes, seqlen: int, dropout: float, padding: bool) -> Setting:
    return Setting(cut.batch, seqlen, cut.heads, 64, cut.dtype, dropout, padding)


def trial(table: int, setting: Setting, wanted: Wanted, seconds: float) -> Trial:
    """One column of a table and the next two, or of the table of memory."""
    modes = (memory.MEMORY,) if table == MEMORY else PASSES
    measure = partial(memory.measure, setting, wanted) if table == MEMORY else partial(passes.measure, setting, wanted, seconds)
    of = {mode: published.flash_attention(table + i, setting.seqlen) for i, mode in enumerate(modes)}
    facts = asdict(setting) | {"table": table, "density": butterfly(setting.seqlen).float().mean().item()}
    name = f"table {table}" if table == MEMORY else f"tables {table}-{table + 2}"
    return published.Trial(TITLE, f"{name} N {setting.seqlen}", facts, modes, measure, published=of)


def fusion(row: Row) -> str:
    setting = row["setting"]
    return ", ".join([setting["mode"], *["dropout 0.1"] * (setting["dropout"] > 0), *["padding mask"] * setting["padding"]])


def table_of(row: Row) -> int:
    """Its number in the paper."""
    first, mode = row["setting"]["table"], row["setting"]["mode"]
    return first if first == MEMORY else first + PASSES.index(mode)


def lines(rows: Sequence[Row], wanted: Wanted) -> list[str]:
    """The tables as the paper prints them, published methods below ours."""
    found = [TITLE, *CUTS.lines(wanted.device, wanted.quick)]
    for table, of_table in tables.grouped(rows, table_of).items():
        quantity, unit, name = ("bytes", 2**-20, "MB") if table == MEMORY else ("seconds", 1000, "ms")
        found += tables.grid(f"table {table}: {fusion(of_table[0])}; {name}",
                             [(str(row["setting"]["seqlen"]), row) for row in of_table], quantity, unit)
    return found + tables.remarks(rows)
