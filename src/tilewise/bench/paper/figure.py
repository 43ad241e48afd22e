"""FlashAttention's figure 3: runtime (table 11) and memory (table 21) over N, measured here and published. Needs matplotlib."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tilewise.bench.paper import tables
from tilewise.bench.paper.flash_attention import TITLE, table_of
from tilewise.bench.record import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours; each method has a marker of its own, and what is published is dashed.
STYLES = {"tilewise": ("#0072b2", "o"), "tilewise block-sparse": ("#009e73", "s"), "standard": ("#d55e00", "^"),
          "sdpa": ("#cc79a7", "D"), "flex": ("#e69f00", "v")}
PUBLISHED = {"FlashAttention": ("#0072b2", "o"), "BlockSparseFlash": ("#009e73", "s"), "PyTorch": ("#d55e00", "^"),
             "Linformer": ("#6b7280", "P")}
PANELS = (11, "seconds", 1000, "forward + backward, dropout, padding mask: ms"), (21, "bytes", 2**-20, "memory: MB")


def save(rows: Sequence[Row], path: Path, device: str) -> None:
    """Two panels. The format is that of the path's suffix."""
    import matplotlib
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 4.6), layout="constrained")
    picture.suptitle(f"FlashAttention's figure 3: {device} (solid), A100, batch 16, 8 heads (dashed)", fontsize=10)
    for axes, (table, quantity, unit, title) in zip(picture.subplots(1, 2), PANELS, strict=True):
        draw(axes, [row for row in rows if row["part"] == TITLE and table_of(row) == table], quantity, unit)
        axes.set_title(title, loc="left", fontsize=9)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tilewise"}):
        picture.savefig(path)


def draw(axes: Axes, rows: Sequence[Row], quantity: str, unit: float) -> None:
    for part, styles, line in ((tables.HERE, STYLES, "-"), (tables.PUBLISHED, PUBLISHED, "--")):
        for name, (colour, marker) in styles.items():
            points = [(row["setting"]["seqlen"], entry[quantity] * unit) for row in rows
                      for who, entry in tables.present(row, part).items() if who.split(",")[0] == name and quantity in entry]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), line, color=colour, marker=marker, markersize=4,
                          markerfacecolor=colour if line == "-" else "white", linewidth=1.3,
                          label=name if line == "-" else f"{name}, A100")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("N", fontsize=9)
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=7, frameon=False)
