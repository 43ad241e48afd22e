"""Results as the papers print them: plain text, published numbers below or beside those measured here."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tilewise.bench import table
from tilewise.bench.record import Row

Columns = Sequence[tuple[str, Row]]     # what stands above a column, and the row of the result that it shows
HERE, PUBLISHED = "contenders", "published"
NAME, SHORT_NAME, CELL = 30, 20, 9      # widths


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows with the same key together, in order."""
    found: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=key):
        found.setdefault(key(row), []).append(row)
    return found


def grid(title: str, columns: Columns, quantity: str, unit: float) -> list[str]:
    """A line for each method: measured here, then published elsewhere."""
    found = [title]
    for heading, part in (("measured here", HERE), ("published, other hardware", PUBLISHED)):
        names = list(dict.fromkeys(name for _, row in columns for name in present(row, part)))
        if names:
            found.append(f"  {heading:{NAME}}" + "".join(f"{head:>{CELL}}" for head, _ in columns))
        found += [f"    {name:{NAME - 2}}" + "".join(f"{cell(present(row, part).get(name), quantity, unit):>{CELL}}"
                                                     for _, row in columns) for name in names]
    return found


def transposed(title: str, columns: Columns, quantity: str, unit: float) -> list[str]:
    """A column for each method: measured here, then published elsewhere, marked by *."""
    names = list(dict.fromkeys((part, name) for part in (HERE, PUBLISHED) for _, row in columns for name in present(row, part)))
    heads = [name.split(",")[0] + "*" if part == PUBLISHED else name for part, name in names]
    widths = [max(len(head) + 2, CELL) for head in heads]
    found = [f"{title:{SHORT_NAME}}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    for title, row in columns:
        found.append(f"  {title:{SHORT_NAME - 2}}" + "".join(f"{cell(present(row, part).get(name), quantity, unit):>{width}}"
                                                             for (part, name), width in zip(names, widths, strict=True)))
    return [*found, "  * published, other hardware"]


def present(row: Row, part: str) -> dict[str, Any]:
    """Who took part here, or has published."""
    return {name: entry for name, entry in dict(row).get(part, {}).items() if entry.get("state") != "absent"}  # type: ignore[attr-defined]


def cell(entry: dict[str, Any] | None, quantity: str, unit: float) -> str:
    """A number; "-" as in the papers where there is none, "wrong" where there must not be one."""
    if entry is None or quantity not in entry:
        return "wrong" if entry and entry.get("state") == "wrong" else "-"
    return number(entry[quantity] * unit)


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def remarks(rows: Sequence[Row]) -> list[str]:
    """Why there are gaps."""
    return [f"  {line}"[:table.WIDTH] for line in table.remarks(rows)]
