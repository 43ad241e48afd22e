"""Benchmarks whose result is a number for each contender: overhead, bytes of traffic, instructions, errors."""
from __future__ import annotations

import math
from collections.abc import Sequence

from tilewise.pages.words import digits, duration
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Table, Text
from tilewise.report.results import Entry, File, Row
from tilewise.report.sections.shared import NOTHING, all_times, each_machine, everyone, grouped, head_dim, pictures

FEW = 20        # errors that are shown at once


def overhead(files: Sequence[File]) -> list[Block]:
    """Time until the caller has its thread back."""
    def of_machine(rows: list[Row]) -> list[Block]:
        value = host if any(e.host_seconds for row in rows for e in row.entries.values()) else lambda e: e.seconds
        return [all_times(rows, "Time of a call on the host", value, duration, folded="")]

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


def numerics(files: Sequence[File]) -> list[Block]:
    """Each tensor's largest error, and standard attention's in the same precision."""
    def of_machine(rows: list[Row]) -> list[Block]:
        rows = [row for row in rows if any(e.errors for e in row.entries.values())]
        return [closest(rows), errors(rows)] if rows else []

    found = each_machine(files, ["numerics"], of_machine)
    return found and [Text("Largest error of each result against the same computed in fp64. Standard attention in the inputs' "
                           "precision is the measure: twice its error is allowed, three times for gradients."), *found]


def closest(rows: Sequence[Row]) -> Table:
    """Of each contender the result that comes closest to what is allowed, or farthest over it."""
    lines: list[list[Cell | str]] = []
    for name in everyone(rows):
        found = [(part_of(*pair), f"{row.case}, {tensor}") for row in rows if name in row.entries
                 for tensor, pair in row.entries[name].errors.items()]
        if found:
            share, where = max(found)
            within = sum(s <= 1 for s, _ in found)
            lines.append([names.title(name), f"{within} of {len(found)}", Cell(f"{share:.2g}", "" if share <= 1 else "bad"),
                          Cell(where, "long")])
    return Table("Errors over what is allowed", ["contender", "within", "largest share", "where"], lines)


def part_of(found: float, most: float) -> float:
    """An error over what is allowed; what is no number is over all of it."""
    return found / most if most > 0 and math.isfinite(found) else math.inf


def errors(rows: Sequence[Row]) -> Table:
    who = [name for name in everyone(rows) if any(row.entries[name].errors for row in rows if name in row.entries)]
    lines: list[list[Cell | str]] = []
    for row in rows:
        tensors = dict.fromkeys(t for e in row.entries.values() for t in e.errors)
        for tensor in tensors:
            lines.append([f"{row.case}, {tensor}", *(error(row.entries.get(name), tensor) for name in who),
                          allowed(row, tensor)])
    folded = f"All {len(lines)} results" if len(lines) > FEW else ""
    return Table("Largest errors", ["case, result", *map(names.title, who), "allowed"], lines, folded)


def error(entry: Entry | None, tensor: str) -> Cell | str:
    if entry is None or tensor not in entry.errors:
        return NOTHING
    found, most = entry.errors[tensor]
    return Cell(f"{found:.1e}".replace("nan", "NaN"), "" if found <= most else "bad")


def allowed(row: Row, tensor: str) -> str:
    found = [e.errors[tensor][1] for e in row.entries.values() if tensor in e.errors]
    return f"{found[0]:.1e}"
