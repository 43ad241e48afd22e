"""Errors against fp64: by the rule that every result is held to, and relative to the truth, where they come from."""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby

from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Heading, Table, Text
from tilewise.report.results import Entry, File, Row
from tilewise.report.sections.comparisons import order
from tilewise.report.sections.shared import NOTHING, each_machine, everyone, pictures, without_empty

TENSORS = ("out", "dq")         # whose errors are shown side by side
CAUSES, USUAL = "causes", "bfloat16"
PARTS = {"inputs": "Inputs that are hard in different ways", CAUSES: "What one rounding costs",
         "interpreter": "Triton's kernels, in its interpreter", "lengths": "Long rows"}


def numerics(files: Sequence[File]) -> list[Block]:
    """Each tensor's largest error, and standard attention's in the same precision."""
    def of_machine(rows: list[Row]) -> list[Block]:
        rows = [row for row in rows if row.part != CAUSES and any(e.errors for e in row.entries.values())]
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
    return Table("Largest errors", ["case, result", *map(names.title, who), "allowed"], lines, f"All {len(lines)} results",
                 detail=True)


def error(entry: Entry | None, tensor: str) -> Cell | str:
    if entry is None or tensor not in entry.errors:
        return NOTHING
    found, most = entry.errors[tensor]
    return Cell(f"{found:.1e}".replace("nan", "NaN"), "" if found <= most else "bad")


def allowed(row: Row, tensor: str) -> str:
    found = [e.errors[tensor][1] for e in row.entries.values() if tensor in e.errors]
    return f"{found[0]:.1e}"


def rounding(files: Sequence[File]) -> list[Block]:
    """Root mean square errors over those of the truth."""
    def of_machine(rows: list[Row]) -> list[Block]:
        rows = [row for row in rows if any(e.rms for e in row.entries.values())]
        found: list[Block] = []
        for part, group in groupby(sorted(rows, key=order(rows)), key=lambda row: row.part):
            of = list(group)
            found += [Heading(PARTS.get(part, part), 4), *tables(of), *against_length(of)]
        return found

    found = each_machine(files, ["numerics"], of_machine)
    return found and [Text("Root mean square of the errors over that of the truth in fp64.", detail=True), *found]


def tables(rows: Sequence[Row]) -> list[Block]:
    """One for each tensor; where inputs differ in kind, of one dtype, and of all only on request."""
    usual = [row for row in rows if row.setting.get("dtype") == USUAL]
    if len({row.setting.get("kind") for row in rows}) == 1 or len(usual) in (0, len(rows)):
        return [relative(rows, tensor) for tensor in TENSORS]
    return [*(relative(usual, tensor, f" in {names.dtype(usual[0])}") for tensor in TENSORS),
            *(relative(rows, tensor, folded=f"{tensor} in every dtype") for tensor in TENSORS)]


def relative(rows: Sequence[Row], tensor: str, of: str = "", folded: str = "") -> Table:
    who = everyone(rows)
    lines: list[list[Cell | str]] = []
    for row in rows:
        shares = [share(row.entries.get(name), tensor) for name in who]
        lines.append([label(row, rows), *(NOTHING if s is None else f"{s:.1e}" for s in shares)])
    return without_empty(Table("", [f"error of {tensor}{of}", *map(names.title, who)], lines, folded, detail=bool(folded)))


def share(entry: Entry | None, tensor: str) -> float | None:
    """A tensor's error, relative to the truth."""
    found, truth = entry.rms.get(tensor, (0.0, 0.0)) if entry else (0.0, 0.0)
    return found / truth if truth > 0 else None


def label(row: Row, rows: Sequence[Row]) -> str:
    """What tells a row from the others."""
    facts = {"kind": str(row.setting.get("kind", "")), "seqlen_k": f"{names.length(row) or 0:,} keys",
             "dtype": names.dtype(row)}
    return ", ".join(words for name, words in facts.items() if len({r.setting.get(name) for r in rows}) > 1) or row.case


def against_length(rows: Sequence[Row]) -> list[Block]:
    """A picture for each tensor and dtype of rows that differ in length alone."""
    if len({row.setting.get("kind") for row in rows}) > 1:
        return []
    found: list[Block] = []
    for tensor in TENSORS:
        found += pictures(rows, key=partial(name, tensor), value=partial(share, tensor=tensor), words=lambda v: f"{v:.0e}",
                          label="error relative to the truth", x_label="keys")
    return found


def name(tensor: str, row: Row) -> tuple[str, str]:
    return tensor, names.dtype(row)
