"""Blocks as Markdown, for READMEs and docs: text, tables and, where they are given a folder, pictures."""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tilewise.pages.svg import alone
from tilewise.report import headline
from tilewise.report.blocks import Block, Cell, Facts, Heading, Picture, Section, Table, Text
from tilewise.report.results import File
from tilewise.report.sections.shared import machines


def whole(files: Sequence[File], sections: Sequence[Section]) -> str:
    """Headlines and all sections."""
    parts = ["# Tilewise, measured", headlines(files), *(f"## {one.title}\n\n{blocks(one.blocks)}" for one in sections)]
    return "\n\n".join(part for part in parts if part) + "\n"


def headlines(files: Sequence[File]) -> str:
    """A list for each machine."""
    found = []
    for machine, of in machines(files).items():
        cards = headline.cards(of)
        if cards:
            found.append("\n".join([f"**{line(machine)}**", "", *(f"* **{line(c.number)}** {line(c.words)}" for c in cards)]))
    return "\n\n".join([*found, headline.RULE] if found else [])


class Pictures:
    """Writes a section's pictures into a folder as SVG files, each named after the section, the machine and its title."""

    def __init__(self, folder: str, section: str):
        self.folder, self.section, self.under = folder, section, ""

    def write(self, one: Picture) -> str:
        """The Markdown that shows it."""
        name = re.sub(r"\W+", "-", f"{self.section} {self.under} {one.title}".lower()).strip("-") + ".svg"
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        (Path(self.folder) / name).write_text(alone(one.draw(), one.words), encoding="utf-8")
        return f"![{line(one.title or one.words)}]({self.folder.rstrip('/')}/{name})"


def blocks(found: Sequence[Block], pictures: Pictures | None = None) -> str:
    return "\n\n".join(part for one in found for part in block(one, pictures))


def block(one: Block, pictures: Pictures | None = None) -> Iterator[str]:
    if isinstance(one, Text):
        yield line(one.words)
    elif isinstance(one, Heading):
        if pictures:
            pictures.under = one.words
        yield f"**{line(one.words)}**"
    elif isinstance(one, Facts):
        yield table(Table("", [one.title, ""], [list(pair) for pair in one.pairs]))
    else:
        if pictures and isinstance(one, Picture):
            yield pictures.write(one)
        found = one.table if isinstance(one, Picture) else one
        if not found.detail:
            yield table(found)


def table(one: Table) -> str:
    lines = [list(one.head), [":--"] + ["--:"] * (len(one.head) - 1), *([cell(c) for c in row] for row in one.rows)]
    return "\n".join(f"| {' | '.join(c if i == 1 else line(c) for c in row)} |" for i, row in enumerate(lines))


def cell(one: Cell | str) -> str:
    return one.text if isinstance(one, Cell) else one


def line(words: str) -> str:
    """Text of a file in one line, in which nothing begins a tag or ends a cell."""
    return " ".join(words.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())
