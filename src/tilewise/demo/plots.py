"""The demo's three pictures, as SVG text. Needs matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from tilewise.demo.results import STANDARD, TILEWISE, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY = "#1f2430", "#6b7280"
COLOURS = {STANDARD: "#d55e00", TILEWISE: "#0072b2"}    # Okabe and Ito: apart for every kind of colour vision
MARKERS = {STANDARD: "s", TILEWISE: "o"}
WORDS = {STANDARD: "#a84300", TILEWISE: "#005b94"}      # the same, dark enough for letters
NAMES = {STANDARD: "standard", TILEWISE: "Tilewise"}
STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"], "font.size": 11,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb",
    "svg.fonttype": "none", "svg.hashsalt": "tilewise",
}
SECONDS = [(1e-6, "1 µs"), (1e-5, "10 µs"), (1e-4, "0.1 ms"), (1e-3, "1 ms"), (1e-2, "10 ms"), (0.1, "0.1 s"),
           (1.0, "1 s"), (10.0, "10 s"), (100.0, "100 s")]
BYTES = [(2.0 ** power, f"{2 ** (power % 10)} {'KMGT'[power // 10 - 1]}iB") for power in range(10, 50, 2)]


def loss_plot(results: Results) -> str:
    """Both loss curves, one on the other, and below them how far apart they are."""
    import matplotlib
    from matplotlib.figure import Figure

    steps = [point.step + 1 for point in results.standard]
    pairs = list(zip(results.standard, results.tilewise, strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot(steps, [a.loss for a, _ in pairs], color=COLOURS[STANDARD], linewidth=5, alpha=0.55)
        above.plot(steps, [b.loss for _, b in pairs], color=COLOURS[TILEWISE], linewidth=1.4)
        middle = len(steps) // 3
        top = max(a.loss for a, _ in pairs[middle:])
        for lift, backend, line in ((0.9, STANDARD, "wide line"), (0.45, TILEWISE, "thin line, on top of it")):
            above.text(steps[middle], top + lift, f"{NAMES[backend]} ({line})", color=WORDS[backend], weight="bold")
        above.set_ylabel("loss, nats per byte")
        below.semilogy(steps, [max(abs(a.loss - b.loss), 1e-8) for a, b in pairs], color=INK, linewidth=1.2)
        below.set_ylabel("difference")
        below.set_xlabel("training step")
        return to_svg(figure)


def time_plot(results: Results) -> str:
    """Seconds of a forward and backward pass against context length."""
    return growth_plot(results, "seconds", SECONDS, "forward + backward")


def memory_plot(results: Results) -> str:
    """Peak bytes against context length, with the limit."""
    return growth_plot(results, "bytes", BYTES, "peak memory beyond the inputs")


def growth_plot(results: Results, quantity: str, ticks: list[tuple[float, str]], label: str) -> str:
    """A quantity of every row against its length, both axes logarithmic, lines named at their ends."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
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
        set_ticks(axes, results, [tick for tick in ticks if lowest / 2 <= tick[0] <= highest * 3])
        axes.set_title(label, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("context length, tokens")
        return to_svg(figure)


def mark_refusal(axes: Axes, results: Results, height: float) -> None:
    """A cross where standard attention was refused."""
    length = results.refused(STANDARD)
    if length:
        axes.plot([length], [height], color=COLOURS[STANDARD], marker="x", markersize=10, markeredgewidth=3)
        axes.annotate("out of memory", (length, height), xytext=(0, 10), textcoords="offset points",
                      ha="center", color=WORDS[STANDARD])


def set_ticks(axes: Axes, results: Results, ticks: list[tuple[float, str]]) -> None:
    """Words at a few round numbers on both axes."""
    lengths = sorted({row.length for row in results.rows})[::2]
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.set_yticks([value for value, _ in ticks], [word for _, word in ticks])
    axes.minorticks_off()


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
