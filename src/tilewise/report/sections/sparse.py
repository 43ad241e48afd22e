"""Sparse blocks: time against the share of blocks that is kept, beside the ideal of cost in proportion to it."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilewise.pages.words import duration, length, ratio
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Table, Text
from tilewise.report.charts import Guide
from tilewise.report.results import File, Row
from tilewise.report.sections.shared import NOTHING, all_times, each_machine, head_dim, pictures, state, without_empty

BENCHMARKS = ("sparse",)
INTRO = ("Attention that keeps only some blocks of the matrix. Ideal is a cost in proportion to the share of blocks that "
         "is kept: its line is full attention's time times that share. Cost over ideal is how many times longer it really "
         "takes.")


def build(files: Sequence[File]) -> list[Block]:
    blocks = each_machine(files, BENCHMARKS, of_machine)
    return blocks and [Text(INTRO), *blocks]


def of_machine(rows: list[Row]) -> list[Block]:
    rows = [row for row in rows if density(row)]
    found = pictures(rows, key=lambda r: (names.mode(r), length_of(r), names.dtype(r), head_dim(r)),
                     value=lambda e: e.seconds, words=duration, label="time", x=density,
                     x_label="share of blocks kept", lengths=False, guides=lambda of: ideal_line(rows, of))
    lines: list[list[Cell | str]] = []
    for row in rows:
        full, kept = full_seconds(rows, row), density(row)
        cost = row.ours.seconds / (full * kept) if row.ours and row.ours.seconds and full and kept else None
        lines.append([row.case, f"{kept:.1%}", state(row.ours, lambda e: e.seconds, duration),
                      duration(full) if full else NOTHING,
                      ratio(full / row.ours.seconds) if full and row.ours and row.ours.seconds else NOTHING,
                      f"{cost:.2f}" if cost else NOTHING])
    head = ["case", "kept", "Tilewise", "full attention", "times faster than full", "cost over ideal"]
    return [*found, without_empty(Table("Sparse blocks: every case", head, lines)),
            all_times(rows, "Sparse blocks: median times")]


def density(row: Row) -> Any:
    """The share of blocks that is kept, above 0 to 1."""
    found = row.setting.get("density")
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) and 0 < found <= 1 else None


def length_of(row: Row) -> str:
    return f"{length(names.length(row) or 0)} tokens"


def full_seconds(rows: Sequence[Row], row: Row) -> float | None:
    """Full attention's time: a yardstick of the row, or ours in the row of the same setting that keeps all blocks."""
    for name, share in (("full", 1.0), ("full x density", density(row))):
        entry = row.entries.get(name)
        if entry and entry.seconds:
            return entry.seconds / share
    same = [r for r in rows if density(r) == 1 and (names.mode(r), names.length(r), names.dtype(r), head_dim(r))
            == (names.mode(row), names.length(row), names.dtype(row), head_dim(row))]
    return same[0].ours.seconds if same and same[0].ours else None


def ideal_line(rows: Sequence[Row], of: Sequence[Row]) -> list[Guide]:
    """Full attention's time times the density."""
    points = [(density(row), full * density(row)) for row in of if (full := full_seconds(rows, row))]
    return [Guide("ideal: in proportion", points)] if len(points) > 1 else []
