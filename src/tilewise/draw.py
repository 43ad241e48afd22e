"""Pictures of masks."""
from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from torch import Tensor

from tilewise.masks import Mask
from tilewise.trace.bounds import FULL
from tilewise.trace.checks import check_indices
from tilewise.trace.graph import lower, wrap

COLOURS = ("#f4f4f2", "#f2b134", "#2a6f97")     # hidden, visible in a partial tile, visible in a full tile
DOTS = 800                                      # of a picture, on a side
LINES = 128                                     # more tiles than this on a side have no room for lines between them


def of_one_head(mask: Mask, batch: int, head: int) -> Mask:
    """The mask of one sequence and head: the same for every other, its tensors on the CPU.

    To draw or to classify it costs the same whichever head it is.
    """
    chosen = {"b": wrap(batch), "h": wrap(head)}
    return mask.to("cpu").rewritten(lambda leaf: chosen.get(leaf.value, leaf) if leaf.op == "var" else leaf)


def check_lengths(mask: Mask, seqlen_q: int, seqlen_k: int) -> None:
    """Raises a ValueError where the mask reads beyond its tensors, or beyond 32 bits, in sequences of these lengths."""
    program = lower([[], [], [mask.element]])
    captured = [expr.args[0].value for expr in program.loads]
    names = [next(c.name for c in captured if c.tensor is tensor) for tensor in program.captured]
    sizes = dict(b=1, h=1, q=seqlen_q, p=seqlen_q, k=seqlen_k, nq=seqlen_q, nk=seqlen_k)
    try:
        check_indices(program.text, program.captured, program.ints, program.floats, names, sizes)
    except (IndexError, OverflowError) as error:
        words = str(error).partition(": clamp it")[0]       # advice for those who write functions
        raise ValueError(f"mask: {seqlen_q} queries x {seqlen_k} keys: {words}") from None


def shades(mask: Mask, seqlen_q: int, seqlen_k: int, tile: int) -> tuple[Tensor, Tensor]:
    """For every score of the first sequence and head an index into COLOURS, and the classes of its tiles."""
    visible = mask.dense(1, 1, seqlen_q, seqlen_k)[0, 0]
    classes = mask.classify(1, 1, seqlen_q, seqlen_k, tile, tile)[0, 0]
    full = (classes == FULL).repeat_interleave(tile, 0)[:seqlen_q].repeat_interleave(tile, 1)[:, :seqlen_k]
    return visible.byte() + (visible & full).byte(), classes


def save_mask_png(mask: Mask, path: str | Path, seqlen_q: int, seqlen_k: int, tile: int, batch: int, head: int) -> None:
    """Draws the elements of one sequence and head, coloured by the class of their tile, with the tiles' grid.

    batch: the number of sequences, of which the last is drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'tilewise[plots]'") from error
    shown, classes = shades(of_one_head(mask, batch - 1, head), seqlen_q, seqlen_k, tile)
    height = 5.6 * min(max(seqlen_q / seqlen_k, 0.2), 3)
    figure = Figure(figsize=(6, 0.9 + height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture, step = _picture(shown)
    rows, cols = (step * n - 0.5 for n in picture.shape[:2])
    axes.imshow(picture.numpy(), extent=(-0.5, cols, rows, -0.5), interpolation="nearest",
                aspect=height / 5.6 * seqlen_k / seqlen_q)
    axes.set(xlim=(-0.5, seqlen_k - 0.5), ylim=(seqlen_q - 0.5, -0.5), xlabel=f"{seqlen_k} keys", ylabel=f"{seqlen_q} queries")
    lined = max(classes.shape) <= LINES
    axes.set_xticks([x - 0.5 for x in range(tile, seqlen_k, tile)] if lined else [], [])
    axes.set_yticks([y - 0.5 for y in range(tile, seqlen_q, tile)] if lined else [], [])
    axes.grid(color="#9a9a98", linewidth=0.5)
    axes.tick_params(length=0)
    axes.set_title(textwrap.fill(repr(mask), 72), fontsize=11)
    shares = [int((classes == kind).sum()) / max(1, classes.numel()) for kind in range(3)]
    names = ("tiles skipped", "tiles with the mask", "tiles without a mask")
    figure.legend(handles=[Patch(facecolor=c, edgecolor="#9a9a98", label=f"{name} {share:.0%}")
                           for c, name, share in zip(COLOURS, names, shares, strict=True)],
                  loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _picture(shown: Tensor) -> tuple[Tensor, int]:
    """RGB [rows, cols, 3], and how many scores one dot is on each side: colours are averaged, so that no line is lost."""
    step = -(-max(shown.shape) // DOTS)
    colours = torch.tensor([list(bytes.fromhex(colour[1:])) for colour in COLOURS]) / 255
    shares = torch.stack([torch.nn.functional.avg_pool2d((shown == kind)[None].float(), step, ceil_mode=True)[0]
                          for kind in range(len(COLOURS))], -1)
    return (shares @ colours).clamp(0, 1), step
