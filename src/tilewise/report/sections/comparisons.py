"""Benchmarks whose cases are simply compared, and those that this version does not know."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from tilewise.report import names
from tilewise.report.blocks import Block, Heading, Text
from tilewise.report.results import File, Row
from tilewise.report.sections import speed
from tilewise.report.sections.shared import all_times, contest, each_machine

KNOWN = ("attention", "decode", "sparse", "masks", "memory", "cpu", "paper", "serving", "numerics", "overhead", "instructions",
         "traffic")


def of(benchmark: str) -> Callable[[Sequence[File]], list[Block]]:
    """The section of one benchmark: a table for each part."""
    return lambda files: each_machine(files, [benchmark], tables)


def cpu(files: Sequence[File]) -> list[Block]:
    """Plain attention as in the section on speed, then a table for each other part."""
    return each_machine(files, ["cpu"], lambda rows: [*speed.of_machine(rows), *tables(
        [row for row in rows if not names.is_attention(row)])])


def tables(rows: list[Row]) -> list[Block]:
    """Of what is compared; times that are only promised have a section of their own."""
    rows = [row for row in rows if len(row.entries) > 1 or not row.promises()]
    found: list[Block] = []
    for part, group in groupby(sorted(rows, key=order(rows)), key=lambda row: row.part):
        of = list(group)
        found.append(Heading(part[:1].upper() + part[1:], 4))
        if any(names.best_peer(row) or names.best_standard(row) for row in of):
            found += [contest(of, ""), all_times(of, f"{part}: median times")]
        else:           # ways to do it with Tilewise
            found.append(all_times(of, "", folded=""))
    return found


def order(rows: Sequence[Row]) -> Callable[[Row], int]:
    """Parts in the order in which they first appear."""
    places = {part: i for i, part in enumerate(dict.fromkeys(row.part for row in rows))}
    return lambda row: places[row.part]


def unknown(files: Sequence[File]) -> list[Block]:
    """Tables of whatever else the files hold."""
    found: list[Block] = []
    for benchmark in dict.fromkeys(file.benchmark for file in files if file.benchmark not in KNOWN):
        found += [Heading(benchmark), Text(f"This version of Tilewise does not know benchmark `{benchmark}`: its rows as they "
                                           "are.")]
        found += of(benchmark)(files)
    return found
