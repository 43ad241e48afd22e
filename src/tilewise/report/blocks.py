"""What a section is made of, before it is HTML or Markdown."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """A table's cell. tone: "good", "bad", "published", "long" (it may take several lines) or nothing; bar: how full the bar
    below its text is, 0 to 1."""
    text: str
    tone: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Text:
    """A paragraph. `code` in backquotes. detail: the page alone has it."""
    words: str
    tone: str = ""
    detail: bool = False


@dataclass(frozen=True)
class Heading:
    """level: 3 for a machine, 4 below it. note: what else a table of its own, without the page, has to say."""
    words: str
    level: int = 3
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A row's first cell names it. folded: the page shows it on request only, under these words;
    detail: only there, neither on paper nor in Markdown."""
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    folded: str = ""
    detail: bool = False


@dataclass(frozen=True)
class Picture:
    """words: what it shows, for who cannot see it; table: the same as numbers. draw() gives SVG."""
    title: str
    words: str
    draw: Callable[[], str]
    table: Table


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""
    title: str
    pairs: Sequence[tuple[str, str]]


Block = Text | Heading | Table | Picture | Facts


@dataclass(frozen=True)
class Section:
    """slug: its name on the command line and in the page's address."""
    slug: str
    title: str
    blocks: Sequence[Block]
