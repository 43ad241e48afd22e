"""Blocks as Markdown, for READMEs and docs: text, tables and, where they are given a folder, pictures."""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
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
        (Path(self.folder) / name).write_text(alone(one.draw(), one.words, one.title), encoding="utf-8")
        return f"![{line(one.title or one.words)}]({self.folder.rstrip('/')}/{name})"


def blocks(found: Sequence[Block], pictures: Pictures | None = None) -> str:
    """Blocks one below the other, pictures that follow one another side by side where there is room."""
    parts: list[str] = []
    for are_pictures, group in groupby(found, key=lambda one: isinstance(one, Picture)):
        of = list(group)
        if pictures and are_pictures:
            parts.append("\n".join(pictures.write(one) for one in of if isinstance(one, Picture)))
        for one in of:
            if pictures and isinstance(one, Heading):
                pictures.under = one.words
            parts += block(one)
    return "\n\n".join(parts)


def block(one: Block) -> Iterator[str]:
    if isinstance(one, Text):
        if not one.detail:
            yield line(one.words)
    elif isinstance(one, Heading):
        yield f"**{line(one.words)}**" + (f", {line(one.note)}" if one.note else "")
    elif isinstance(one, Facts):
        yield table(Table("", [one.title, ""], [list(pair) for pair in one.pairs]))
    else:
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
