"""Pictures of masks."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilewise.masks import Mask

COLOURS = ("#f4f4f2", "#f2b134", "#2a6f97")     # hidden, visible in a partial tile, visible in a full tile


def save_mask_png(mask: Mask, path: str | Path, seqlen_q: int, seqlen_k: int, tile: int, batch: int, head: int) -> None:
    """Draws the elements of one sequence and head, coloured by the class of their tile, with the tiles' grid."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'tilewise[plots]'") from error
    visible = mask.dense(batch, head + 1, seqlen_q, seqlen_k)[batch - 1, head]
    classes = mask.classify(batch, head + 1, seqlen_q, seqlen_k, tile, tile)[batch - 1, head]
    full = (classes == 2).repeat_interleave(tile, 0)[:seqlen_q].repeat_interleave(tile, 1)[:, :seqlen_k]
    figure = Figure(figsize=(6, 0.9 + 5.6 * seqlen_q / seqlen_k), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = (visible.int() + (visible & full).int()).numpy()
    axes.imshow(shown, cmap=ListedColormap(COLOURS), vmin=0, vmax=2, interpolation="nearest")
    axes.set_xticks([x - 0.5 for x in range(tile, seqlen_k, tile)], [])
    axes.set_yticks([y - 0.5 for y in range(tile, seqlen_q, tile)], [])
    axes.grid(color="#9a9a98", linewidth=0.5)
    axes.tick_params(length=0)
    axes.set_xlabel(f"{seqlen_k} keys")
    axes.set_ylabel(f"{seqlen_q} queries")
    axes.set_title(repr(mask), fontsize=11)
    shares = [int((classes == kind).sum()) / max(1, classes.numel()) for kind in range(3)]
    names = ("tiles skipped", "tiles with the mask", "tiles without a mask")
    axes.legend(handles=[Patch(facecolor=c, edgecolor="#9a9a98", label=f"{name} {share:.0%}")
                         for c, name, share in zip(COLOURS, names, shares, strict=True)],
                loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight")
