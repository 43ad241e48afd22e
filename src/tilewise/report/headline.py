"""The few numbers that a report begins with, each by a rule that leaves nothing out: medians over all cases, and the ends."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tilewise.pages.words import ratio, size
from tilewise.report import names
from tilewise.report.results import File, Promise, Ratio, Row

DENSE = ("attention", "cpu")            # benchmarks whose cases the speed headlines count
RULE = ("How these numbers are chosen: speed is the median over every attention case of these files in which both were timed, with the "
        "slowest and the fastest case named beside it; memory is taken at the longest sequence that both could do. Other "
        "implementations count only where their results are right. Ratios are taken within one run on one machine.")


class Card(NamedTuple):
    """number, what it means, and where it comes from."""
    number: str
    words: str
    tone: str = ""


class Comparison(NamedTuple):
    """How many times faster ours is in a row."""
    row: Row
    other: str
    found: Ratio


class Loss(NamedTuple):
    """A case in which another is faster, or ours does not run."""
    file: File
    row: Row
    other: str
    found: Ratio | None
    reason: str = ""


def cards(files: Sequence[File]) -> list[Card]:
    """The headlines of files of one machine."""
    dense = [row for file in files if file.benchmark in DENSE for row in file.rows if names.length(row) and names.mode(row)]
    found = [speed(dense, "than the fastest other implementation", names.best_peer),
             speed(dense, "than standard attention", lambda row: standard(row)), memory(files), longest(files), decoding(files)]
    return [card for card in found if card is not None]


def standard(row: Row) -> tuple[str, Ratio] | None:
    found = names.against_standard(row)
    return None if found is None else ("standard", found)


def speed(rows: Sequence[Row], words: str, against: Callable[[Row], tuple[str, Ratio] | None]) -> Card | None:
    """The median over cases, and both ends."""
    found = sorted((Comparison(row, *pair) for row in rows if (pair := against(row)) is not None), key=lambda c: c.found.median)
    if not found:
        return None
    middle = statistics.median(c.found.median for c in found)
    several = words.startswith("than the fastest")
    ends = " to ".join(f"{ratio(c.found.median)} ({c.row.case}{f', {names.title(c.other)}' if several else ''})"
                       for c in ([found[0]] if len(found) == 1 else [found[0], found[-1]]))
    if len(found) == 1:
        return Card(times(middle), f"{words}: the one case that both were timed in, {ends}.")
    return Card(times(middle), f"{words}, in the median of {len(found)} cases: from {ends}.")


def times(value: float) -> str:
    """A speed ratio that says which way it goes."""
    return f"{ratio(value)} faster" if value >= 1 else f"{ratio(1 / value)} slower"


def memory(files: Sequence[File]) -> Card | None:
    """Standard attention's bytes over ours, at the longest length both have."""
    found = []
    for row in (row for file in files for row in file.rows if names.length(row)):
        other = next((e for name, e in row.entries.items() if name in names.STANDARD and e.bytes), None)
        if row.ours and row.ours.bytes and other and other.bytes:
            found.append((names.length(row) or 0, row, other.bytes, row.ours.bytes))
    if not found:
        return None
    _, row, theirs, ours = max(found, key=lambda f: f[0])
    words = f"at {row.case}: {size(ours)} beside inputs and outputs, standard attention {size(theirs)}."
    return Card(f"{ratio(theirs / ours)} less memory" if theirs >= ours else f"{ratio(ours / theirs)} more memory", words)


def longest(files: Sequence[File]) -> Card | None:
    """The longest sequence of ours, beside the longest that standard attention was not refused at."""
    rows = [row for file in files if file.benchmark in ("memory", *DENSE) for row in file.rows if names.length(row)]
    ours = {names.length(row): row for row in rows if row.ours and row.ours.state == "timed"}
    theirs = [names.length(row) or 0 for row in rows for n, e in row.entries.items() if n in names.STANDARD and e.state == "timed"]
    refused = [(names.length(row) or 0, e.reason) for row in rows for n, e in row.entries.items()
               if n in names.STANDARD and e.state == "refused" and row.ours and row.ours.state == "timed"]
    if not refused or not theirs or not ours:
        return None
    most = max(n for n in ours if n)
    if most <= max(theirs):
        return None
    return Card(f"{most:,} tokens", f"is the longest sequence measured, {ours[most].case}. Standard attention got to {max(theirs):,}; "
                f"at {min(refused)[0]:,} it was refused: {min(refused)[1]}.")


def decoding(files: Sequence[File]) -> Card | None:
    """The longest context decoded: bytes per second as a share of what the machine copies."""
    from tilewise.report.sections.decode import of_copy

    rows = [(names.length(row) or 0, row, share) for file in files if file.benchmark in ("decode", "serving")
            for row in file.rows if (share := of_copy(row)) is not None]
    if not rows:
        return None
    _, row, share = max(rows, key=lambda f: f[0])
    return Card(f"{share:.0%} of a copy", f"is the memory bandwidth at which decoding reads its cache, at the longest context: {row.case}.")


def losses(files: Sequence[File]) -> tuple[list[Loss], int]:
    """Every comparison, in all benchmarks, in which ours is slower or does not run, worst first; and how many there are."""
    found, count = [], 0
    for file in files:
        for row in file.rows:
            if row.ours is None or names.kind(row.ours.name) == "ruler":
                continue
            for name, entry in row.timed().items():
                if names.kind(name) not in ("peer", "standard"):
                    continue
                count += 1
                faster = row.faster(name)
                if row.ours.state != "timed":
                    found.append(Loss(file, row, name, None, f"{row.ours.state}: {row.ours.reason}"))
                elif entry is not row.ours and faster is not None and faster.median < 1:
                    found.append(Loss(file, row, name, faster))
    return sorted(found, key=lambda loss: loss.found.median if loss.found else 0), count


def unmet(files: Sequence[File]) -> list[tuple[File, Row, Promise]]:
    """What is promised and not met."""
    return [(file, row, promise) for file in files for row in file.rows for promise in row.promises() if not promise.met]
