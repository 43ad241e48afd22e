"""The few numbers that a report begins with, each by a rule that leaves nothing out: medians over all cases, and the ends."""
from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tilewise.pages.words import ratio, size
from tilewise.report import names
from tilewise.report.results import Entry, File, Promise, Ratio, Row

DENSE = ("attention", "cpu")            # benchmarks whose cases the speed headlines count
MEASURED = ("memory", *DENSE)           # those whose bytes were measured: others say what formulas give
RULE = ("How these numbers are chosen: a speed is the median over all attention cases of these files that both were timed "
        "in, with the slowest and the fastest of them named; memory is measured beside inputs and outputs, at the longest "
        "sequence that both could do, and if several cases have it, in the least favourable. Other implementations count only "
        "where their results are right. Ratios are taken within one run on one machine.")


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
    found = [speed(dense, names.best_peer), speed(dense, names.best_standard), memory(files), longest(files), decoding(files)]
    return [card for card in found if card is not None]


def speed(rows: Sequence[Row], against: Callable[[Row], tuple[str, Ratio] | None]) -> Card | None:
    """The median over cases, and both ends."""
    found = sorted((Comparison(row, *pair) for row in rows if (pair := against(row)) is not None), key=lambda c: c.found.median)
    if not found:
        return None
    kind = names.kind(found[0].other)
    whom = fastest_of(name for name in rivals([one.row for one in found]) if names.kind(name) == kind)
    middle = statistics.median(c.found.median for c in found)
    tone = "" if middle >= 1 else "bad"
    if len(found) == 1:
        return Card(times(middle), f"than {whom}, in the one case that both were timed in: {where(found[0])}.", tone)
    return Card(times(middle), f"than {whom}, in the median of {len(found)} cases: from {ratio(found[0].found.median)} "
                f"({where(found[0])}) to {ratio(found[-1].found.median)} ({where(found[-1])}).", tone)


def fastest_of(others: Iterable[str]) -> str:
    """Who is compared with."""
    *more, last = map(names.title, others)
    return f"the fastest of {', '.join(more)} and {last}" if more else last


def where(one: Comparison) -> str:
    """The case in words, and the other where it could be any."""
    return names.case(one.row) + (f", against {names.title(one.other)}" if names.kind(one.other) == "peer" else "")


def times(value: float) -> str:
    """A speed ratio that says which way it goes."""
    return f"{ratio(value)} faster" if value >= 1 else f"{ratio(1 / value)} slower"


def rivals(rows: Sequence[Row]) -> list[str]:
    """Others that have a number in these rows: standard attention, then peers in their order."""
    found = dict.fromkeys(name for row in rows for name, entry in row.entries.items() if entry.state == "timed"
                          and names.role(entry) in ("peer", "standard"))
    return sorted(found, key=lambda name: names.kind(name) != "standard")


def faster(rows: Sequence[Row], name: str) -> list[float]:
    """How many times faster ours is, in each row that has both."""
    return [found.median for row in rows if name in row.timed() and (found := row.faster(name)) is not None]


def less(rows: Sequence[Row], name: str) -> dict[int, list[tuple[float, Row]]]:
    """How many times less memory ours needs, in each row that has both, by length."""
    found: dict[int, list[tuple[float, Row]]] = defaultdict(list)
    for row in rows:
        other, n = row.entries.get(name), names.length(row)
        if n and row.ours and row.ours.bytes and other and other is not row.ours and other.bytes:
            found[n].append((other.bytes / row.ours.bytes, row))
    return found


def memory(files: Sequence[File]) -> Card | None:
    """Standard attention's bytes over ours, at the longest length both have, where it is least."""
    rows = [row for file in files if file.benchmark in MEASURED for row in file.rows]
    found = [pair for name in rivals(rows) if names.kind(name) == "standard" for pair in less(rows, name).items()]
    if not found:
        return None
    _, at_most = max(found, key=lambda pair: pair[0])
    share, row = min(at_most, key=lambda one: one[0])
    ours, other = row.ours, names.standard(row)
    assert ours is not None
    assert other is not None
    words = f"than standard attention: {size(ours.bytes or 0)} instead of {size(other.bytes or 0)} ({names.case(row)})."
    return Card(f"{ratio(share)} less memory", words) if share > 1 else Card(f"{ratio(1 / share)} more memory", words, "bad")


def longest(files: Sequence[File]) -> Card | None:
    """The longest sequence of ours over that of standard attention, in one mode, where it was refused what ours could do."""
    for benchmark in MEASURED:
        found = []
        rows = [row for file in files if file.benchmark == benchmark for row in file.rows if names.length(row)]
        for mode in {names.mode(row) for row in rows}:
            of = [row for row in rows if names.mode(row) == mode]
            ours = {names.length(row) or 0: row for row in of if row.ours and row.ours.state == "timed"}
            theirs = {names.length(row) or 0: entry for row in of if (entry := names.standard(row))}
            done = [n for n, e in theirs.items() if e.state == "timed"]
            if done and ours and max(ours) > max(done):
                refused = [(n, e.reason) for n, e in sorted(theirs.items()) if e.state == "refused" and n > max(done)]
                found += [(max(ours) / max(done), max(ours), max(done), *refused[0])] if refused else []
        if found:
            times_longer, ours_most, theirs_most, at, reason = min(found)
            return Card(f"{ratio(times_longer)} longer", f"sequences than standard attention: {ours_most:,} tokens, the "
                        f"longest that was tried, instead of {theirs_most:,}. At {at:,} it was refused: "
                        f"{without_class(reason)}.")
    return None


def without_class(reason: str) -> str:
    """An error's words alone."""
    return re.sub(r"^(?:\w+Error: )+", "", reason).rstrip(".")


def decoding(files: Sequence[File]) -> Card | None:
    """The longest context decoded: bytes per second as a share of what the machine copies."""
    from tilewise.report.sections.decode import of_copy

    rows = [(names.length(row) or 0, -share, row) for file in files if file.benchmark in ("decode", "serving")
            for row in file.rows if (share := of_copy(row)) is not None]
    if not rows:
        return None
    _, less, row = max(rows, key=lambda f: f[:2])
    return Card(f"{-less:.0%} of a copy", "of memory is how fast decoding reads its cache, in bytes per second, at the "
                f"longest context ({names.case(row)}).")


def lost(files: Sequence[File]) -> Card:
    """In how many comparisons ours is slower, the worst of them, and what is promised but not met."""
    every = duels(files)
    found, compared = [loss for duel in every for loss in duel.losses], sum(duel.compared for duel in every)
    words = "comparisons with others, in all benchmarks, are lost."
    if found:
        worst = min(found, key=severity)
        how = f"{ratio(worst.found.median)} of the speed" if worst.found else "Tilewise does not run"
        words += f" At worst {how}, against {names.title(worst.other)} ({worst.file.benchmark}: {worst.row.case})."
    missed, promised = len(unmet(files)), sum(len(row.promises()) for file in files for row in file.rows)
    if promised:
        words += f" Of {promised} promises {missed or 'none'} {'is' if missed == 1 else 'are'} not met."
    return Card(f"{len(found)} of {compared}", words, "bad" if found or missed else "")


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
