"""The report's pictures, as SVG text: curves over sequence length or density, and the roofline. Needs matplotlib."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from tilewise.pages.svg import GREY, INK, SERIES, log_ticks, set_ticks, styled, to_svg
from tilewise.pages.words import digits, length
from tilewise.report.names import kind, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Words = Callable[[float], str]
MARKERS = "osD^vP*X"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))      # apart in black and white too
USUAL = ("tilewise", "standard", "sdpa flash", "sdpa cudnn", "flex", "flash_attn", "sdpa efficient", "sdpa math")
WIDTH, HEIGHT, LINE = 4.6, 3.2, 0.21        # inches, of a picture, its part above the legend, a line of that
COLUMNS, HANDLE, LETTER = 3, 0.55, 0.067    # of the legend, at most; inches that a line's sample and a letter take there
MOST_TICKS = 9                              # that would find room side by side


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
    """One look for each name, ours first, then standard attention: of the usual names everywhere the same."""
    order = sorted(dict.fromkeys(names), key=lambda name: ("ours", "standard", "peer", "ruler").index(kind(name)))
    found: dict[str, Look] = {}
    taken = [USUAL.index(name) for name in order if name in USUAL]
    for name in order:
        if name not in USUAL:
            taken.append(next(i for i in range(2, 1000) if i not in taken))
        place = USUAL.index(name) if name in USUAL else taken[-1]
        colour = place if place < len(SERIES) else 2 + place % (len(SERIES) - 2)
        found[name] = Look(SERIES[colour], MARKERS[(place + place // len(MARKERS)) % len(MARKERS)], DASHES[place % len(DASHES)],
                           2.8 if place == 0 else 1.6)
    return found


def curves(drawn: Sequence[Curve], look: dict[str, Look], *, x: str, y: str, words: Words, guides: Sequence[Guide] = (),
           log_y: bool = True, lengths: bool = True) -> str:
    """Curves over a logarithmic x. words: of numbers on the y axis; lengths: x counts tokens."""
    with styled():
        refused = any(curve.crosses for curve in drawn)
        figure, axes = canvas([title(name) for name in look if any(curve.name == name for curve in drawn)]
                              + [guide.words for guide in guides] + ["refused"] * refused)
        values = [v for points in (*(c.points for c in drawn), *(g.points for g in guides)) for _, v in points]
        low, high = min(values) / 1.5, max(values) * (1.6 if log_y else 1.08)
        for depth, one in enumerate(reversed(drawn)):       # ours on top
            style = look[one.name]
            axes.plot(*zip(*one.points, strict=True), color=style.colour, marker=style.marker, linestyle=style.dash,
                      markersize=6.5, linewidth=style.width, zorder=3 + depth, clip_on=False, label=title(one.name))
            axes.plot(one.crosses, [high] * len(one.crosses), color=style.colour, marker="x", markersize=9, markeredgewidth=2.5,
                      linestyle="none", clip_on=False)
        for guide in guides:
            axes.plot(*zip(*guide.points, strict=True), color=GREY, linestyle=(0, (2, 2)), linewidth=1.4, label=guide.words)
        if refused:
            axes.plot([], [], color=GREY, marker="x", markersize=8, markeredgewidth=2.5, linestyle="none", label="refused")
        axes.set_xscale("log", base=2)
        if log_y:
            axes.set_yscale("log")
            set_ticks(axes.yaxis, log_ticks(low, high, words))
        axes.set_ylim(low if log_y else 0, high)
        places = sorted({place for one in drawn for place in (*(v for v, _ in one.points), *one.crosses)})
        set_ticks(axes.xaxis, [(v, length(v) if lengths or v >= 1000 else f"{v:.3g}") for v in apart(places)])
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", fontsize=11, color=INK)
        add_legend(axes, figure, [title(name) for name in look])
        return to_svg(figure)


def apart(places: Sequence[float]) -> list[float]:
    """Those of the ascending places whose words do not run into each other on a logarithmic axis."""
    found = list(places[:1])
    for place in places[1:]:
        if math.log(place / found[-1]) > math.log(places[-1] / places[0]) / MOST_TICKS:
            found.append(place)
    return found


def canvas(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with room for so many names below its axes; all have their axes at the same place."""
    from matplotlib.figure import Figure

    height = HEIGHT + LINE * -(-len(names) // columns(names))
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.8 / WIDTH, 1 - (HEIGHT - 0.6) / height, 1 - 1.0 / WIDTH, (HEIGHT - 0.9) / height))
    return figure, axes


def columns(names: Sequence[str]) -> int:
    """As many as find room side by side; matplotlib fills one after another."""
    for count in range(min(COLUMNS, len(names)), 1, -1):
        lines, left = divmod(len(names), count)
        ends = [0, *accumulate(lines + (i < left) for i in range(count))]
        if sum(HANDLE + LETTER * max(map(len, names[a:b])) for a, b in pairwise(ends)) <= WIDTH:
            return count
    return 1


def add_legend(axes: Axes, figure: Figure, order: Sequence[str]) -> None:
    """Names below the picture, in this order, then all others."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [name for name in order if name in found] + [name for name in found if name not in order]
    figure.legend([found[name] for name in names], names, loc="lower center", ncols=columns(names), fontsize=9.5,
                  handlelength=2.3, columnspacing=1.0, borderaxespad=0.1)


class Roof(NamedTuple):
    """What a device can do: FLOP/s and bytes/s."""
    words: str
    flops: float
    bandwidth: float


def roofline(points: dict[str, list[tuple[float, float]]], roof: Roof, look: dict[str, Look]) -> str:
    """FLOP per byte against FLOP/s, with the roof; Williams, Waterman and Patterson 2009."""
    with styled():
        figure, axes = canvas([*map(title, points), roof.words])
        knee, (unit, scale) = roof.flops / roof.bandwidth, ("TFLOP/s", 1e12) if roof.flops >= 1e12 else ("GFLOP/s", 1e9)
        places = [x for of in points.values() for x, _ in of]
        left, right = min(*places, knee) / 3, max(*places, knee) * 3
        reached = [y / scale for of in points.values() for _, y in of]
        lowest, highest = min(reached) / 3, 2 * max(*reached, roof.flops / scale)
        axes.loglog([left, knee, right], [y / scale for y in (left * roof.bandwidth, roof.flops, roof.flops)], color=INK,
                    linewidth=1.6, label=roof.words)
        for name in reversed(list(points)):
            axes.loglog([x for x, _ in points[name]], [y / scale for _, y in points[name]], color=look[name].colour,
                        marker=look[name].marker, markersize=7, linestyle="none", label=title(name))
        axes.set_xlim(left, right)
        axes.set_ylim(lowest, highest)
        axes.set_xlabel("FLOP per byte of memory traffic")
        axes.set_title(unit, loc="left", fontsize=11, color=INK)
        set_ticks(axes.xaxis, log_ticks(left, right, digits))
        set_ticks(axes.yaxis, log_ticks(lowest, highest, digits))
        add_legend(axes, figure, [title(name) for name in look])
        return to_svg(figure)
