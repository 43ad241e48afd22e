"""Results as a picture: errors over kinds of inputs and over length. Needs matplotlib."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tilewise.bench.numerics.table import SHORT, of
from tilewise.bench.record import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, and a marker of its own for each
STYLES = (("#0072b2", "o"), ("#009e73", "s"), ("#d55e00", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"),
          ("#6b7280", "X"))
TENSORS = "out", "dq", "dk"


def save(rows: Sequence[Row], path: Path, device: str) -> None:
    """A row of panels for each dtype: errors of out, dq and dk by kind of inputs, then of out by length."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["part"] in ("inputs", "lengths")]
    dtypes = list(dict.fromkeys(row["setting"]["dtype"] for row in rows))
    names = list(dict.fromkeys(name for row in rows for name, entry in row["contenders"].items() if "rms" in entry))
    styles = dict(zip(names, STYLES * len(names), strict=False))
    picture = Figure(figsize=(13, 2.9 * len(dtypes) + 0.5), layout="constrained")
    picture.suptitle(f"root mean square error over that of the truth in fp64, on {device}", fontsize=10)
    grid = picture.subplots(len(dtypes), len(TENSORS) + 1, squeeze=False, sharey="row")
    for dtype, line in zip(dtypes, grid, strict=True):
        of_dtype = [row for row in rows if row["setting"]["dtype"] == dtype]
        for tensor, axes in zip((*TENSORS, "out"), line, strict=True):
            long = axes is line[-1]
            chosen = [row for row in of_dtype if (row["part"] == "lengths") == long]
            draw(axes, chosen, tensor, styles, long)
            axes.set_title(f"{tensor}, {SHORT[dtype]}" + (", long causal rows" if long else ""), loc="left", fontsize=9)
    grid[0, 0].legend(fontsize=7, frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tilewise"}):
        picture.savefig(path)


def draw(axes: Axes, rows: Sequence[Row], tensor: str, styles: dict[str, tuple[str, str]], long: bool) -> None:
    for name, (colour, marker) in styles.items():
        points = [(row["setting"]["seqlen_k"] if long else place, pair[0] / pair[1])
                  for place, row in enumerate(rows) if (pair := of(row, tensor, name))]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="-" if long else "none", color=colour, marker=marker, markersize=5,
                      markerfacecolor="none", label=name)
    if long:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("keys", fontsize=8)
    else:
        axes.set_xticks(range(len(rows)), [row["setting"]["kind"] for row in rows], rotation=35, ha="right", fontsize=7)
    axes.set_yscale("log")
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
