"""Block-sparse attention (FlashAttention, Dao et al. 2022, algorithm 5): masks that keep or drop whole blocks of scores.

A `BlockMask` is a mask like any other, made from a boolean per block; only kept blocks are computed. Its blocks may have any
size: kernels cut their own tiles out of them. Patterns return layouts, boolean tensors [blocks of queries, blocks of keys]:

    mask = tw.block_mask(tw.butterfly(128), block_size=128)            16,384 tokens
    mask = tw.causal() & tw.block_mask(layout, block_size=(16, 256))   as in the paper's kernels

Layouts combine with | and & before they become masks.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.masks import B, H, K, Mask, Q, _checked
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
    mask = _checked(source, "block_mask")
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


# ---- patterns: layouts, boolean [n blocks of queries, n blocks of keys] ---------------------------------------------------

def _grid(n: int, what: str) -> tuple[Tensor, Tensor]:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{what}: n: expected a number of blocks >= 1, got {n!r}")
    return torch.arange(n)[:, None], torch.arange(n)


def butterfly(n: int, factors: int | None = None, global_blocks: int = 0) -> Tensor:
    """Fixed butterfly (Pixelated Butterfly, Chen et al. 2022): i = j, or i XOR j a power of two below 2^factors.

    n: a power of two; factors: default log2(n), so that each row keeps 1 + log2(n) blocks; global_blocks: so many first rows
    and columns are kept whole.
    """
    i, j = _grid(n, "butterfly")
    if n & (n - 1):
        raise ValueError(f"butterfly: n: expected a power of two, got {n}")
    most = n.bit_length() - 1
    factors = most if factors is None else factors
    if not 0 <= factors <= most:
        raise ValueError(f"butterfly: factors: expected 0 to log2(n) = {most}, got {factors}")
    difference = i ^ j
    kept = (difference & (difference - 1)) == 0  # 0 or a power of two
    return (kept & (difference < 2**factors)) | (i < global_blocks) | (j < global_blocks)


def local(n: int, blocks: int) -> Tensor:
    """Neighbours up to `blocks` away on each side."""
    i, j = _grid(n, "local")
    return (i - j).abs() <= blocks


def strided(n: int, stride: int) -> Tensor:
    """Blocks at a distance that `stride` divides (Sparse Transformers, Child et al. 2019)."""
    i, j = _grid(n, "strided")
    if stride < 1:
        raise ValueError(f"strided: stride: expected an integer >= 1, got {stride!r}")
    return (i - j) % stride == 0


def global_blocks(n: int, blocks: int) -> Tensor:
    """The first `blocks` rows and columns (Longformer, Beltagy et al. 2020; ETC)."""
    i, j = _grid(n, "global_blocks")
    return (i < blocks) | (j < blocks)


def random_blocks(n: int, per_row: int, seed: int = 0) -> Tensor:
    """So many blocks per row, chosen at random by the seed."""
    _grid(n, "random_blocks")
    if not 0 <= per_row <= n:
        raise ValueError(f"random_blocks: per_row: expected 0 to {n}, got {per_row!r}")
    chosen = torch.rand((n, n), generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :per_row]
    return torch.zeros((n, n), dtype=torch.bool).scatter_(1, chosen, True)


def bigbird(n: int, window: int = 1, global_: int = 2, random: int = 3, seed: int = 0) -> Tensor:
    """Random + local + global blocks (BigBird, Zaheer et al. 2020)."""
    return local(n, window) | global_blocks(n, global_) | random_blocks(n, random, seed)


def axial(rows: int, cols: int) -> Tensor:
    """For a picture of rows x cols blocks in raster order: blocks of the same row or the same column."""
    i, j = _grid(rows * cols, "axial")
    return (i // cols == j // cols) | (i % cols == j % cols)
