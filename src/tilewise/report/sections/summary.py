"""The whole story as one small table and two pictures: each pass and its memory, against each other implementation."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from tilewise.pages.words import length, ratio
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Heading, Table, Text
from tilewise.report.headline import DENSE, faster, less, lost, rivals, times
from tilewise.report.results import File, Row
from tilewise.report.sections import memory, speed
from tilewise.report.sections.shared import NOTHING, machines, modes, origin

INTRO = ("How many times faster than each other implementation, in the median of all attention cases that both were timed in "
         "(in brackets the slowest and the fastest), and how much less memory beside inputs and outputs, at the longest "
         "sequence that both could do.")


def build(files: Sequence[File]) -> list[Block]:
    found: list[Block] = []
    for machine, of in machines(files).items():
        blocks = of_machine(of)
        if blocks:
            found += [Heading(machine, note=origin(of)), *blocks]
    return found and [Text(INTRO), *found]


def of_machine(files: Sequence[File]) -> list[Block]:
    dense = [row for file in files if file.benchmark in DENSE for row in file.rows if names.is_attention(row)]
    held = [row for file in files if file.benchmark in memory.BENCHMARKS for row in file.rows if names.length(row)]
    others = rivals([*dense, *held])
    lines: list[list[Cell | str]] = []
    for mode in modes(dense):
        of = [row for row in dense if names.mode(row) == mode]
        lines.append([f"{mode}, {count(of)}", *(in_the_median(faster(of, name)) for name in others)])
    for mode in modes(held):
        of = [row for row in held if names.mode(row) == mode]
        lines.append([f"memory, {mode}", *(at_longest(of, name) for name in others)])
    lines = [line for line in lines if set(line[1:]) != {NOTHING}]
    if not lines:
        return []
    table = Table("", ["Tilewise against", *map(names.title, others)], lines)
    losses = lost(files)
    alone = [row for file in files if file.benchmark == DENSE[0] for row in file.rows]
    return [table, *pictures(alone or dense, held), Text(f"{cases(dense)}{losses.number} {losses.words}")]


def count(rows: Sequence[Row]) -> str:
    return f"{len(rows)} cases" if len(rows) > 1 else "one case"


def in_the_median(ratios: Sequence[float]) -> Cell | str:
    """How many times faster, and both ends."""
    if not ratios:
        return NOTHING
    middle = statistics.median(ratios)
    ends = f" ({ratio(min(ratios))} to {ratio(max(ratios))})" if len(ratios) > 1 else ""
    return Cell(times(middle) + ends, "" if middle >= 1 else "bad")


def at_longest(rows: Sequence[Row], name: str) -> Cell | str:
    """The least favourable of the cases with the longest sequence."""
    found = less(rows, name)
    if not found:
        return NOTHING
    most = max(found)
    share = min(times for times, _ in found[most])
    return Cell(f"{ratio(share)} less at {length(most)} tokens" if share >= 1 else
                f"{ratio(1 / share)} more at {length(most)} tokens", "" if share >= 1 else "bad")


def cases(rows: Sequence[Row]) -> str:
    """What was timed, in a sentence."""
    if not rows:
        return ""
    lengths = sorted({names.length(row) or 0 for row in rows})
    dims = sorted({row.whole("head_dim", 0) for row in rows} - {0})
    kinds = [", ".join(dict.fromkeys(map(names.dtype, rows))), f"head dim {' and '.join(map(str, dims))}" if dims else "",
             ", ".join(dict.fromkeys(map(names.mask, rows))),
             f"{lengths[0]:,} to {lengths[-1]:,} tokens" if len(lengths) > 1 else f"{lengths[0]:,} tokens"]
    return f"Timed: {'; '.join(filter(None, kinds))}. "


def pictures(dense: Sequence[Row], held: Sequence[Row]) -> list[Block]:
    """Training, with a causal mask where there is one: its speed and its memory."""
    found: list[Block] = []
    for rows, draw, what in ((dense, speed.drawn, "Speed"), (held, memory.drawn, "Memory")):
        chosen = [row for row in rows if names.mode(row) == "forward + backward"] or list(rows)
        chosen = [row for row in chosen if names.mask(row) == "causal"] or chosen
        for one in draw(chosen)[:1]:
            mode = names.mode(chosen[0])
            found.append(replace(one, title=f"{what}: {mode}, {one.title.removeprefix(f'{mode}, ')}"))
    return found
