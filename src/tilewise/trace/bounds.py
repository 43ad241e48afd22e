"""Which tiles of the score matrix can be skipped, and which need no mask, without looking at N² elements."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewise.trace.graph import Node, evaluate

EMPTY, PARTIAL, FULL = 0, 1, 2


def tile_classes(bands: Sequence[Node], values: Mapping[str, Any], seqlen_q: int, seqlen_k: int, tile_q: int,
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
    # the last tile's missing rows repeat its last row
    rows = torch.arange(tiles_q * tile_q, device=device).clamp(max=max(seqlen_q - 1, 0))
    values = {**values, "q": rows.reshape(1, 1, tiles_q, tile_q)}
    classes = torch.zeros((1, 1, tiles_q, len(starts)), dtype=torch.uint8, device=device)
    for first in range(0, len(bands), 4):
        lo, hi, inner_lo, inner_hi = (
            _over_tiles(evaluate(node, values), tiles_q, tile_q, device) for node in bands[first:first + 4])
        shown = lo <= hi
        low = torch.where(shown, lo, seqlen_k).amin(-1, keepdim=True)
        high = torch.where(shown, hi, -1).amax(-1, keepdim=True)
        visible = (low <= ends) & (high >= starts)
        certain = (inner_lo.amax(-1, keepdim=True) <= starts) & (inner_hi.amin(-1, keepdim=True) >= ends)
        classes = torch.maximum(classes, visible.byte() + (visible & certain).byte())
    return classes


def hidden_rows(bands: Sequence[Node], values: Mapping[str, Any], n_cols: int, device: torch.device | str) -> Tensor:
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
