"""Benchmarks whose result is a number for each contender: overhead, bytes of traffic, instructions."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.pages.words import digits, duration
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Table, Text
from tilewise.report.results import Entry, File, Row
from tilewise.report.sections.shared import (
    NOTHING,
    all_times,
    each_machine,
    everyone,
    grouped,
    head_dim,
    pictures,
    ratio_cell,
    spread,
    state,
)


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


def traffic(files: Sequence[File]) -> list[Block]:
    """Bytes between slow and fast memory."""
    def of_machine(rows: list[Row]) -> list[Block]:
        rows = [row for row in rows if row.part != "roofline"]          # a section of its own
        drawn = pictures(rows, key=lambda r: (names.mode(r), names.dtype(r), head_dim(r), names.mask(r), grouped(r)),
                         value=lambda e: e.count or None, words=gigabytes, label="bytes read and written")
        counts = [row for row in rows if any(e.count for e in row.entries.values())]
        return [*drawn, counted(counts)] if counts else []

    found = each_machine(files, ["traffic"], of_machine)
    return found and [Text("Bytes that attention moves between slow memory and fast: as counted in our kernels, as the closed "
                           "form says, and as papers print them."), *found]


def counted(rows: Sequence[Row]) -> Table:
    """Every count, what is published, and the first over the second: what is counted over what is predicted."""
    who = list(dict.fromkeys(name for row in rows for name in row.entries))
    printed = list(dict.fromkeys(p.who for row in rows for p in row.published if p.bytes))
    lines: list[list[Cell | str]] = []
    for row in rows:
        counts = [row.entries[n].count if n in row.entries else None for n in who]
        published = {p.who: p.bytes for p in row.published}
        first, second = (*counts, None)[:2]
        lines.append([row.case, *(gigabytes(c) if c else NOTHING for c in [*counts, *(published.get(p) for p in printed)]),
                      f"{first / second:.3f}" if first and second else NOTHING])
    head = ["case", *map(names.title, who), *(f"{p} (published)" for p in printed), " ÷ ".join(map(names.title, who[:2]))]
    return Table("Traffic: every case", head, lines)


def gigabytes(count: float) -> str:
    """Powers of 1000, as the papers have it."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{digits(count / scale)} {unit}"
    return f"{count:,.0f} B"


def instructions(files: Sequence[File]) -> list[Block]:
    """Exact counts."""
    return each_machine(files, ["instructions"], lambda rows: [
        all_times(rows, "Instructions", lambda e: e.count, lambda n: f"{n:,.0f}", folded="")])
