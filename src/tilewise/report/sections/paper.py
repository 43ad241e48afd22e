"""Tables of the papers: our columns beside what they print, which was measured on other hardware."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from tilewise.pages.words import digits, duration, size
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Table, Text
from tilewise.report.results import File, Published, Row
from tilewise.report.sections.comparisons import order
from tilewise.report.sections.shared import NOTHING, each_machine, everyone, state, without_empty

INTRO = ("Columns in italics are the papers' own numbers, from other hardware: they show the shape of a result, and no "
         "ratio to them means anything.")
MOST = 4                # published columns of a table


def build(files: Sequence[File]) -> list[Block]:
    blocks = each_machine(files, ["paper"], of_machine)
    return blocks and [Text(INTRO), *blocks]


def of_machine(rows: list[Row]) -> list[Block]:
    return [table for part, of in groupby(sorted(rows, key=order(rows)), key=lambda row: row.part)
            for table in tables(list(of), part)]


def tables(rows: Sequence[Row], part: str) -> list[Table]:
    """One for each hardware of the papers, or more where their columns are many; and one of the rows that no paper has."""
    columns: dict[str, list[str]] = defaultdict(list)
    for one in (one for row in rows for one in row.published):
        columns[one.hardware] += [one.who] * (one.who not in columns[one.hardware])
    parts = [(hardware, who[i:i + MOST]) for hardware, who in columns.items() for i in range(0, len(who), MOST)]
    found = [table([row for row in rows if beside(row, hardware, who)], part, hardware, who) for hardware, who in parts]
    rest = [row for row in rows if not row.published]
    return found + [table(rest, part, "", [])] * bool(rest)


def beside(row: Row, hardware: str, who: Sequence[str]) -> dict[str, Published]:
    return {found.who: found for found in row.published if found.hardware == hardware and found.who in who}


def table(rows: Sequence[Row], part: str, hardware: str, printed: Sequence[str]) -> Table:
    """In the unit that the paper prints: TFLOP/s, bytes or time."""
    who = everyone(rows)
    unit = next((p for row in rows for p in row.published), Published("", "", seconds=1.0))
    quantity, words = ("tflops", digits) if unit.tflops else ("bytes", size) if unit.bytes else ("seconds", duration)
    value = attrgetter(quantity)
    lines: list[list[Cell | str]] = []
    for row in rows:
        published = beside(row, hardware, printed)
        lines.append([row.case, *(state(row.entries.get(name), value, words) for name in who),
                      *(Cell(words(v), "published") if name in published and (v := value(published[name])) else NOTHING
                        for name in printed)])
    head = ["case" + (", TFLOP/s" if unit.tflops else ""), *map(names.title, who), *(f"{name} (published)" for name in printed)]
    caption = f"{part or 'paper'}, beside what was published of {hardware}" if hardware else part or "paper"
    return without_empty(Table(caption, head, lines))
