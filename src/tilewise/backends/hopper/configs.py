"""Variants of the kernels: data, in `configs.tsv` beside this file.

A row says: this kernel, for head dims up to `head_dim` (the larger of D and D_v) and these features ("plain"; "listed": with a
list of tiles; "rich": with a score function; "dropout": with it), works on BLOCK_M queries x BLOCK_N keys per tile, with so
many stages and registers of a thread. The kernel is "forward", or what a pass of the backward computes: "dq dk dv", "dv", ...
Decoding is "decode" or, by how keys are stored, "decode fp8": its PRODUCER_REGISTERS are the converter's, too.
No row spills registers in its main loop (`results/gates.json`); none has been chosen by measured speed yet.
"""
from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from tilewise.problem import Problem

TABLE = Path(__file__).with_name("configs.tsv")
HEAD_DIMS = (64, 128, 256)
ADDED = ("dq dk dv",), ("dq dk", "dv")                          # dQ is added to in any order;
SEPARATE = ("dq", "dk dv"), ("dq", "dk", "dv")                  # here not: the same bits each time


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    STAGES: int
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
    return table()[row(kernel, problem)]


def row(kernel: str, problem: Problem) -> tuple[str, int, str]:
    """Which row of the table, if it is there, is for a kernel and a problem."""
    dim = max(problem.head_dim, problem.head_dim_v)
    features = ("dropout" if problem.dropout > 0 else "rich" if problem.graphs.score is not None else
                "listed" if problem.graphs.listed else "plain")
    return kernel, next((d for d in HEAD_DIMS if d >= dim), dim), features


def passes(problem: Problem) -> tuple[str, ...]:
    """The kernels of the backward pass: of the ways to share out the gradients that have rows the one with fewest products;
    none: the table has no way."""
    ways = SEPARATE if problem.deterministic else (*ADDED, *SEPARATE)
    return next((way for way in ways if all(row(kernel, problem) in table() for kernel in way)), ())
