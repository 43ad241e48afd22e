"""The report's pictures, as SVG text: curves over sequence length or density, and the roofline. Needs matplotlib."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tilewise.pages.svg import BYTES, GREY, INK, SECONDS, SERIES, styled, to_svg
from tilewise.pages.words import length
from tilewise.report.names import kind, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))      # apart in black and white too
SIZE = (5.2, 4.0)       # inches; a phone shows them at two thirds of that


class Look(NamedTuple):
    colour: str
    marker: str
    dash: str | tuple
    width: float


class Curve(NamedTuple):
    """A contender's points, in order; crosses: where it was refused."""
    name: str
    points: Sequence[tuple[float, float]]
    crosses: Sequence[float] = ()


class Guide(NamedTuple):
    """A line that nobody drew by running: what is ideal, or what the machine can do."""
    words: str
    points: Sequence[tuple[float, float]]


def looks(names: Sequence[str]) -> dict[str, Look]:
    """One look for each name, the same in every picture for the same names: ours first, then standard attention."""
    order = [n for n in names if kind(n) == "ours"] + [n for n in names if kind(n) == "standard"] \
        + [n for n in names if kind(n) in ("peer", "ruler")]
    found, free = {}, [0, *range(2, len(SERIES))]
    for name in dict.fromkeys(order):
        if kind(name) == "standard":
            found[name] = Look(SERIES[1], MARKERS[1], DASHES[1], 1.8)
            continue
        place = len([n for n in found if kind(n) != "standard"])
        colour = free[place % len(free)]
        found[name] = Look(SERIES[colour], MARKERS[colour], DASHES[0 if place == 0 else (1 + place) % len(DASHES)],
                           2.8 if place == 0 else 1.6)
    return found


def curves(drawn: Sequence[Curve], look: dict[str, Look], *, x: str, y: str, guides: Sequence[Guide] = (),
           ticks: str = "plain", log_y: bool = True, lengths: bool = True) -> str:
    """Curves over a logarithmic x. ticks: "seconds", "bytes" or "plain"; lengths: x counts tokens."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        if log_y:
            axes.set_yscale("log")
        values = [v for one in (*drawn, *guides) for _, v in one.points]
        low, high = min(values), max(values)
        for one in reversed(drawn):         # ours on top
            style = look[one.name]
            axes.plot(*zip(*one.points, strict=True), color=style.colour, marker=style.marker, linestyle=style.dash,
                      linewidth=style.width, markersize=6.5, label=title(one.name)) if one.points else None
        top = high * 1.6 if log_y else high * 1.08
        for one in drawn:
            for place in one.crosses:
                axes.plot([place], [top], color=look[one.name].colour, marker="x", markersize=9, markeredgewidth=2.5,
                          linestyle="none", clip_on=False)
        for guide in guides:
            axes.plot(*zip(*guide.points, strict=True), color=GREY, linestyle=(0, (2, 2)), linewidth=1.4, label=guide.words)
        axes.set_ylim((low / 1.6, top) if log_y else (0, top))
        set_ticks(axes, [v for one in drawn for v, _ in one.points] + [v for one in drawn for v in one.crosses], ticks,
                  low / 1.6, top, lengths)
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", fontsize=11, color=INK)
        add_legend(axes, figure)
        return to_svg(figure)


def set_ticks(axes: Axes, places: Sequence[float], kind: str, low: float, high: float, lengths: bool) -> None:
    """Words at the measured lengths or densities, and at round numbers above one another."""
    shown = sorted(set(places))
    shown = shown[:: -(-len(shown) // 7)]
    axes.set_xticks(shown, [length(n) if lengths else f"{n:.3g}" for n in shown])
    if kind != "plain":
        wanted = [t for t in (SECONDS if kind == "seconds" else BYTES) if low <= t[0] <= high]
        if len(wanted) > 1:
            axes.set_yticks([v for v, _ in wanted], [words for _, words in wanted])
    axes.minorticks_off()


def add_legend(axes: Axes, figure) -> None:
    """Names below the picture, ours first."""
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: (not names[i].startswith("Tilewise"), names[i] != "standard attention"))
    figure.legend([handles[i] for i in order], [names[i] for i in order], loc="outside lower center", ncols=min(3, len(names)),
                  fontsize=9.5, handlelength=2.6, columnspacing=1.2)


class Roof(NamedTuple):
    """What a device can do: FLOP/s in 10^12, bytes/s in 10^9."""
    words: str
    tflops: float
    gb_per_s: float


def roofline(points: dict[str, list[tuple[float, float]]], roofs: Sequence[Roof], look: dict[str, Look]) -> str:
    """FLOP per byte against FLOP/s in 10^12, with the roofs; Williams, Waterman and Patterson 2009."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        places = [x for of in points.values() for x, _ in of]
        left, right = min(places) / 3, max(*places, *(1e3 * r.tflops / r.gb_per_s for r in roofs)) * 3
        lowest = min(y for of in points.values() for _, y in of) / 3
        for i, roof in enumerate(roofs):
            knee = 1e3 * roof.tflops / roof.gb_per_s
            axes.loglog([left, knee, right], [left * roof.gb_per_s / 1e3, roof.tflops, roof.tflops], color=INK,
                        linestyle=DASHES[i % len(DASHES)], linewidth=1.6)
            axes.annotate(roof.words, (right, roof.tflops), xytext=(-2, 4), textcoords="offset points", ha="right", fontsize=9.5)
        for name in reversed(list(points)):
            axes.loglog(*zip(*points[name], strict=True), color=look[name].colour, marker=look[name].marker, markersize=7,
                        linestyle="none", label=title(name))
        axes.set_xlim(left, right)
        axes.set_ylim(lowest, 3 * max(r.tflops for r in roofs))
        axes.set_xlabel("FLOP per byte of memory traffic")
        axes.set_title("TFLOP/s", loc="left", fontsize=11, color=INK)
        axes.minorticks_off()
        add_legend(axes, figure)
        return to_svg(figure)
