"""Bytes between slow and fast memory: counted, by formula, and as papers print them. Nothing here depends on a machine."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from tilewise.pages.words import digits
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Heading, Table, Text
from tilewise.report.charts import Guide
from tilewise.report.results import Entry, File, Published, Row, pairs
from tilewise.report.sections.comparisons import order
from tilewise.report.sections.shared import NOTHING, grouped, head_dim, pictures, without_empty

INTRO = ("Bytes that attention moves between slow memory and fast: as the closed forms say, as counted in our kernels and in "
         "standard attention, and as papers print them. They are the same on every machine.")
TITLES = {"table": "GPT-2 medium, forward and backward (FlashAttention, figure 2)", "block size": "Against the block size",
          "block-sparse": "Block-sparse attention", "exponents": "Counted, against N² d² / M", "memory": "Memory at the peak"}
ROOFLINE = "roofline"           # a section of its own


def build(files: Sequence[File]) -> list[Block]:
    rows = [row for _, row in pairs(files, "traffic") if row.part != ROOFLINE]
    found: list[Block] = []
    for part, group in groupby(sorted(rows, key=order(rows)), key=lambda row: row.part):
        of = list(group)
        blocks = [block for value in (count, held) for block in of_part(of, value)]
        found += [Heading(TITLES.get(part, part), 4), *blocks] if blocks else []
    return found and [Text(INTRO), *found]


def of_part(rows: Sequence[Row], value: Callable[[Entry], float | None]) -> list[Block]:
    rows = [row for row in rows if any(value(e) for e in row.entries.values())]
    if not rows:
        return []
    label = "bytes read and written" if value is count else "bytes held"
    if all("theory" in row.setting for row in rows):
        drawn = pictures(rows, key=lambda r: ("forward",), value=value, words=gigabytes, label=label, x_label="N² d² / M",
                         x=lambda r: r.setting["theory"], lengths=False, guides=proportion)
    else:
        drawn = pictures(rows, key=lambda r: (names.mode(r), names.dtype(r), head_dim(r), names.mask(r), grouped(r)),
                         value=value, words=gigabytes, label=label)
    return [*drawn, table(rows, value)]


def count(entry: Entry) -> float | None:
    return entry.count or None


def held(entry: Entry) -> float | None:
    return entry.bytes or None


def proportion(rows: Sequence[Row]) -> list[Guide]:
    """What the theorems say, through the first point."""
    first = rows[0].ours.count if rows[0].ours else None
    unit = (first or 0) / rows[0].setting["theory"]
    return [Guide("in proportion", [(row.setting["theory"], unit * row.setting["theory"]) for row in rows])] if unit else []


def table(rows: Sequence[Row], value: Callable[[Entry], float | None]) -> Table:
    """Every number, what is published, and what is predicted over what is counted."""
    who = list(dict.fromkeys(name for row in rows for name in row.entries))
    printed = list(dict.fromkeys(p.who for row in rows for p in row.published if p.bytes))
    lines: list[list[Cell | str]] = []
    for row in rows:
        own = [value(row.entries[name]) if name in row.entries else None for name in who]
        published = {p.who: p for p in row.published}
        first, second = own[:2] if set(who[:2]) == {"closed form", "counted"} else (None, None)
        lines.append([row.case, *(gigabytes(n) if n else NOTHING for n in own),
                      *(said(published.get(name)) for name in printed),
                      f"{first / second:.3f}" if first and second else NOTHING])
    head = ["case", *map(names.title, who), *(f"{p} (published)" for p in printed), " ÷ ".join(map(names.title, who[:2]))]
    return without_empty(Table("", head, lines))


def said(found: Published | None) -> Cell | str:
    return Cell(gigabytes(found.bytes), "published") if found and found.bytes else NOTHING


def gigabytes(count: float) -> str:
    """Powers of 1000, as the papers have it."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{digits(count / scale)} {unit}"
    return f"{count:,.0f} B"
