"""Attention at growing lengths: TFLOP/s or time, for each pass, head dim and mask."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.pages.words import digits, duration
from tilewise.report import names
from tilewise.report.blocks import Block, Heading, Picture, Text
from tilewise.report.results import File, Row
from tilewise.report.sections.shared import all_times, contest, each_machine, flops, grouped, head_dim, modes, pictures

BENCHMARKS = ("attention",)
INTRO = ("One attention layer at growing sequence lengths. A cross at the top edge is a length that a contender was "
         "refused. A FLOP is counted as the field does: 4 × batch × heads × length² × head dim for the forward pass, half "
         "of it under a causal mask, 2.5 times as many for the backward.")
FEW = 8         # cases whose table is shown at once, below pictures


def build(files: Sequence[File]) -> list[Block]:
    blocks = each_machine(files, BENCHMARKS, of_machine)
    if not blocks:
        return []
    return [Text(INTRO), *blocks]


def of_machine(rows: list[Row]) -> list[Block]:
    rows = [row for row in rows if names.is_attention(row)]
    found: list[Block] = []
    for mode in modes(rows):
        of = [row for row in rows if names.mode(row) == mode]
        title, pictures = mode[0].upper() + mode[1:], drawn(of)
        folded = f"All {len(of)} cases: {mode}" if pictures and len(of) > FEW else ""
        found += [Heading(title, 4), *pictures, contest(of, f"{title}: every case", folded),
                  all_times(of, f"{title}: median times")]
    return found


def drawn(rows: Sequence[Row]) -> list[Picture]:
    """In FLOPs per second where the file says it of every contender that was timed."""
    first = rows[0].part if rows else ""        # plain attention may be measured in several parts
    key = names.dtype, head_dim, names.mask, grouped, lambda row: "" if row.part == first else row.part
    rates = all(e.tflops for row in rows for e in row.timed().values() if names.role(e) != "ruler")
    if rates:
        unit, value = flops(rows)
        return pictures(rows, key=lambda r: tuple(f(r) for f in key), value=value, words=digits, label=unit, log_y=False)
    return pictures(rows, key=lambda r: tuple(f(r) for f in key), value=lambda e: e.seconds, words=duration, label="time")
