"""What became of an earlier result: two files of the same benchmark, case by case.

The ratio of a case is new / old: above 1 it became slower. Its interval takes the spread of both files at their ends. The
spread of a median is its quartiles, or where rounds are few its notch, median +- 1.57 (q3 - q1) / sqrt(rounds) (McGill, Tukey
and Larsen 1978); of fewer than three rounds nothing is known. A case is slower, or faster, where the whole interval is, and the
same where 1 lies inside. Counts and bytes, where no time was taken, are exact.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tilewise.bench.record import ASKED, HARDWARE, differences

Verdict = Literal["no longer right", "refused", "slower", "gone", "same", "faster", "new"]
ORDER: tuple[Verdict, ...] = ("no longer right", "refused", "slower", "gone", "same", "faster", "new")   # worst first
BECAME: dict[str, Verdict] = {"wrong": "no longer right", "refused": "refused"}
FEWEST_ROUNDS = 3
Result = Mapping[str, Any]
Spread = tuple[float, float]


class Change(NamedTuple):
    """A contender of a case in both files.

    old, new: seconds, or where `unit` says so a count or bytes; None: not measured. ratio: new / old; interval: what it may be,
    given the spread of both.
    """
    case: str
    contender: str
    old: float | None
    new: float | None
    ratio: float | None
    interval: Spread | None
    verdict: Verdict
    unit: str = "seconds"
    reason: str = ""                    # why there is no new time


def compare(old: Result, new: Result, *, anyway: bool = False) -> list[Change]:
    """A change for each case and contender that was timed in one of the files, worst first.

    Raises ValueError for results of different benchmarks or devices, or one of them quick; and, unless `anyway`, of different
    hardware, on which the same case is not the same measurement. What an incomplete new file does not have yet is left out.
    """
    _check(old, new, anyway)
    found, before, after = [], _entries(old), _entries(new)
    for key in dict.fromkeys((*before, *after)):
        change = _change(key, before.get(key), after.get(key))
        if change is not None and (change.verdict != "gone" or key in after or new["complete"]):
            found.append(change)
    return sorted(found, key=lambda change: (ORDER.index(change.verdict), -(change.ratio or 0.0)))


def failures(changes: Sequence[Change], tolerance: float = 0.05) -> list[Change]:
    """Those that must not pass: once timed and now wrong or refused, or slower by more than `tolerance` even at the favourable
    end of the interval. The exit status of a comparison is whether there are any."""
    return [change for change in changes if change.verdict in ("no longer right", "refused")
            or (change.verdict == "slower" and change.interval is not None and change.interval[0] > 1 + tolerance)]


def lines(old: Result, new: Result, *, anyway: bool = False, tolerance: float = 0.05) -> list[str]:
    """The comparison for a terminal: what else differs between the files, then a line for each change, worst first."""
    changes = compare(old, new, anyway=anyway)
    failed = failures(changes, tolerance)
    width = max([len(f"{change.case}  {change.contender}") for change in changes], default=0)
    found = list(map(str, differences(old, new)))
    if not new["complete"]:
        missing = {case for case, _, _ in _entries(old)} - {case for case, _, _ in _entries(new)}
        found.append(f"not complete: {len(missing)} earlier cases are not measured yet")
    found.append(f"{'':{width}} {'old':>10} {'new':>10} {'ratio':>6} {'interval':>13}")
    found += [_line(change, width, change in failed) for change in changes]
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in ORDER}
    found.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "nothing was timed in either")
    none = f"none fails: no case is slower by over {tolerance:.0%} beyond its spread, none has become wrong or refused"
    return [*found, f"{len(failed)} fail" if failed else none]


def _line(change: Change, width: int, failed: bool) -> str:
    old, new = (_amount(x, change.unit) for x in (change.old, change.new))
    ratio = "" if change.ratio is None else f"{change.ratio:.2f}"
    interval = "" if change.interval is None else "{:.2f} to {:.2f}".format(*change.interval)
    verdict = change.verdict + (" (fails)" if failed else "") + (f": {change.reason}" if change.reason else "")
    title = f"{change.case}  {change.contender}"
    return f"{title:{width}} {old:>10} {new:>10} {ratio:>6} {interval:>13}  {verdict}"


def _amount(x: float | None, unit: str) -> str:
    """A time in the unit that suits it, or a count."""
    if x is None:
        return "-"
    if unit != "seconds":
        return f"{x:,.0f}"
    scale, name = next(((s, n) for s, n in ((1.0, "s"), (1e-3, "ms")) if x >= s), (1e-6, "us"))
    return f"{x / scale:.3g} {name}"


def _check(old: Result, new: Result, anyway: bool) -> None:
    for name in ASKED:
        if old[name] != new[name]:
            raise ValueError(f"against: expected a result of the same {name}, {new[name]!r}, got {old[name]!r}")
    other = [str(fact) for fact in differences(old, new) if fact.name in HARDWARE]
    if other and not anyway:
        raise ValueError(f"against: expected a result of this hardware, got another ({'; '.join(other)}): the same case there "
                         "is not the same measurement")


def _entries(result: Result) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """By case, its setting and contender: a case whose setting changed is another case."""
    return {(row["case"], repr(sorted(row["setting"].items())), name): entry for row in result["rows"]
            for name, entry in row["contenders"].items()}


def _change(key: tuple[str, str, str], old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Change | None:
    case, _, name = key
    (a, unit), (b, new_unit) = _measured(old), _measured(new)
    if a is None and b is None:
        return None
    if b is None or new is None:
        return Change(case, name, a, None, None, None, BECAME.get(new["state"] if new else "", "gone"), unit,
                      new["reason"] if new else "")
    if a is None or old is None or unit != new_unit:
        return Change(case, name, None, b, None, None, "new", new_unit)
    ratio = b / a if a else 1.0 if a == b else math.inf
    (old_low, old_high), (new_low, new_high) = (_spread(entry, x, unit) for entry, x in ((old, a), (new, b)))
    interval = (new_low / old_high if old_high else ratio, new_high / old_low if old_low else math.inf if new_high else ratio)
    verdict: Verdict = "slower" if interval[0] > 1 else "faster" if interval[1] < 1 else "same"
    return Change(case, name, a, b, ratio, interval, verdict, unit)


def _measured(entry: Mapping[str, Any] | None) -> tuple[float | None, str]:
    """What was measured of a contender, and its unit."""
    if entry is not None and entry["state"] == "timed":
        for unit in ("seconds", "count", "bytes"):
            if unit in entry:
                return entry[unit], unit
    return None, "seconds"


def _spread(entry: Mapping[str, Any], median: float, unit: str) -> Spread:
    if unit != "seconds":
        return median, median
    rounds = entry.get("rounds", 0)
    if rounds < FEWEST_ROUNDS or "quartiles" not in entry:
        return 0.0, math.inf
    q1, q3 = entry["quartiles"]
    notch = 1.57 * (q3 - q1) / math.sqrt(rounds)
    return max(0.0, min(q1, median - notch)), max(q3, median + notch)
