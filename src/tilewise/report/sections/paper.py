"""Tables of the papers: our columns beside what they print, which was measured on other hardware."""
from __future__ import annotations

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


def build(files: Sequence[File]) -> list[Block]:
    blocks = each_machine(files, ["paper"], of_machine)
    return blocks and [Text(INTRO), *blocks]


def of_machine(rows: list[Row]) -> list[Block]:
    return [table(list(of), part) for part, of in groupby(sorted(rows, key=order(rows)), key=lambda row: row.part)]


def table(rows: Sequence[Row], part: str) -> Table:
    """In the unit that the paper prints: TFLOP/s, bytes or time."""
    who = everyone(rows)
    printed = list(dict.fromkeys((p.who, p.hardware) for row in rows for p in row.published))
    unit = next((p for row in rows for p in row.published), Published("", "", seconds=1.0))
    quantity, words = ("tflops", digits) if unit.tflops else ("bytes", size) if unit.bytes else ("seconds", duration)
    value = attrgetter(quantity)
    lines: list[list[Cell | str]] = []
    for row in rows:
        published = {(p.who, p.hardware): p for p in row.published}
        lines.append([row.case, *(state(row.entries.get(name), value, words) for name in who),
                      *(Cell(words(v), "published") if key in published and (v := value(published[key])) else NOTHING
                        for key in printed)])
    head = [*map(names.title, who), *(f"{name} ({'' if hardware in name else f'{hardware}, '}published)"
                                      for name, hardware in printed)]
    return without_empty(Table(part or "paper", ["case" + (", TFLOP/s" if unit.tflops else ""), *head], lines))
