"""Statistics of rows and keys, by one more walk over the tiles, given lse."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.backends import flat_dims, over_leading
from tilewise.backends.tiled.passes import operands
from tilewise.backends.tiled.sums import BOTH, COLS, ROWS, accumulate, cut, full_precision
from tilewise.backends.tiled.walk import probabilities, walk
from tilewise.problem import Operands, Problem
from tilewise.statistics import Statistics


def statistics_of_tiles(problem: Problem, x: Operands, lse: Tensor) -> Statistics:
    """lse: [B, H, S_q], with the sink if there is one."""
    w = walk(problem, x)
    found = problem.new_statistics()
    inputs = w.clean(dict(q=x.q.to(lse.dtype) * problem.scale, k=x.k.to(lse.dtype), v=x.v[..., :0]))
    bias = None if x.bias is None else x.bias.to(lse.dtype)
    for tiles in filter(None, w.tiles):
        rows = tiles[0].rows
        state = OfRows.none(lse[:, :, rows])
        for tile in tiles:
            s, _ = w.scores(tile, cut(inputs["q"], ROWS, tile), cut(inputs["k"], COLS, tile),
                            None if bias is None else cut(bias, BOTH, tile))
            if found.key_mass is not None:
                accumulate(found.key_mass, COLS, tile, probabilities(s, lse[:, :, rows]).sum(-2))
            state = state.taken(s)
        if found.max_score is not None:
            found.max_score[:, :, rows] = state.m
        if found.entropy is not None:
            found.entropy[:, :, rows] = state.entropy
    return found


class OfRows(NamedTuple):
    """Of a block of queries [B, H, rows], over the tiles so far: the largest score m, and the sums l of exp(s - m) and weighted
    of exp(s - m) (s - m), which is entropy without the difference of large numbers that lse less a mean score would be."""
    m: Tensor
    l: Tensor
    weighted: Tensor

    @staticmethod
    def none(like: Tensor) -> OfRows:
        return OfRows(torch.full_like(like, -torch.inf), torch.zeros_like(like), torch.zeros_like(like))

    def taken(self, s: Tensor) -> OfRows:
        m = torch.maximum(self.m, s.amax(-1))
        pivot = torch.where(m == -torch.inf, 0.0, m)
        shift = torch.where(self.m == -torch.inf, 0.0, self.m - pivot)
        logs, alpha = s - pivot[..., None], shift.exp()
        p = logs.exp()
        weighted = torch.where(p == 0, 0.0, p * logs).sum(-1)
        return OfRows(m, self.l * alpha + p.sum(-1), (self.weighted + self.l * shift) * alpha + weighted)

    @property
    def entropy(self) -> Tensor:
        total = torch.where(self.l == 0, 1.0, self.l)
        return total.log() - self.weighted / total


class TiledStatistics(torch.autograd.Function):
    """`statistics_of_tiles`, None for those that nobody wants; without derivatives."""

    @staticmethod
    def forward(problem: Problem, numbers: Sequence, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
                *captured: Tensor):
        with full_precision(q):
            return tuple(statistics_of_tiles(problem, operands(q, k, v, bias, None, captured, numbers), lse))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*(x for x in output if x is not None))

    @staticmethod
    def backward(ctx, *_gradients):
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx, *_tangents):
        return None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return over_leading(TiledStatistics.apply, info, flat_dims(in_dims), *inputs)
