"""Sums over tiles whose derivatives are again sums over tiles: nothing of size N² is kept at any order."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.backends import over_leading
from tilewise.backends.tiled.walk import Tile

# How a tensor is cut: dimension 2 by rows, by cols, 2 and 3 by both, or not at all.
ROWS, COLS, BOTH, WHOLE = "rows", "cols", "both", "whole"


class Diagonals(NamedTuple):
    """Dimension 2 counts q - k, from -(keys - 1)."""
    keys: int


Axes = str | Diagonals


def cut(x: Tensor, axes: Axes, tile: Tile) -> Tensor:
    """The part of x that belongs to a tile; dimensions of size 1 are shared by all tiles."""
    if axes == WHOLE:
        return x
    if isinstance(axes, Diagonals):
        cols = tile.cols[0] if len(tile.cols) == 1 else slice(0, axes.keys)
        return x[:, :, tile.rows.start - cols.stop + axes.keys:tile.rows.stop - 1 - cols.start + axes.keys]
    if axes == BOTH:
        x = x[:, :, tile.rows] if x.shape[2] > 1 else x
        return pick(x, 3, tile.cols) if x.shape[3] > 1 else x
    return x[:, :, tile.rows] if axes == ROWS else pick(x, 2, tile.cols)


def pick(x: Tensor, dim: int, runs: tuple[slice, ...]) -> Tensor:
    """Runs of entries along a dimension: a view of one, a copy of several."""
    if len(runs) == 1:
        return x.narrow(dim, runs[0].start, runs[0].stop - runs[0].start)
    unit = math.gcd(x.shape[dim], *(end for run in runs for end in (run.start, run.stop)))
    if unit == 1:
        return torch.cat([x.narrow(dim, run.start, run.stop - run.start) for run in runs], dim)
    # whole blocks at a time: faster than torch.cat
    blocks = torch.tensor([i for run in runs for i in range(run.start // unit, run.stop // unit)], device=x.device)
    return x.unflatten(dim, (-1, unit)).index_select(dim, blocks).flatten(dim, dim + 1)


def accumulate(out: Tensor, axes: Axes, tile: Tile, part: Tensor) -> None:
    """cut(out, axes, tile) += part, also where the cut is a copy."""
    if len(tile.cols) == 1 or axes in (ROWS, WHOLE) or isinstance(axes, Diagonals) or (axes == BOTH and out.shape[3] == 1):
        cut(out, axes, tile).add_(part)
        return
    dim, first = 2 if axes == COLS else 3, 0
    within = out[:, :, tile.rows] if axes == BOTH and out.shape[2] > 1 else out
    for run in tile.cols:
        length = run.stop - run.start
        within.narrow(dim, run.start, length).add_(part.narrow(dim, first, length))
        first += length


@dataclass(frozen=True)
class Sum:
    """outputs[cut] += function(tile, *inputs[cut]) over tiles; the function is differentiable, of wide dtype."""
    function: Callable[..., tuple[Tensor, ...]]
    tiles: tuple[Tile, ...]
    inputs: tuple[Axes, ...]            # how each input is cut
    outputs: tuple[Axes, ...]
    shapes: tuple[torch.Size, ...]      # of the outputs

    def vjp(self, shapes: Sequence[torch.Size]) -> Sum:
        """Inputs and gradients of the outputs -> gradients of the inputs."""
        n = len(self.inputs)

        def function(tile: Tile, *pieces: Tensor) -> tuple[Tensor, ...]:
            pull = torch.func.vjp(lambda *x: self.function(tile, *x), *pieces[:n])[1]
            return pull(tuple(pieces[n:]))

        return Sum(function, self.tiles, self.inputs + self.outputs, self.inputs, tuple(shapes))

    def jvp(self) -> Sum:
        """Inputs and their tangents -> tangents of the outputs, as the transpose of the vjp, which is linear.

        (Forward mode proper would not nest inside a caller's forward mode.)
        """
        n = len(self.inputs)

        def function(tile: Tile, *pieces: Tensor) -> tuple[Tensor, ...]:
            outputs, pull, *_ = torch.func.vjp(lambda *x: self.function(tile, *x), *pieces[:n])
            push = torch.func.vjp(lambda *u: pull(u), *map(torch.zeros_like, outputs))[1]
            return push(tuple(pieces[n:]))

        return Sum(function, self.tiles, self.inputs + self.inputs, self.outputs, self.shapes)


class BlockSum(torch.autograd.Function):
    """A `Sum` as a differentiable function; its derivatives are again BlockSums."""

    @staticmethod
    def forward(terms: Sum, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = [inputs[0].new_zeros(shape) for shape in terms.shapes]
        with full_precision(inputs[0]):
            for tile in terms.tiles:
                parts = terms.function(tile, *(cut(x, axes, tile) for x, axes in zip(inputs, terms.inputs, strict=True)))
                for out, axes, part in zip(outputs, terms.outputs, parts, strict=True):
                    accumulate(out, axes, tile, part)
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.terms = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, *gradients):
        inputs = ctx.saved_tensors
        return None, *BlockSum.apply(ctx.terms.vjp([x.shape for x in inputs]), *inputs, *gradients)

    @staticmethod
    def jvp(ctx, _, *tangents):
        inputs = ctx.saved_tensors
        filled = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)]
        return BlockSum.apply(ctx.terms.jvp(), *inputs, *filled)

    @staticmethod
    def vmap(info, in_dims, terms, *inputs):
        return over_leading(BlockSum.apply, info, in_dims, terms, *inputs)


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which the caller's autocast does not touch the fp32 products."""
    return torch.autocast(x.device.type, enabled=False)
