"""The report as one HTML file that needs nothing else, for screens, phones and paper; and the same tables as Markdown."""
from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from tilewise.pages import STYLE
from tilewise.report import headline, html, markdown, sections
from tilewise.report.blocks import Section
from tilewise.report.headline import Card
from tilewise.report.results import File, read
from tilewise.report.sections.shared import machines, origin

FOLDER = Path(__file__).parent
TEMPLATE = Template((FOLDER / "page.html").read_text(encoding="utf-8"))


def write(files: Sequence[Path], folder: Path) -> Path:
    """Writes index.html and report.md into `folder`, from result files of `tilewise bench --out`; returns the page's path.

    Raises ValueError, which names the file, where one is not such a result, is given twice or measures what another does;
    OSError where one cannot be read or the folder not be written; ImportError without matplotlib (extra `plots`).
    """
    found = read([Path(path) for path in files])
    page, text = render(found), markdown.whole(found, sections.build(found))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def render(files: Sequence[File]) -> str:
    """The page as text."""
    found = sections.build(files)
    return TEMPLATE.substitute(
        style=STYLE + (FOLDER / "page.css").read_text(encoding="utf-8"),
        machines=" and ".join(f"<b>{escape(machine)}</b>" for machine in machines(files)),
        notes="".join(f'<p class="note">{escape(words)}</p>\n' for words in notes(files)),
        headlines=headlines(files), contents=contents(found), sections="".join(html.section(one) for one in found),
        missing=missing(found, files),
    )


def notes(files: Sequence[File]) -> list[str]:
    """What a reader must know before any number."""
    unfinished = [file.name for file in files if not file.complete]
    quick = [file.name for file in files if file.quick]
    return [f"Unfinished, with only some of the cases: {', '.join(unfinished)}."] * bool(unfinished) \
        + [f"Quick runs, on shapes too small to tell about speed: {', '.join(quick)}."] * bool(quick)


def headlines(files: Sequence[File]) -> str:
    """Cards for each machine, the last of them for what is lost there."""
    found = []
    for machine, of in machines(files).items():
        cards = headline.cards(of)
        if cards:
            items = "".join(card(one) for one in [*cards, headline.lost(of)])
            found.append(f'<h2 class="machine">On {escape(machine)}</h2>\n<p class="soft">{escape(origin(of))}</p>\n'
                         f'<ul class="cards">\n{items}</ul>\n')
    return "".join(found) + f'<p class="soft">{escape(headline.RULE)}</p>\n' if found else ""


def card(one: Card) -> str:
    tone = f' class="{one.tone}"' if one.tone else ""
    return f"<li{tone}><strong>{escape(one.number)}</strong> {escape(one.words)}</li>\n"


def contents(found: Sequence[Section]) -> str:
    return "".join(f'<li><a href="#{one.slug}">{escape(one.title)}</a></li>\n' for one in found)


def missing(found: Sequence[Section], files: Sequence[File]) -> str:
    """What these files say nothing about, and the command for it."""
    items = "".join(f"<li>{escape(title)}: <code>{escape(command)}</code></li>\n"
                    for title, command in sections.missing(found, files))
    if not items:
        return ""
    return f'<section id="missing">\n<h2>Not in these files</h2>\n<ul class="missing">\n{items}</ul>\n</section>\n'
