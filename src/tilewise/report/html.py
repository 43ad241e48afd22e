"""Blocks as HTML. Every string of a file is escaped here."""
from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from itertools import groupby

from tilewise.pages.svg import inline
from tilewise.report.blocks import Block, Cell, Facts, Heading, Picture, Section, Table, Text
from tilewise.report.results import STATES

NUMBERLIKE = ("", "–", "NaN", "inf", *STATES)       # what stands where a number would


def section(one: Section) -> str:
    """A section with its address."""
    return f'<section id="{one.slug}">\n<h2>{escape(one.title)}</h2>\n{blocks(one.blocks, one.slug)}</section>\n'


def blocks(found: Sequence[Block], name: str) -> str:
    """Blocks one after another, pictures that follow one another side by side. name: begins the ids inside pictures."""
    parts = []
    for are_pictures, group in groupby(enumerate(found), key=lambda item: isinstance(item[1], Picture)):
        html = "".join(block(one, f"{name}-{i}") for i, one in group)
        parts.append(f'<div class="pair">\n{html}</div>\n' if are_pictures else html)
    return "".join(parts)


def block(one: Block, name: str) -> str:
    if isinstance(one, Picture):
        return picture(one, name)
    if isinstance(one, Table):
        return table(one)
    if isinstance(one, Facts):
        pairs = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in one.pairs)
        return f"<h3>{escape(one.title)}</h3>\n<dl>{pairs}</dl>\n"
    if isinstance(one, Heading):
        return f"<h{one.level}>{escape(one.words)}</h{one.level}>\n"
    return f'<p{f" class={one.tone}" if one.tone else ""}>{text(one)}</p>\n'


def text(one: Text) -> str:
    """Words in backquotes are code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(one.words))


def picture(one: Picture, name: str) -> str:
    title = f"<figcaption>{escape(one.title)}</figcaption>\n" if one.title else ""
    return f"<figure>\n{title}{inline(one.draw(), name, one.words)}\n{table(one.table)}</figure>\n"


def table(one: Table) -> str:
    """In a box of its own that scrolls where the screen is narrow."""
    words = [is_words([row[i] for row in one.rows]) for i in range(len(one.head))]
    head = "".join(f"<th scope=col{' class=w' if w else ''}>{escape(name)}</th>"
                   for name, w in zip(one.head, words, strict=True))
    body = "\n".join("<tr>" + "".join(cell(c, i == 0, words[i]) for i, c in enumerate(row)) + "</tr>" for row in one.rows)
    caption = f"<caption>{escape(one.caption)}</caption>\n" if one.caption and not one.folded else ""
    html = (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(one.caption)}"><table>\n{caption}'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n")
    if not one.folded:
        return html
    return f"<details{'' if one.detail else ' class=paper'}><summary>{escape(one.folded)}</summary>\n{html}</details>\n"


def is_words(column: Sequence[Cell | str]) -> bool:
    """Whether a column is read rather than compared: most of what it says begins with a letter, or may be long."""
    if any(isinstance(c, Cell) and c.tone == "long" for c in column):
        return True
    said = {c.text if isinstance(c, Cell) else c for c in column}
    if said <= set(STATES):
        return True
    texts = [t for t in said if t not in NUMBERLIKE]
    return sum(t[0].isalpha() and not t.startswith("at ") for t in texts) * 2 > len(texts)


def cell(one: Cell | str, first: bool, words: bool) -> str:
    found = one if isinstance(one, Cell) else Cell(one)
    classes = " ".join([*["w"] * (words or found.tone == "long"), *[found.tone] * bool(found.tone)])
    bar = "" if found.bar is None else f'<span class="bar"><span style="width:{100 * found.bar:.0f}%"></span></span>'
    attributes = f' class="{classes}"' if classes else ""
    if first:
        return f"<th scope=row{attributes}>{escape(found.text)}</th>"
    return f"<td{attributes}>{escape(found.text)}{bar}</td>"
