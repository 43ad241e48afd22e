"""Results as a picture: a bar for each figure, what is promised as a tick. Needs matplotlib."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tilewise.bench.serving.contest import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {True: "#0072b2", False: "#d55e00", None: "#9ca3af"}      # met or not, Okabe and Ito's; grey: nothing is promised
INK, HEIGHT = "#1f2430", 0.22                                       # HEIGHT: of a bar with its gap, inches


def save(rows: Sequence[Row], path: Path, device: str) -> None:
    """A panel for each quantity. The format is that of the path's suffix."""
    import matplotlib
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[str, Row]]] = {}
    for label, figure in ((f"{row['part']}: {row['case']}", figure) for row in rows for figure in row["figures"]):
        panels.setdefault(figure["quantity"], []).append((f"{label}, {figure['against']}", figure))
    count = sum(map(len, panels.values()))
    picture = Figure(figsize=(11, HEIGHT * count + 0.7 * len(panels) + 0.6), layout="constrained")
    picture.suptitle(f"Tilewise on {device}: median, quartiles, and what is promised (black tick)", color=INK, fontsize=11)
    axes = picture.subplots(len(panels), 1, squeeze=False, height_ratios=[len(of) + 2 for of in panels.values()])[:, 0]
    for (quantity, of), panel in zip(panels.items(), axes, strict=True):
        draw(panel, quantity, of)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tilewise"}):
        picture.savefig(path)


def draw(axes: Axes, quantity: str, of: Sequence[tuple[str, Row]]) -> None:
    """One panel, first figure on top."""
    places = range(len(of), 0, -1)
    for place, (_, figure) in zip(places, of, strict=True):
        low, high = figure["quartiles"]
        axes.barh(place, figure["median"], 0.7, color=COLOURS[figure["met"]])
        axes.plot([low, high], [place, place], color=INK, linewidth=1)
        if figure["bar"] is not None:
            axes.plot([figure["bar"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2.5)
    axes.set_yticks(list(places), [label for label, _ in of], fontsize=7.5)
    axes.set_title(quantity, loc="left", fontsize=10, color=INK)
    axes.set_ylim(0.4, len(of) + 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
