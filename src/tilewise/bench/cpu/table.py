"""Results as lines of plain text, and as a table in Markdown."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from tilewise.bench.serving.contest import Row, why

WIDTHS = 50, 9, 42, 7      # of the case, our milliseconds, what is measured, the median


def lines(rows: Sequence[Row]) -> list[str]:
    """A line for each figure, those of a part below its title; then why there are gaps."""
    found = []
    for title, of_part in groupby(rows, key=lambda row: row["title"]):
        found.append(f"{title:{WIDTHS[0]}} {'ours, ms':>{WIDTHS[1]}}  {'measured':{WIDTHS[2]}} {'median':>{WIDTHS[3]}}"
                     f"  {'bar':8} met")
        for row in of_part:
            found += [" ".join((f"  {case:{WIDTHS[0] - 2}}", f"{ours:>{WIDTHS[1]}}", "", f"{words:{WIDTHS[2]}}",
                                f"{median:>{WIDTHS[3]}}", "", f"{bar:8}", met)).rstrip()
                      for case, ours, words, median, bar, met in cells(row)]
            found += [f"    {words}"[:128] for words in gaps(row)]
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The same as one table, with quartiles."""
    found = ["| | ours, ms | measured | median | quartiles | bar | met |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        for (case, *others), figure in zip(cells(row), row["figures"], strict=True):
            ours, words, median, bar, met = others
            shown = f"{row['title']}: {case}" if case else ""
            low, high = map(number, figure["quartiles"])
            found.append(" | ".join((f"| {shown}", ours, words, median, f"{low} to {high}", bar, f"{met} |")))
        found += [f"| {row['title']}: {row['case']} | | {words} | | | | |" for words in gaps(row)]
    return "\n".join(found)


def cells(row: Row) -> Iterator[tuple[str, ...]]:
    """The case and our time, in the first line only, and one figure: what it is, median, bar, whether that is met."""
    seconds = row["contenders"].get("tilewise", {}).get("seconds")
    case, ours = row["case"], "" if seconds is None else f"{1000 * seconds:.3g}"
    for figure in row["figures"]:
        bar = "" if figure["bar"] is None else f"{'at most' if figure['at_most'] else 'at least'} {figure['bar']:g}"
        met = {None: "", True: "yes", False: "no"}[figure["met"]]
        yield case, ours, f"{figure['quantity']} {figure['against']}", number(figure["median"]), bar, met
        case = ours = ""


def gaps(row: Row) -> list[str]:
    """Who was not timed, and why."""
    found = [f"{name}: {why(entry)}" for name, entry in row["contenders"].items() if entry["state"] != "timed"]
    return found + ([row["error"]] if "error" in row else [])


def number(value: float) -> str:
    return f"{value:.3g}"
