"""Configurations that measured best, as a patch to the table of tile sizes that they belong to.

A table (`configs.tsv`) has a row for each kernel; its columns up to BLOCK_M say for what, the others are the configuration.
"""
from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[3]


def patch(table: Path, best: Iterable[str]) -> str:
    """What `git apply` takes, from the root of the repository, to put rows, tab-separated as in the table, in place of the
    table's own; "" where they are the table's own."""
    old, name = table.read_text(), table.relative_to(ROOT).as_posix()
    lines = difflib.unified_diff(old.splitlines(keepends=True), replaced(old, best).splitlines(keepends=True),
                                 f"a/{name}", f"b/{name}")
    return "".join(lines)


def replaced(text: str, best: Iterable[str]) -> str:
    """A table's text with these rows. Raises ValueError for one that has no place there."""
    header, *rows = text.splitlines()
    keys, width = header.split("\t").index("BLOCK_M"), len(header.split("\t"))
    table = {tuple(row.split("\t")[:keys]): row for row in rows}
    for row in best:
        cells = row.split("\t")
        if len(cells) != width or tuple(cells[:keys]) not in table:
            raise ValueError(f"expected a row with the columns {header.split()} of a kernel in the table, got {row!r}")
        table[tuple(cells[:keys])] = row
    return "\n".join([header, *table.values()]) + "\n"
