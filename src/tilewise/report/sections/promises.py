"""What is promised of single cases, and whether it is met."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.pages.words import duration, ratio
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Table, Text
from tilewise.report.results import File, Promise, Row
from tilewise.report.sections.shared import each_machine, spread


def build(files: Sequence[File]) -> list[Block]:
    return each_machine(files, list(dict.fromkeys(file.benchmark for file in files)), of_machine)


def of_machine(rows: list[Row]) -> list[Block]:
    found = [(row, promise) for row in rows for promise in row.promises()]
    if not found:
        return []
    met = sum(promise.met for _, promise in found)
    table = Table("Promises", ["case", "measured", "median", "quartiles", "promised", "met"],
                  [[row.case, what(promise), *numbers(promise)] for row, promise in found])
    return [Text(f"{met} of {len(found)} promises are met.", "" if met == len(found) else "bad"), table]


def what(promise: Promise) -> str:
    """Yardsticks, such as a copy of memory, take as long as they would for our work: being as fast is a share of 1."""
    if not promise.against:
        return "time"
    if names.kind(promise.against) == "ruler":
        return f"speed over that of {names.title(promise.against)}"
    return f"times faster than {names.title(promise.against)}"


def numbers(promise: Promise) -> list[Cell | str]:
    """The median with a bar that is full where the promise is met."""
    words = ratio if promise.against else duration
    full = promise.found.median / promise.bar if promise.against else promise.bar / promise.found.median
    tone = "good" if promise.met else "bad"
    return [Cell(words(promise.found.median), "" if promise.met else "bad", min(1.0, full)), spread(promise.found),
            f"{'at least' if promise.against else 'at most'} {words(promise.bar)}", Cell("yes" if promise.met else "no", tone)]
