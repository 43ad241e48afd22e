"""Block-sparse attention (FlashAttention, Dao et al. 2022, algorithm 5): masks that keep or drop whole blocks of scores.

A `BlockMask` is a mask like any other, made from a boolean per block; only kept blocks are computed. Its blocks may have any
size: kernels cut their own tiles out of them. `patterns` has layouts:

    mask = tw.block_mask(tw.patterns.butterfly(128), block_size=128)   16,384 tokens
    mask = tw.causal() & tw.block_mask(layout, block_size=(16, 256))   as in the paper's kernels
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.masks import B, H, K, Mask, Q, as_mask
from tilewise.trace.bounds import EMPTY, FULL, PARTIAL
from tilewise.trace.graph import Captured, Expr, load, wrap


class BlockMask(Mask):
    """A mask over whole blocks, with what is known of each.

    classes     uint8 [batch or 1, heads or 1, blocks of queries, blocks of keys]: EMPTY 0, PARTIAL 1, FULL 2
    block_size  (queries, keys)
    """

    __slots__ = ("block_size", "classes")

    def __init__(self, name: str, element: Expr, classes: Tensor, block_size: tuple[int, int]):
        super().__init__(name, element, (), ())
        self.classes, self.block_size = classes, block_size

    def to(self, device: torch.device | str) -> BlockMask:
        return BlockMask(self.name, super().to(device).element, self.classes.to(device), self.block_size)

    @property
    def density(self) -> float:
        """Share of blocks that are computed. Waits for the device."""
        return (self.classes != EMPTY).float().mean().item() if self.classes.numel() else 0.0

    def lists(self, transposed: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """{"partial": (counts, indices), "full": (counts, indices)}, int32.

        counts [b, h, rows of blocks]; indices [b, h, rows, blocks in a row]: in each row first its blocks in ascending order,
        then the others. Rows are blocks of queries, or of keys if `transposed`.
        """
        classes = self.classes.mT if transposed else self.classes
        found = {}
        for name, kind in (("partial", PARTIAL), ("full", FULL)):
            kept = classes == kind
            order = torch.argsort((~kept).byte(), dim=-1, stable=True)
            found[name] = kept.sum(-1, dtype=torch.int32), order.int()
        return found


def block_mask(source: Mask | Callable | Tensor, seqlen_q: int | None = None, seqlen_k: int | None = None, *,
               batch: int = 1, heads: int = 1, block_size: int | tuple[int, int] = 128, device="cpu") -> BlockMask:
    """A block mask from a layout, a mask or a function.

    source: a boolean layout [..., blocks of queries, blocks of keys] of up to four dimensions (batch, heads first; 1 to share):
        True keeps a block. Or a mask or a function mask_mod(b, h, q_idx, kv_idx): then its blocks are classified for
        sequences of seqlen_q x seqlen_k, which must be given, and elements of PARTIAL blocks keep their mask.
    block_size: of queries and keys.
    """
    size = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"block_mask: block_size: expected one or two integers >= 1, got {block_size!r}")
    if isinstance(source, Tensor):
        return _from_layout(source, size)
    mask = as_mask(source, "block_mask: source", "a mask, a mask function or a boolean layout")
    if seqlen_q is None:
        raise ValueError("block_mask: seqlen_q: a mask or a function needs the lengths of the sequences")
    classes = mask.classify(batch, heads, seqlen_q, seqlen_q if seqlen_k is None else seqlen_k, *size, device=device)
    return BlockMask(f"block_mask({mask.name})", mask.element, classes, size)


def _from_layout(layout: Tensor, size: tuple[int, int]) -> BlockMask:
    if layout.dtype != torch.bool or not 2 <= layout.dim() <= 4:
        raise TypeError("block_mask: expected a boolean layout [..., blocks of queries, blocks of keys] of two to four "
                        f"dimensions, got {layout.dtype} {list(layout.shape)}")
    classes = layout[(None,) * (4 - layout.dim())].byte() * FULL
    return BlockMask(f"block_mask({list(layout.shape)})", layout_element(layout, size), classes, size)


def layout_element(layout: Tensor, size: tuple[int, int]) -> Expr:
    """The graph of layout[b, h, q // size[0], k // size[1]]; leading dimensions of size 1 are shared."""
    leading = [index for index, n in zip((B, H)[4 - layout.dim():], layout.shape[:-2], strict=True) if n > 1]
    kept = layout[tuple(0 if n == 1 else slice(None) for n in layout.shape[:-2])]
    name = "block_mask: layout"
    return load(Captured(kept.contiguous(), name), *leading, Q // wrap(size[0]), K // wrap(size[1]))
