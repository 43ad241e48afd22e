"""The few numbers that a report begins with, each by a rule that leaves nothing out: medians over all cases, and the ends."""
from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tilewise.pages.words import ratio, size
from tilewise.report import names
from tilewise.report.results import Entry, File, Promise, Ratio, Row

DENSE = ("attention", "cpu")            # benchmarks whose cases the speed headlines count
RULE = ("How these numbers are chosen: a speed is the median over all attention cases of these files that both were timed "
        "in, with the slowest and the fastest of them named; memory is taken at the longest sequence that both could do, "
        "and if several cases have it, in the least favourable. Other implementations count only where their results are "
        "right. Ratios are taken within one run on one machine.")


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
    """A case in which another is faster, or ours does not run, for a reason."""
    file: File
    row: Row
    other: str
    found: Ratio | None
    reason: str = ""


class Duel(NamedTuple):
    """All comparisons with one other implementation in one benchmark on one machine, by how many times faster ours is."""
    file: File
    other: str
    compared: int
    losses: list[Loss]


def cards(files: Sequence[File]) -> list[Card]:
    """The headlines of files of one machine."""
    dense = [row for file in files if file.benchmark in DENSE for row in file.rows if names.is_attention(row)]
    found = [speed(dense, "the fastest other implementation", names.best_peer),
             speed(dense, "standard attention", names.best_standard), memory(files), longest(files), decoding(files)]
    return [card for card in found if card is not None]


def speed(rows: Sequence[Row], whom: str, against: Callable[[Row], tuple[str, Ratio] | None]) -> Card | None:
    """The median over cases, and both ends."""
    found = sorted((Comparison(row, *pair) for row in rows if (pair := against(row)) is not None), key=lambda c: c.found.median)
    if not found:
        return None
    middle = statistics.median(c.found.median for c in found)
    tone = "" if middle >= 1 else "bad"
    if len(found) == 1:
        return Card(times(middle), f"than {whom} in the one case that both were timed in: {where(found[0])}.", tone)
    return Card(times(middle), f"than {whom} in the median of {len(found)} cases. At worst {ratio(found[0].found.median)}, "
                f"{where(found[0])}; at best {ratio(found[-1].found.median)}, {where(found[-1])}.", tone)


def where(one: Comparison) -> str:
    """The case, and the other where it could be any."""
    return one.row.case + (f", against {names.title(one.other)}" if names.kind(one.other) == "peer" else "")


def times(value: float) -> str:
    """A speed ratio that says which way it goes."""
    return f"{ratio(value)} faster" if value >= 1 else f"{ratio(1 / value)} slower"


def memory(files: Sequence[File]) -> Card | None:
    """Standard attention's bytes over ours, at the longest length both have, where it is least."""
    found = []
    for row in (row for file in files for row in file.rows if names.length(row)):
        other = names.standard(row)
        if row.ours and row.ours.bytes and other and other.bytes:
            found.append((names.length(row) or 0, -other.bytes / row.ours.bytes, row, other.bytes, row.ours.bytes))
    if not found:
        return None
    _, less, row, theirs, ours = max(found, key=lambda f: f[:2])
    words = f"at {row.case}: {size(ours)} beside inputs and outputs, where standard attention needs {size(theirs)}."
    return Card(f"{ratio(-less)} less memory", words) if less < -1 else Card(f"{ratio(-1 / less)} more memory", words, "bad")


def longest(files: Sequence[File]) -> Card | None:
    """The longest sequence of ours over that of standard attention, in one mode, where it was refused what ours could do."""
    for benchmark in ("memory", *DENSE):
        found = []
        rows = [row for file in files if file.benchmark == benchmark for row in file.rows if names.length(row)]
        for mode in {names.mode(row) for row in rows}:
            of = [row for row in rows if names.mode(row) == mode]
            ours = {names.length(row) or 0: row for row in of if row.ours and row.ours.state == "timed"}
            theirs = {names.length(row) or 0: entry for row in of if (entry := names.standard(row))}
            done = [n for n, e in theirs.items() if e.state == "timed"]
            if done and ours and max(ours) > max(done):
                refused = [(n, e.reason) for n, e in sorted(theirs.items()) if e.state == "refused" and n > max(done)]
                found += [(max(ours) / max(done), ours[max(ours)].case, max(ours), max(done), *refused[0])] if refused else []
        if found:
            times_longer, case, ours_most, theirs_most, at, reason = min(found)
            return Card(f"{ratio(times_longer)} longer", f"sequences: {ours_most:,} tokens, the longest that was tried "
                        f"({case}), against {theirs_most:,}. At {at:,} standard attention was refused: {reason}.")
    return None


def decoding(files: Sequence[File]) -> Card | None:
    """The longest context decoded: bytes per second as a share of what the machine copies."""
    from tilewise.report.sections.decode import of_copy

    rows = [(names.length(row) or 0, -share, row) for file in files if file.benchmark in ("decode", "serving")
            for row in file.rows if (share := of_copy(row)) is not None]
    if not rows:
        return None
    _, less, row = max(rows, key=lambda f: f[:2])
    return Card(f"{-less:.0%} of a copy", "is the memory bandwidth at which decoding reads its cache, at the longest context: "
                f"{row.case}.")


def duels(files: Sequence[File]) -> list[Duel]:
    """Every comparison in all benchmarks, with others and with standard attention; of each duel the losses, worst first."""
    counts: dict[tuple[str, str, str], int] = Counter()
    lost: dict[tuple[str, str, str], list[Loss]] = defaultdict(list)
    of: dict[tuple[str, str, str], File] = {}
    for file in files:
        for row in file.rows:
            for name, entry in row.timed().items():
                if names.role(entry) in ("peer", "standard") and row.ours is not None and entry is not row.ours:
                    key = file.benchmark, file.machine, name
                    counts[key] += 1
                    of.setdefault(key, file)
                    loss = lost_to(file, row, row.ours, name)
                    lost[key] += [loss] if loss else []
    found = [Duel(of[key], key[2], count, sorted(lost[key], key=severity)) for key, count in counts.items()]
    return sorted(found, key=lambda duel: -len(duel.losses) / duel.compared)


def lost_to(file: File, row: Row, ours: Entry, name: str) -> Loss | None:
    if ours.state != "timed":
        return Loss(file, row, name, None, f"{ours.state}: {ours.reason}")
    found = row.faster(name)
    return Loss(file, row, name, found) if found is not None and found.median < 1 else None


def severity(loss: Loss) -> float:
    return loss.found.median if loss.found else 0.0


def unmet(files: Sequence[File]) -> list[tuple[File, Row, Promise]]:
    """What is promised and not met."""
    return [(file, row, promise) for file in files for row in file.rows for promise in row.promises() if not promise.met]
