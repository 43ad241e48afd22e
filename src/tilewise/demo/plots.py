"""The demo's three pictures, as SVG text. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tilewise.demo.results import STANDARD, TILEWISE, Results
from tilewise.pages.svg import BLUE, DARK_BLUE, DARK_ORANGE, GREY, INK, ORANGE, log_ticks, set_ticks, styled, to_svg
from tilewise.pages.words import duration, length, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {STANDARD: ORANGE, TILEWISE: BLUE}
MARKERS = {STANDARD: "s", TILEWISE: "o"}
WORDS = {STANDARD: DARK_ORANGE, TILEWISE: DARK_BLUE}
NAMES = {STANDARD: "standard", TILEWISE: "Tilewise"}


def loss_plot(results: Results) -> str:
    """Both loss curves, one on the other, and below them how far apart they are."""
    from matplotlib.figure import Figure

    steps = [point.step + 1 for point in results.standard]
    pairs = list(zip(results.standard, results.tilewise, strict=True))
    with styled():
        figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot(steps, [a.loss for a, _ in pairs], color=COLOURS[STANDARD], linewidth=5, alpha=0.55)
        above.plot(steps, [b.loss for _, b in pairs], color=COLOURS[TILEWISE], linewidth=1.4)
        middle = len(steps) // 3
        top = max(a.loss for a, _ in pairs[middle:])
        for lift, backend, line in ((0.9, STANDARD, "wide line"), (0.45, TILEWISE, "thin line, on top of it")):
            above.text(steps[middle], top + lift, f"{NAMES[backend]} ({line})", color=WORDS[backend], weight="bold")
        above.set_ylabel("loss, nats per byte")
        apart = [max(abs(a.loss - b.loss), 1e-8) for a, b in pairs]
        below.semilogy(steps, apart, color=INK, linewidth=1.2)
        below.set_ylim(min(apart) / 2, max(apart) * 2)
        set_ticks(below.yaxis, log_ticks(min(apart) / 2, max(apart) * 2, "{:.0e}".format)[::2])
        below.set_ylabel("difference")
        below.set_xlabel("training step")
        return to_svg(figure)


def time_plot(results: Results) -> str:
    """Seconds of a forward and backward pass against context length."""
    return growth_plot(results, "seconds", duration, "forward + backward")


def memory_plot(results: Results) -> str:
    """Peak bytes against context length, with the limit."""
    return growth_plot(results, "bytes", size, "peak memory beyond the inputs")


def growth_plot(results: Results, quantity: str, words: Callable[[float], str], label: str) -> str:
    """A quantity of every row against its length, both axes logarithmic, lines named at their ends."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(5.2, 4.0), layout="constrained")
        axes = figure.subplots()
        lowest, highest = float("inf"), 0.0
        for backend in (STANDARD, TILEWISE):
            rows = results.measured(backend)
            values = [float(max(1e-7, getattr(row, quantity))) for row in rows.values()]
            axes.loglog(list(rows), values, color=COLOURS[backend], marker=MARKERS[backend], markersize=6, linewidth=2)
            # above the end of the line that rises, below the middle of the one that goes on
            at, shift, side = (-1, (-9, 2), "right") if backend == STANDARD else (len(values) // 2, (6, -16), "left")
            axes.annotate(NAMES[backend], (list(rows)[at], values[at]), xytext=shift, textcoords="offset points",
                          ha=side, color=WORDS[backend], weight="bold")
            lowest, highest = min(lowest, *values), max(highest, *values)
        if quantity == "bytes":
            highest = max(highest, results.settings.limit)
            axes.axhline(results.settings.limit, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.annotate("memory limit", (0.02, results.settings.limit), xycoords=("axes fraction", "data"),
                          xytext=(0, 4), textcoords="offset points", color=GREY)
        mark_refusal(axes, results, highest if quantity == "seconds" else results.settings.limit)
        axes.set_ylim(lowest / 2, highest * 3)
        set_ticks(axes.yaxis, log_ticks(lowest / 2, highest * 3, words))
        set_ticks(axes.xaxis, [(n, length(n)) for n in sorted({row.length for row in results.rows})[::2]])
        axes.set_title(label, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("context length, tokens")
        return to_svg(figure)


def mark_refusal(axes: Axes, results: Results, height: float) -> None:
    """A cross where standard attention was refused."""
    at = results.refused(STANDARD)
    if at:
        axes.plot([at], [height], color=COLOURS[STANDARD], marker="x", markersize=10, markeredgewidth=3)
        axes.annotate("out of memory", (at, height), xytext=(0, 10), textcoords="offset points",
                      ha="center", color=WORDS[STANDARD])
