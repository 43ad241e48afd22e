"""Bytes that attention needs beside its inputs and outputs, against sequence length."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.pages.words import ratio, size
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Picture, Table, Text
from tilewise.report.results import Entry, File, Row
from tilewise.report.sections.shared import NOTHING, each_machine, everyone, grouped, head_dim, pictures, state, without_empty

BENCHMARKS = ("memory",)
INTRO = ("Peak memory beside inputs, outputs and gradients. Standard attention keeps a score for every pair of tokens, so "
         "four times as much for twice the length; Tilewise keeps one number for each query.")


def build(files: Sequence[File]) -> list[Block]:
    blocks = each_machine(files, BENCHMARKS, of_machine)
    return blocks and [Text(INTRO), *blocks]


def of_machine(rows: list[Row]) -> list[Block]:
    rows = [row for row in rows if any(e.bytes is not None for e in row.entries.values()) or row.error]
    return [*drawn(rows), table(rows)] if rows else []


def drawn(rows: Sequence[Row]) -> list[Picture]:
    return pictures(rows, key=lambda r: (names.mode(r), names.dtype(r), head_dim(r), names.mask(r), grouped(r)),
                    value=positive, words=size, label="peak memory beside inputs and outputs")


def positive(entry: Entry) -> float | None:
    """Bytes that a logarithmic axis can show: nothing at all is drawn as one KiB."""
    return None if entry.bytes is None else max(entry.bytes, 1024)


def table(rows: Sequence[Row]) -> Table:
    who = everyone(rows)
    lines: list[list[Cell | str]] = []
    for row in rows:
        ours = row.ours.bytes if row.ours else None
        other = names.standard(row)
        theirs = other.bytes if other else None
        lines.append([row.case, *(state(row.entries.get(name), lambda e: e.bytes, size) for name in who),
                      ratio(theirs / max(ours, 1)) if ours is not None and theirs else NOTHING])
    return without_empty(Table("Peak memory", ["case", *map(names.title, who), "standard ÷ Tilewise"], lines))
