"""Benchmarks whose result is a number for each contender: overhead, instructions."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.pages.words import duration
from tilewise.report import names
from tilewise.report.blocks import Block, Table, Text
from tilewise.report.results import Entry, File, Row
from tilewise.report.sections.shared import all_times, each_machine, everyone, ratio_cell, spread, state


def overhead(files: Sequence[File]) -> list[Block]:
    """Time until the caller has its thread back."""
    def of_machine(rows: list[Row]) -> list[Block]:
        who = everyone(rows)
        lines = [[row.case, *(state(row.entries.get(name), host, duration) for name in who),
                  ratio_cell(best[1] if (best := names.best_peer(row)) else None), spread(best[1] if best else None)]
                 for row in rows]
        return [Table("Time of a call on the host", ["case", *map(names.title, who), "times faster", "quartiles"], lines)]

    found = each_machine(files, ["overhead"], of_machine)
    return found and [Text("What a call costs before and beside the work itself: Python, checks, planning, launching."), *found]


def host(entry: Entry) -> float | None:
    return entry.seconds if entry.host_seconds is None else entry.host_seconds


def instructions(files: Sequence[File]) -> list[Block]:
    """Exact counts."""
    return each_machine(files, ["instructions"], lambda rows: [
        all_times(rows, "Instructions", lambda e: e.count, lambda n: f"{n:,.0f}", folded="")])
