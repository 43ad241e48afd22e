"""Pictures: matplotlib's figures as SVG text, alone or inside a page whose colours they follow. Needs matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from tilewise.pages import COLOURS
from tilewise.pages.words import size

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, GREY, GRID = "#1f2430", "#5c6370", "#e3e6ea"
BLUE, ORANGE = "#0072b2", "#d55e00"     # Okabe and Ito: apart for every kind of colour vision
DARK_BLUE, DARK_ORANGE = "#005b94", "#a84300"       # the same, dark enough for letters
SERIES = (BLUE, ORANGE, "#009e73", "#cc79a7", "#a87400", "#56b4e9", "#7a5195", "#4d4d4d")
# What each colour is called in style.css, where it has another value on dark screens.
NAMES = {INK: "ink", GREY: "soft", GRID: "line", DARK_BLUE: "blue", DARK_ORANGE: "bad",
         **{colour: f"series-{i}" for i, colour in enumerate(SERIES)}}
SHOWN, TITLE = 400, 20          # width of a picture in a file of its own, in pixels; height of its title, in points
STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"], "font.size": 11,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "text.parse_math": False,           # a dollar sign in a name is a dollar sign
    "svg.fonttype": "none", "svg.hashsalt": "tilewise",
}


@contextmanager
def styled() -> Iterator[None]:
    """Figures made and saved inside have the look of our pages."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the page's plots need matplotlib: pip install 'tilewise[plots]'") from error
    with matplotlib.rc_context(STYLE):
        yield


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def log_ticks(low: float, high: float, words: Callable[[float], str]) -> list[tuple[float, str]]:
    """Round numbers between two others with what they are called: at most 7 and, where there is room for them, at least 3.

    Round are 1, 2 and 5 times powers of 10; of bytes (words = `size`) powers of 2.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    finest = [float(f"{m}e{d}") for d in decades for m in (1, 2, 5)]
    choices = [finest[::9], finest[::6], finest[::3], finest]
    if words is size:
        finest = [2.0**p for p in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
        choices = [[v for v in finest if math.log2(v) % step == 0] for step in (6, 4, 2, 1)]
    inside = [[v for v in choice if low <= v <= high] for choice in choices]
    chosen = max((found for found in inside if len(found) <= 7), key=len, default=inside[0])
    return [(v, words(v)) for v in chosen]


def set_ticks(axis: Axis, ticks: Sequence[tuple[float, str]]) -> None:
    """These and no others."""
    axis.set_ticks([v for v, _ in ticks], [words for _, words in ticks])
    axis.set_ticks([], minor=True)


def inline(svg: str, name: str, words: str) -> str:
    """An SVG as part of a page: `words` say what it shows, its ids begin with `name`, its colours are the page's."""
    view, body = _parts(svg, name)
    return f'<svg viewBox="{view}" role="img" aria-label="{escape(words)}">{body}</svg>'


def alone(svg: str, words: str, title: str = "") -> str:
    """An SVG as a file, whose colours follow light and dark screens too; on ground of its own, since a page around it may not.
    title: stands above it."""
    view, body = _parts(svg, "p")
    left, top, width, height = map(float, view.split())
    if title:
        top, height = top - TITLE, height + TITLE
        body = f'<text x="{left + 8:g}" y="{top + 15:g}" class="title">{escape(title)}</text>{body}'
    style = (f"{COLOURS}* {{ stroke-linejoin: round; stroke-linecap: butt; }}"
             " .title { font: 600 11px Helvetica, Arial, sans-serif; fill: var(--ink); } .ground { fill: var(--paper); }")
    place = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:g} {top:g} {width:g} {height:g}" '
            f'width="{SHOWN}" height="{SHOWN * height / width:.0f}" role="img" aria-label="{escape(words)}">'
            f'<style>{style}</style><rect {place} rx="6" class="ground"/>{body}</svg>\n')


def _parts(svg: str, name: str) -> tuple[str, str]:
    """The view box and what is in it, with ids that begin with `name` and colours by name."""
    found = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, re.DOTALL)
    assert found is not None
    body = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<defs>\s*</defs>", "", found[2], flags=re.DOTALL)
    body = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    return found[1], re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _follow, body)


def _follow(found: re.Match[str]) -> str:
    name = NAMES.get(found[2])
    return f"{found[1]}: var(--{name})" if name else found[0]
