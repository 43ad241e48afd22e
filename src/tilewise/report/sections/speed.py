"""Attention at growing lengths: TFLOP/s or time, for each pass, head dim and mask."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.pages.words import digits, duration
from tilewise.report import names
from tilewise.report.blocks import Block, Heading, Text
from tilewise.report.results import File, Row
from tilewise.report.sections.shared import all_times, contest, each_machine, grouped, head_dim, modes, pictures

BENCHMARKS = ("attention", "cpu")


def build(files: Sequence[File]) -> list[Block]:
    blocks = each_machine(files, BENCHMARKS, of_machine)
    if not blocks:
        return []
    return [Text("One attention layer at growing sequence lengths. A cross at the top edge is a length that a contender was refused. "
                 "A FLOP is counted as the field does: 4 × batch × heads × length² × head dim for the forward pass, half of it "
                 "under a causal mask, 2.5 times as many for the backward."), *blocks]


def of_machine(rows: list[Row]) -> list[Block]:
    rows = [row for row in rows if names.mode(row) and names.length(row) and is_attention(row)]
    found: list[Block] = []
    for mode in modes(rows):
        of = [row for row in rows if names.mode(row) == mode]
        found += [Heading(mode[0].upper() + mode[1:], 4), *drawn(of),
                  contest(of, f"{mode[0].upper() + mode[1:]}: every case"), all_times(of, f"{mode}: median times")]
    return found


def is_attention(row: Row) -> bool:
    """Plain attention of a sequence to itself: what else a file measures has sections of its own."""
    return row.part not in ("decode", "packed", "compiling", "butterfly", "sparse", "masks")


def drawn(rows: Sequence[Row]) -> list[Block]:
    """In TFLOP/s where the file says it of every contender that was timed."""
    key = names.dtype, head_dim, names.mask, grouped
    rates = all(e.tflops for row in rows for e in row.timed().values() if names.kind(e.name) != "ruler")
    if rates:
        return pictures(rows, key=lambda r: tuple(f(r) for f in key), value=lambda e: e.tflops, words=digits, label="TFLOP/s",
                        ticks="plain", log_y=False)
    return pictures(rows, key=lambda r: tuple(f(r) for f in key), value=lambda e: e.seconds, words=duration, label="time",
                    ticks="seconds")
