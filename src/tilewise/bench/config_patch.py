"""Configurations that measured best, as a patch to the tables of tile sizes.

    python -m tilewise.bench.config_patch tuning128.json decode.json ... > configs.patch; git apply configs.patch

A table (`configs.tsv`) has a row for each kernel; its columns up to BLOCK_M say for what, the others are the configuration.
Measured are kernels of masks alone in 16 bits, so these rows change. Afterwards `make gates` compiles them.
"""
from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise.backends.hopper import configs as hopper
from tilewise.backends.triton import configs as triton
from tilewise.bench import record
from tilewise.bench.tuning import best

ROOT = Path(__file__).parents[3]


def chosen(result: Mapping[str, Any], arch: str) -> tuple[Path, list[str]]:
    """The table that a tuning's result belongs to, and the rows that measured best on a GPU of this architecture."""
    def row(kernel: str, head_dim: int, config: str) -> str:
        dims = [head_dim, head_dim] if table == hopper.TABLE else [head_dim]
        where = [kernel] if table == hopper.TABLE else [kernel, "16", arch]
        return "\t".join(map(str, [*where, *dims, "plain", *config.strip("()").split(", ")]))

    table = hopper.TABLE if result["benchmark"].startswith("hopper") else triton.TABLE
    rows = [one for one in result["rows"] if one["part"] != "speed"]
    return table, [row("decode" if kernel == "variants" else kernel, head_dim, config)
                   for kernel, head_dim, config, _, _ in best(rows) if config]


def patches(results: Iterable[Mapping[str, Any]], arch: str) -> Iterator[str]:
    """A patch for each table that changes."""
    found: dict[Path, list[str]] = {}
    for result in results:
        table, rows = chosen(result, arch)
        found.setdefault(table, []).extend(rows)
    for table, rows in found.items():
        yield patch(table, rows)


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


def main(arguments: Sequence[str] | None = None) -> None:
    files = sys.argv[1:] if arguments is None else arguments
    results = [one for one in map(record.load, files) if one["benchmark"].split()[-1] in ("tuning", "decoding")]
    for text in patches(results, triton.architecture(torch.device("cuda"))):
        print(text, end="")


if __name__ == "__main__":
    main()
