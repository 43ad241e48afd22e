"""Decoding: one token for each sequence, attending to a long cache; bound by how fast the cache is read."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.pages.words import digits, duration
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Table, Text
from tilewise.report.charts import Guide
from tilewise.report.results import File, Row
from tilewise.report.sections.shared import (
    NOTHING,
    all_times,
    each_machine,
    head_dim,
    pictures,
    ratio_cell,
    shape,
    spread,
    state,
    without_empty,
)

BENCHMARKS = ("decode",)
INTRO = ("One new token for each sequence, attending to a cache of keys and values; one layer. Tokens per second are "
         "sequences over that layer's time: a model has many layers, and more than attention. Nothing can read the cache "
         "faster than memory is read; a copy of memory, measured in the same rounds, says how fast that is here. A case is "
         "called batch, context, query heads / key heads / head dim, dtype; attend is attention alone, step appends the "
         "token first.")


def build(files: Sequence[File]) -> list[Block]:
    blocks = each_machine(files, BENCHMARKS, of_machine)
    return blocks and [Text(INTRO), *blocks]


def of_machine(rows: list[Row]) -> list[Block]:
    found = pictures(rows, key=lambda r: (names.mode(r), names.dtype(r), head_dim(r), shape(r)), value=lambda e: e.gb_per_s,
                     words=digits, label="GB/s of the cache", log_y=False, x_label="context, tokens", guides=copy_line)
    lines: list[list[Cell | str]] = []
    for row in rows:
        best, standard, share = names.best_peer(row), names.best_standard(row), of_copy(row)
        lines.append([row.case, state(row.ours, lambda e: e.seconds, duration), tokens(row),
                      state(row.ours, lambda e: e.gb_per_s, digits), NOTHING if share is None else f"{share:.0%}",
                      names.title(best[0]) if best else NOTHING, ratio_cell(best[1] if best else None),
                      spread(best[1] if best else None), ratio_cell(standard[1] if standard else None)])
    head = ["case", "Tilewise", "tokens/s", "GB/s", "of a copy", "fastest other", "times faster", "quartiles", "than standard"]
    return [*found, without_empty(Table("Decoding: every case", head, lines)), all_times(rows, "Decoding: median times")]


def tokens(row: Row) -> str:
    """Of one layer."""
    queries = row.whole("seqlen_q") * row.whole("batch")
    return digits(queries / row.ours.seconds) if row.ours and row.ours.seconds else NOTHING


def of_copy(row: Row) -> float | None:
    """Our bandwidth over that of a copy of memory in the same rounds."""
    ours, copy = row.ours, row.entries.get("copy")
    if ours is None or copy is None:
        return None
    if ours.gb_per_s and copy.gb_per_s:
        return ours.gb_per_s / copy.gb_per_s
    found = row.times_faster.get("copy")        # a yardstick's time is that of as many bytes as ours reads
    return found.median if found else None


def copy_line(rows: Sequence[Row]) -> list[Guide]:
    """What a copy reached, across the picture."""
    found = [(names.length(row), row.entries["copy"].gb_per_s) for row in rows if "copy" in row.entries]
    points = [(float(x), y) for x, y in found if x and y]
    return [Guide("a copy of memory", points)] if len(points) > 1 else []
