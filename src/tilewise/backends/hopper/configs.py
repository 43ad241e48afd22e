"""Variants of the kernels: data, in `configs.tsv` beside this file.

A row says: this kernel, for head dims up to `head_dim` (the larger of D and D_v) and these features ("plain"; "listed": with a
list of tiles; "rich": with a score function), works on BLOCK_M queries x BLOCK_N keys per tile, with so many stages and
registers of a thread; PARTS: passes of the backward kernel. Decoding is "decode" or, by how keys are stored, "decode fp8": its
PRODUCER_REGISTERS are the converter's, too.
Every row compiles without register spills (`results/gates.json`); none has been chosen by measured speed yet.
"""
from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from tilewise.problem import Problem

TABLE = Path(__file__).with_name("configs.tsv")
HEAD_DIMS = (64, 128)
DECODE_HEAD_DIMS = (64, 128, 256)


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    STAGES: int
    PARTS: int
    PINGPONG: int
    EARLY_WAIT: int
    CONSUMER_REGISTERS: int
    PRODUCER_REGISTERS: int


@functools.cache
def table() -> dict[tuple[str, int, str], Config]:
    rows = {}
    for line in TABLE.read_text().splitlines()[1:]:
        kernel, head_dim, features, *numbers = line.split("\t")
        rows[kernel, int(head_dim), features] = Config(*map(int, numbers))
    return rows


def choose(kernel: str, problem: Problem) -> Config:
    """The configuration of a kernel for a problem."""
    dim = max(problem.head_dim, problem.head_dim_v)
    features = "rich" if problem.graphs.score is not None else "listed" if problem.graphs.listed else "plain"
    return table()[kernel, min(d for of, d, _ in table() if of == kernel and d >= dim), features]
