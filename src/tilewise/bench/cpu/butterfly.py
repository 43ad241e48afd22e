"""Sparse blocks: what they cost over their share of full attention, in turns with it."""
from __future__ import annotations

from dataclasses import dataclass

import tilewise as tw
from tilewise.bench.cpu.figures import COST, Ratio, ratios
from tilewise.bench.cpu.race import CPU, PASSES, entrant, race
from tilewise.bench.masks import Work, draw, sparse_work
from tilewise.bench.serving.contest import Row

TITLE = "butterfly of blocks"


@dataclass(frozen=True)
class Setting:
    """mode: a key of PASSES. at_most: bar on time / (density x the time of full attention)."""
    mode: str
    seqlen: int
    block: int = 128
    heads: int = 2
    head_dim: int = 64
    at_most: float = 1.3
    seconds: float = 20.0

    def __str__(self) -> str:
        return f"{PASSES[self.mode]} N {self.seqlen} H {self.heads} D {self.head_dim} float32 block {self.block}"


def settings(quick: bool = False) -> list[Setting]:
    return [Setting(mode, 1024, seconds=0.2) if quick else Setting(mode, 16384) for mode in PASSES]


def measure(setting: Setting) -> Row:
    tensors, dout = draw(setting.seqlen, setting.heads, setting.head_dim, CPU)
    layout = tw.patterns.butterfly(setting.seqlen // setting.block)
    density = layout.float().mean().item()
    works = {"tilewise": sparse_work(tensors, dout, layout, setting.block), "full": Work(tensors, dout)}
    rows, timed = race({name: entrant(work, setting.mode) for name, work in works.items()}, {}, setting.seconds)
    wanted = [Ratio(COST, "density x full attention", "tilewise", "full", setting.at_most, 1 / density)]
    return {"density": density, "contenders": rows, "figures": ratios(wanted, timed)}
