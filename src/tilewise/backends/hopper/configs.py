"""Variants of the kernels: data, in `configs.tsv` beside this file.

A row says: this kernel, for D up to `head_dim`, D_v up to `head_dim_v` and these features ("plain"; "listed": with a list of
tiles; "rich": with a score function; "dropout": with it), works on BLOCK_M queries x BLOCK_N keys per tile, with so many stages
and registers of a thread. PERSISTENT: programs of the forward kernel take one block of queries after another.
The kernel is "forward", of fp8 inputs "forward fp8", or what a pass of the backward computes: "dq dk dv", "dv", ... Decoding is
"decode" or, by how keys are stored, "decode fp8": its PRODUCER_REGISTERS are the converter's, too.
No row spills registers in its main loop (`results/gates.json`); none has been chosen by measured speed yet.
"""
from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from tilewise.problem import Problem

TABLE = Path(__file__).with_name("configs.tsv")
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
def head_dims(kernel: str, features: str = "plain") -> tuple[tuple[int, int], ...]:
    """(D, D_v) of the table's rows for a kernel and features, the narrowest first."""
    return tuple(sorted((d, dv) for name, d, dv, of in table() if (name, of) == (kernel, features)))


def forward(problem: Problem) -> str:
    """The name of the forward kernel in the table."""
    return "forward fp8" if problem.quantized else "forward"


def choose(kernel: str, problem: Problem) -> Config:
    """The configuration of a kernel for a problem that it has a row for."""
    found = row(kernel, problem)
    assert found is not None
    return table()[found]


def row(kernel: str, problem: Problem) -> tuple[str, int, int, str] | None:
    """The narrowest row of the table for a kernel that a problem fits into, if there is one."""
    features = ("dropout" if problem.dropout > 0 else "rich" if problem.graphs.score is not None else
                "listed" if problem.graphs.listed else "plain")
    dims = (dims for dims in head_dims(kernel, features) if problem.head_dim <= dims[0] and problem.head_dim_v <= dims[1])
    fitting = next(dims, None)
    return None if fitting is None else (kernel, *fitting, features)


def passes(problem: Problem) -> tuple[str, ...]:
    """The kernels of the backward pass: of the ways to share out the gradients that have rows the one with fewest products."""
    ways = SEPARATE if problem.deterministic else (*ADDED, *SEPARATE)
    return next(way for way in ways if all(row(kernel, problem) for kernel in way))
