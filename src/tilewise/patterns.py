"""Layouts for `tw.block_mask`: boolean tensors [n blocks of queries, n blocks of keys]; True keeps a block.

They combine by | and &, as in `patterns.local(128, 2) | patterns.butterfly(128)`.
"""
from __future__ import annotations

import torch
from torch import Tensor


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
