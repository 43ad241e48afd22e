"""Which tiles of the score matrix can be skipped, and which need no mask, without looking at N² elements."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewise.trace.evaluate import evaluate
from tilewise.trace.graph import Graph, leaves
from tilewise.trace.intervals import Bounds, Interval, point

EMPTY, PARTIAL, FULL = 0, 1, 2


def tile_classes(mask: Graph | None, bands: Sequence[Graph], values: Mapping[str, Any], batch: int, heads: int,
                 lengths: tuple[int, int], tile: tuple[int, int], device: torch.device | str = "cpu",
                 each: bool = False) -> Tensor:
    """EMPTY, PARTIAL or FULL for every tile of a mask: uint8 [b, h, tiles_q, tiles_k].

    A tile said EMPTY shows no score, one said FULL shows all of its scores; PARTIAL promises nothing. b and h are 1 where
    the mask does not depend on the sequence or the head. lengths, tile: (queries, keys); values: all leaves but q and k.
    each: sequences have lengths of their own, up to `lengths`, as nq and nk [batch, 1, 1, 1]: what lies beyond one is of any
    class.

    A mask with intervals (`masks.Band`) is decided by them. Any other by interval arithmetic on its graph: on the host
    coarse tiles come first and only those found PARTIAL are looked into, so that a mask costs what its boundary is long, not
    what the matrix has of tiles.
    """
    if mask is None or bands:
        return band_classes(bands, values, *lengths, *tile, device)
    return _grid_classes(Bounds(values), mask, batch if each or "b" in leaves(mask) else 1, heads if "h" in leaves(mask) else 1,
                         lengths, tile, torch.device(device))


def band_classes(bands: Sequence[Graph], values: Mapping[str, Any], seqlen_q: int, seqlen_k: int, tile_q: int,
                 tile_k: int, device: torch.device | str = "cpu") -> Tensor:
    """EMPTY, PARTIAL or FULL for every tile, from bands over q (`masks.Band`): uint8 [b, h, tiles_q, tiles_k].

    b and h are 1 where the bands do not depend on the sequence or the head; values: all leaves but q. O(N + tiles).
    A tile said EMPTY shows no score, one said FULL shows all of its scores; PARTIAL promises nothing.
    """
    starts = torch.arange(0, seqlen_k, tile_k, device=device)
    ends = (starts + tile_k).clamp(max=seqlen_k) - 1
    tiles_q = -(-seqlen_q // tile_q)
    if not bands:
        return torch.full((1, 1, tiles_q, len(starts)), FULL, dtype=torch.uint8, device=device)
    classes = torch.zeros((1, 1, tiles_q, len(starts)), dtype=torch.uint8, device=device)
    for low, high, inner_low, inner_high in _row_blocks(bands, values, seqlen_q, seqlen_k, tile_q, device):
        visible = (low <= ends) & (high >= starts)
        certain = (inner_low <= starts) & (inner_high >= ends)
        classes = torch.maximum(classes, visible.byte() + (visible & certain).byte())
    return classes


def _row_blocks(bands: Sequence[Graph], values: Mapping[str, Any], seqlen_q: int, seqlen_k: int, tile_q: int,
                device: torch.device | str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each band and each tile's rows: the first and last key that any row sees, and those between which all rows see all.

    Each [b, h, tiles_q, 1]; (S_k, -1) where no row sees a key.
    """
    tiles_q = -(-seqlen_q // tile_q)
    # the last tile's missing rows repeat its last row
    rows = torch.arange(tiles_q * tile_q, device=device).clamp(max=max(seqlen_q - 1, 0))
    values = {**values, "q": rows.reshape(1, 1, tiles_q, tile_q)}
    for first in range(0, len(bands), 4):
        lo, hi, inner_lo, inner_hi = (
            _over_tiles(evaluate(node, values), tiles_q, tile_q, device) for node in bands[first:first + 4])
        shown = lo <= hi
        yield (torch.where(shown, lo, seqlen_k).amin(-1, keepdim=True), torch.where(shown, hi, -1).amax(-1, keepdim=True),
               inner_lo.amax(-1, keepdim=True), inner_hi.amin(-1, keepdim=True))


def tile_counts(mask: Graph | None, bands: Sequence[Graph], values: Mapping[str, Any], batch: int, heads: int,
                lengths: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """How many tiles of all sequences and heads `tile_classes` calls PARTIAL or FULL, and how many FULL.

    Without a grid of them where the mask has intervals: O(N).
    """
    if mask is None:
        every = batch * heads * -(-lengths[0] // tile[0]) * -(-lengths[1] // tile[1])
        return every, every
    if bands and min(lengths):
        shown, whole = zip(*(_tile_ranges(block, lengths[1], tile[1])
                             for block in _row_blocks(bands, values, *lengths, tile[0], "cpu")), strict=True)
        visited, full = _union_sizes(shown), _union_sizes(whole)
    else:
        classes = tile_classes(mask, bands, values, batch, heads, lengths, tile)
        visited, full = (classes != EMPTY).sum((2, 3)), (classes == FULL).sum((2, 3))
    repeats = batch * heads // max(1, visited.numel())
    return int(visited.sum()) * repeats, int(full.sum()) * repeats


def _tile_ranges(block: tuple[Tensor, Tensor, Tensor, Tensor], seqlen_k: int,
                 tile_k: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(first, last) tile of keys that a band shows, and of those that it shows whole: [b, h, tiles_q]; first > last: none."""
    low, high, inner_low, inner_high = (x[..., 0] for x in block)
    first, last = low.clamp(min=0) // tile_k, high.clamp(max=seqlen_k - 1) // tile_k    # a high of -1 gives -1
    first = torch.where(low < seqlen_k, first, last + 1)
    ends_early = inner_high < seqlen_k - 1      # the last tile ends with the keys
    inner_first = -(-inner_low.clamp(min=0) // tile_k)
    inner_last = torch.where(ends_early, (inner_high + 1) // tile_k - 1, (seqlen_k - 1) // tile_k)
    return (first, last), (torch.maximum(first, inner_first), torch.minimum(last, inner_last))


def _union_sizes(ranges: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How many tiles lie in any of the ranges, summed over rows of tiles: [b, h]."""
    firsts, lasts = (torch.stack(torch.broadcast_tensors(*ends)) for ends in zip(*ranges, strict=True))
    lasts = torch.where(firsts <= lasts, lasts, -1)
    firsts, order = firsts.sort(0)
    lasts = lasts.gather(0, order)
    reached = torch.cat([torch.full_like(lasts[:1], -1), lasts.cummax(0).values[:-1]])
    return (lasts - torch.maximum(firsts, reached + 1) + 1).clamp(min=0).sum((0, -1))


CHUNK = 1 << 18                         # tiles decided at a time
COARSE = 16                             # tiles along each side of a coarse tile


def _grid_classes(bounds: Bounds, mask: Graph, batch: int, heads: int, lengths: tuple[int, int], tile: tuple[int, int],
                  device: torch.device) -> Tensor:
    rows, cols = (-(-length // size) for length, size in zip(lengths, tile, strict=True))
    if device.type != "cpu" or min(rows, cols) <= COARSE**2:  # elsewhere, knowing which are PARTIAL would wait for the device
        classes = torch.empty((batch, heads, rows, cols), dtype=torch.uint8, device=device)
        step = max(1, CHUNK // max(1, batch * heads * cols))
        k = _span(torch.arange(cols, device=device), tile[1], lengths[1])
        for first in range(0, rows if cols else 0, step):
            q = _span(torch.arange(first, min(first + step, rows), device=device)[:, None], tile[0], lengths[0])
            classes[:, :, first:first + step] = _decide(bounds, mask, dict(q=q, k=k), device)
        return classes
    coarse = _grid_classes(bounds, mask, batch, heads, lengths, (tile[0] * COARSE, tile[1] * COARSE), device)
    classes = coarse[:, :, :, None, :, None].repeat(1, 1, 1, COARSE, 1, COARSE)
    inside = torch.arange(COARSE)
    for chunk in (coarse == PARTIAL).nonzero().split(CHUNK // COARSE**2):
        if not len(chunk):
            break
        b, h, i, j = chunk.T
        leaves: dict[Graph, Interval] = dict(q=_span((i[:, None] * COARSE + inside)[:, :, None], tile[0], lengths[0]),
                      k=_span((j[:, None] * COARSE + inside)[:, None, :], tile[1], lengths[1]), h=point(h[:, None, None]))
        for name in ("b", "nq", "nk"):
            value = bounds.values[name]
            if isinstance(value, Tensor):
                value = value.flatten()[b][:, None, None] if value.numel() > 1 else value.reshape(())
            leaves[name] = point(value)
        classes[b, h, i, :, j, :] = _decide(bounds, mask, leaves, device)
    return classes.flatten(4, 5).flatten(2, 3)[:, :, :rows, :cols]


def _span(tile: Tensor, size: int, length: int) -> Interval:
    """The indices of tiles, inside the sequence."""
    return Interval((tile * size).clamp(max=length - 1), (tile * size + (size - 1)).clamp(max=length - 1))


def _decide(bounds: Bounds, mask: Graph, leaves: Mapping[Graph, Interval], device: torch.device) -> Tensor:
    surely, possibly = (torch.as_tensor(x, device=device).byte() for x in bounds.of(mask, leaves))
    return surely + possibly


def hidden_rows(bands: Sequence[Graph], values: Mapping[str, Any], n_cols: int, device: torch.device | str) -> Tensor:
    """Which rows no column can see: bool [b, h, rows]. values: all leaves, the rows' index as [rows, 1].

    Such rows may be padding, which may hold anything: no backend lets them into a product.
    """
    seen = torch.zeros((1, 1, 1), dtype=torch.bool, device=device)
    for first in range(0, len(bands), 4):
        lo, hi = (torch.as_tensor(evaluate(node, values), device=device) for node in bands[first:first + 2])
        shown = (lo <= hi) & (lo < n_cols) & (hi >= 0)
        seen = seen | shown[(None,) * (4 - shown.dim())][..., 0]
    return ~seen


def _over_tiles(value: Any, tiles_q: int, tile_q: int, device: torch.device | str) -> Tensor:
    """A band's bound as [b, h, tiles_q, tile_q]."""
    value = torch.as_tensor(value, device=device)
    value = value[(None,) * (4 - value.dim())]
    return value.expand(*value.shape[:2], tiles_q, tile_q)
