"""Pictures: matplotlib's figures as SVG text, alone or inside a page whose colours they follow. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY, GRID = "#1f2430", "#5c6370", "#e3e6ea"
BLUE, ORANGE = "#0072b2", "#d55e00"     # Okabe and Ito: apart for every kind of colour vision
SERIES = (BLUE, ORANGE, "#009e73", "#cc79a7", "#a87400", "#56b4e9", "#7a5195", "#4d4d4d")
# What each colour is called in style.css, where it has another value on dark screens.
NAMES = {INK: "ink", GREY: "soft", GRID: "line", "#005b94": "series-0", "#a84300": "series-1",
         **{colour: f"series-{i}" for i, colour in enumerate(SERIES)}}
STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"], "font.size": 11,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "text.parse_math": False,           # a dollar sign in a name is a dollar sign
    "svg.fonttype": "none", "svg.hashsalt": "tilewise",
}
SECONDS = [(10.0**power, word) for power, word in
           zip(range(-7, 4), ("0.1 µs", "1 µs", "10 µs", "0.1 ms", "1 ms", "10 ms", "0.1 s", "1 s", "10 s", "100 s", "1000 s"),
               strict=True)]
BYTES = [(2.0**power, f"{2 ** (power % 10)} {'KMGT'[power // 10 - 1]}iB") for power in range(10, 50, 2)]


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


def inline(svg: str, name: str, words: str) -> str:
    """An SVG as part of a page: `words` say what it shows, its ids begin with `name`, its colours are the page's."""
    found = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, re.DOTALL)
    assert found is not None
    body = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<defs>\s*</defs>", "", found[2], flags=re.DOTALL)
    body = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _follow, body)
    return f'<svg viewBox="{found[1]}" role="img" aria-label="{escape(words)}">{body}</svg>'


def _follow(found: re.Match[str]) -> str:
    name = NAMES.get(found[2])
    return f"{found[1]}: var(--{name})" if name else found[0]
