"""Results as lines of plain text."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from tilewise.bench.record import Entry, Faster, Row

WIDTH = 128
SHORT = {"bfloat16": "bf16", "float": "fp", "forward": "fwd", "backward": "bwd"}


def lines(rows: Sequence[Row]) -> list[str]:
    """For each part a line per case: our time and rate, then how many times faster we are than each other, "!" where that is
    less than promised; then why there are gaps."""
    found = []
    for part, group in groupby(rows, key=lambda row: row["part"]):
        of_part = list(group)
        others = list(dict.fromkeys(name for row in of_part for name, entry in list(row["contenders"].items())[1:]
                                    if entry["state"] != "absent"))
        names, rate = [short(row["case"]) for row in of_part], unit_of(of_part)
        first = max(len(part), *(len(name) + 2 for name in names))
        widths = [max(5, *map(len, name.rsplit(" ", 1))) for name in others]
        upper, lower = ([name.rpartition(" ")[half].rjust(width) for name, width in zip(others, widths, strict=True)]
                        for half in (0, 2))
        blank = " " * (first + 19)
        found += [" ".join([blank, *upper])] * any(map(str.strip, upper))
        found.append(" ".join([f"{part:{first}} {'ours':>9} {rate:>8}", *lower]))
        for row, title in zip(of_part, names, strict=True):
            cells = [cell(row, name).rjust(width) for name, width in zip(others, widths, strict=True)]
            found.append(" ".join([f"  {title:{first - 2}} {duration(ours(row)):>9} {rate_of(ours(row), rate):>8}", *cells]))
        found += [f"  {words}" for words in (*promises(of_part), *remarks(of_part))]
    return [line[:WIDTH].rstrip() for line in found]


def short(case: str) -> str:
    """A case's name where there is little room."""
    for long, brief in SHORT.items():
        case = case.replace(long, brief)
    return case


def ours(row: Row) -> Entry:
    return next(iter(row["contenders"].values()))


def cell(row: Row, name: str) -> str:
    """How many times faster than one other, or why there is no such number; where nothing is compared, its memory."""
    ratio, entry = row["times_faster"].get(name), row["contenders"].get(name)
    if ratio is not None:
        return number(ratio["median"]) + ("!" if short_of(ratio) else "")
    if entry and not row["times_faster"] and "bytes" in entry:
        return rate_of(entry, "MiB")
    return {"wrong": "wrong", "refused": "-"}.get(entry["state"], "") if entry else ""


def short_of(ratio: Faster) -> bool:
    return "bar" in ratio and ratio["median"] < ratio["bar"]


def promises(rows: Sequence[Row]) -> Iterator[str]:
    """What falls short of what is promised."""
    for row in rows:
        for name, ratio in row["times_faster"].items():
            if short_of(ratio):
                low, high = map(number, ratio["quartiles"])
                yield (f"! {short(row['case'])}: {number(ratio['median'])} ({low}-{high}) times faster than {name}, promised "
                       f"{number(ratio['bar'])}")
        entry = ours(row)
        if entry.get("seconds", 0) > entry.get("bar", float("inf")):
            yield f"! {short(row['case'])}: {duration(entry)}, promised {duration({**entry, 'seconds': entry['bar']})}"


def remarks(rows: Sequence[Row]) -> list[str]:
    """Why there is no number: one line for each reason."""
    who: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, entry in row["contenders"].items():
            if entry["state"] != "timed":
                names = who.setdefault((entry["state"], entry["reason"]), [])
                names += [name] * (name not in names)
    return [f"{', '.join(names)}: {state}: {reason}" for (state, reason), names in who.items()]


def unit_of(rows: Sequence[Row]) -> str:
    """Of the rates of our entries, one for all of them."""
    entries = list(map(ours, rows))
    if flops := [entry["tflops"] for entry in entries if "tflops" in entry]:
        return "TFLOP/s" if max(flops) >= 1 else "GFLOP/s"
    return next((unit for key, unit in (("gb_per_s", "GB/s"), ("bytes", "MiB")) if any(key in x for x in entries)), "")


def rate_of(entry: Entry, unit: str) -> str:
    rates = {"TFLOP/s": entry.get("tflops"), "GFLOP/s": 1000 * entry.get("tflops", 0) or None, "GB/s": entry.get("gb_per_s"),
             "MiB": entry.get("bytes", 0) / 2**20 or None, "": None}
    return "" if rates[unit] is None else f"{rates[unit]:.3g}"


def duration(entry: Entry) -> str:
    """With its unit; nothing where nothing was timed."""
    if "seconds" not in entry:
        return ""
    seconds = entry["seconds"]
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def number(value: float) -> str:
    """Two decimals, of numbers below 10 only; of very small ones two digits."""
    return f"{value:.2g}" if value < 0.095 else f"{value:.2f}" if value < 10 else f"{value:.0f}"
