"""Results as lines of plain text, and as a table in Markdown."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from tilewise.bench.serving.contest import Row, why


class Line(NamedTuple):
    """Cells: the case and our milliseconds, in the first line of a case only, and one figure."""
    case: str
    ours: str
    measured: str
    median: str
    quartiles: str
    bar: str
    met: str

    def __str__(self) -> str:
        return (f"{self.case:44} {self.ours:>8}  {self.measured:36} {self.median:>6}  {self.quartiles:11}  {self.bar:7} "
                f"{self.met}").rstrip()

    def markdown(self) -> str:
        return f"| {' | '.join(self)} |"


HEAD = Line("", "ours, ms", "measured", "median", "quartiles", "bar", "met")


def lines(rows: Sequence[Row]) -> list[str]:
    """The lines of each part below its title, and why there are gaps."""
    found = []
    for title, of_part in groupby(rows, key=lambda row: row["title"]):
        found.append(str(HEAD._replace(case=title)))
        for row in of_part:
            found += [str(line._replace(case=f"  {line.case}")) for line in cells(row)]
            found += [f"  {row['case']}: {words}"[:128] for words in gaps(row)]
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The same as one table."""
    found = [HEAD.markdown(), Line(*["---"] * len(HEAD)).markdown()]
    for title, of_part in groupby(rows, key=lambda row: row["title"]):
        found.append(Line(f"**{title}**", *[""] * (len(HEAD) - 1)).markdown())
        for row in of_part:
            found += [line.markdown() for line in cells(row)]
            found += [Line(row["case"], "", words, *[""] * (len(HEAD) - 3)).markdown() for words in gaps(row)]
    return "\n".join(found)


def cells(row: Row) -> Iterator[Line]:
    seconds = row["contenders"].get("tilewise", {}).get("seconds")
    case, ours = row["case"], "" if seconds is None else number(1000 * seconds)
    for figure in row["figures"]:
        bar = "" if figure["bar"] is None else f"{'<=' if figure['at_most'] else '>='} {figure['bar']:g}"
        yield Line(case, ours, f"{figure['quantity']} {figure['against']}", number(figure["median"]),
                   "-".join(map(number, figure["quartiles"])), bar, {None: "", True: "yes", False: "no"}[figure["met"]])
        case = ours = ""


def gaps(row: Row) -> list[str]:
    """Who was not timed, and why."""
    found = [f"{name}: {why(entry)}" for name, entry in row["contenders"].items() if entry["state"] != "timed"]
    return found + ([row["error"]] if "error" in row else [])


def number(value: float) -> str:
    """Two decimals, of numbers below 10 only."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
