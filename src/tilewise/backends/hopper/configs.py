"""Variants of the kernels: data, in `configs.tsv` beside this file.

A row says: this kernel, for D up to `head_dim`, D_v up to `head_dim_v` and these features ("plain"; "listed": with a list of
tiles; "rich": with a score function or dropout), works on BLOCK_M queries x BLOCK_N keys per tile, with so many stages and
registers of a thread. PARTS: passes of the backward kernel. PERSISTENT: programs of the forward kernel take one block of
queries after another.
Every row compiles without register spills (`results/gates.json`); none has been chosen by measured speed yet.
"""
from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from tilewise.problem import Problem

TABLE = Path(__file__).with_name("configs.tsv")


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    STAGES: int
    PARTS: int
    PINGPONG: int
    EARLY_WAIT: int
    CONSUMER_REGISTERS: int
    PRODUCER_REGISTERS: int
    PERSISTENT: int


@functools.cache
def table() -> dict[tuple[str, int, int, str], Config]:
    """(kernel, head_dim, head_dim_v, features) -> configuration, in the order of the file."""
    rows = {}
    for line in TABLE.read_text().splitlines()[1:]:
        kernel, head_dim, head_dim_v, features, *numbers = line.split("\t")
        rows[kernel, int(head_dim), int(head_dim_v), features] = Config(*map(int, numbers))
    return rows


@functools.cache
def head_dims(kernel: str) -> tuple[tuple[int, int], ...]:
    """(D, D_v) of the table's rows for a kernel, the narrowest first."""
    return tuple(sorted({(d, dv) for name, d, dv, _ in table() if name == kernel}))


def fitting(kernel: str, problem: Problem) -> tuple[int, int] | None:
    """The first of `head_dims` that a problem's fit into; None: they are too wide."""
    return next((dims for dims in head_dims(kernel) if problem.head_dim <= dims[0] and problem.head_dim_v <= dims[1]), None)


def choose(kernel: str, problem: Problem) -> Config:
    """The configuration of a kernel for a problem, whose head dims must fit."""
    dims = fitting(kernel, problem)
    assert dims is not None
    rich = problem.graphs.score is not None or (kernel == "forward" and problem.dropout > 0)
    features = "rich" if rich else "listed" if problem.graphs.listed else "plain"
    return table()[kernel, dims[0], dims[1], features]
