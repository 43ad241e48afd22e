"""The papers' algorithms in torch operations: exact attention on any device, in linear memory, differentiable to any order.

Forward: FlashAttention-2 (Dao 2023, algorithm 1), tile by tile with the online softmax, over all sequences and heads at
once. Backward (algorithm 2), forward-mode derivative and every further derivative are sums over tiles (`sums.BlockSum`)
whose own derivatives are again such sums: nothing of size N² is kept at any order.

Products and sums are fp32 (fp64 for fp64).

    walk.py     which tiles, and the scores of one        sums.py         sums over tiles and their derivatives
    passes.py   forward, backward, forward mode           statistics.py   statistics of rows and keys
"""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs
from tilewise.backends.tiled.passes import Tiled, gradients_of
from tilewise.backends.tiled.statistics import TiledStatistics
from tilewise.backends.tiled.walk import TILE_ELEMENTS, tile_sizes
from tilewise.kv_cache import write
from tilewise.problem import Operands, Problem
from tilewise.sequences import one_by_one, over_sequences, statistics_of_sequences
from tilewise.state import AttentionState, sink_gradient
from tilewise.statistics import Statistics
from tilewise.trace.graph import leaves

__all__ = ["attention", "attention_with_statistics", "backward", "forward", "forward_with_statistics", "precision",
           "repeatable", "splits", "supports", "tile_sizes", "volunteers", "workspace", "write"]


def supports(problem: Problem) -> str | None:
    """None, or why it cannot compute the problem; it can on any device."""
    return "torch's products do not promise batch_invariant bits" if problem.batch_invariant else None


volunteers = supports


def precision(problem: Problem) -> str:
    """How fp32 inputs are multiplied: as torch does on this device."""
    return problem.precision


def workspace(problem: Problem) -> tuple[int, int]:
    """Bytes, forward and backward: lse, wide copies of inputs and gradients, and the tiles in flight."""
    wide = 8 if problem.dtype == torch.float64 else 4
    queries, keys = problem.heads * problem.queries, problem.kv_heads * problem.keys
    inputs = queries * problem.head_dim + keys * (problem.head_dim + problem.head_dim_v)
    tile_q, tile_k = tile_sizes(problem)
    together = problem.heads * (1 if problem.unequal else problem.batch)
    tile = together * min(tile_q, problem.seqlen_q) * min(tile_k, problem.seqlen_k)
    return wide * (queries + inputs + 3 * tile), wide * (2 * queries + 2 * inputs + queries * problem.head_dim_v + 6 * tile)


def repeatable(problem: Problem) -> bool:
    """Whether gradients have the same bits each time."""
    return True


def splits(problem: Problem) -> int:
    """Shares of the keys."""
    return max(1, problem.splits)


def attention(problem: Problem, x: Operands) -> tuple[Tensor, Tensor]:
    """out and lse, sinks included, as a differentiable function of the operands: any order, forward and reverse."""
    if apart(problem):
        return over_sequences(attention, problem, x)
    state = AttentionState(*Tiled.apply(problem, (x.ints, x.floats), x.q, x.k, x.v, x.bias, x.rng, *x.captured))
    if x.sinks is not None:
        state = state.with_sink(x.sinks)
    return state.out, state.lse


def apart(problem: Problem) -> bool:
    """Whether sequences are computed one by one: unequal ones, and those whose masks leave each other tiles of its own."""
    if problem.unequal or problem.batch < 2 or problem.graphs.mask is None:
        return problem.unequal
    own = any("b" in leaves(graph) for graph in (problem.graphs.mask, *problem.graphs.keys))
    return own and problem.seqlen_q * problem.seqlen_k * problem.heads > TILE_ELEMENTS


def forward(problem: Problem, x: Operands) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return attention(problem, x)


def attention_with_statistics(problem: Problem, x: Operands) -> tuple[Tensor, Tensor, Statistics]:
    """The same, and what `problem.statistics` names."""
    out, lse = attention(problem, x)
    return out, lse, statistics(problem, x, lse)


def statistics(problem: Problem, x: Operands, lse: Tensor) -> Statistics:
    if apart(problem):
        return statistics_of_sequences(statistics, problem, x, lse)
    return Statistics(*TiledStatistics.apply(problem, (x.ints, x.floats), lse, x.q, x.k, x.v, x.bias, *x.captured))


def forward_with_statistics(problem: Problem, x: Operands) -> tuple[Tensor, Tensor, Statistics]:
    with torch.no_grad():
        return attention_with_statistics(problem, x)


def backward(problem: Problem, x: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
             needs: Needs) -> Gradients:
    """Gradients in the shapes and dtypes of the operands, not differentiable themselves: for calls inside a compiled graph."""
    with torch.no_grad():
        if apart(problem):
            return backward_over_sequences(backward, problem, x, out, lse, dout, dlse, needs)
        gradients, delta = gradients_of(problem, x, out, lse, dout, dlse, needs)
        if not needs.sinks or x.sinks is None:
            return gradients
        return gradients._replace(sinks=sink_gradient(x.sinks, lse, delta))


def backward_over_sequences(backward, problem: Problem, x: Operands, out: Tensor, lse: Tensor, dout: Tensor,
                            dlse: Tensor | None, needs: Needs) -> Gradients:
    """The gradients of all sequences by the backward of one."""
    dq, dk, dv = problem.new_q(problem.head_dim), problem.new_k(problem.head_dim), problem.new_k(problem.head_dim_v)
    dbias = torch.zeros_like(x.bias) if needs.bias and x.bias is not None else None
    sums: list[Tensor | None] = [None] * (1 + len(x.captured))
    for part in one_by_one(problem, x):
        (slot, rows), (k_slot, keys) = part.q, part.k
        own, of_keys = (slice(slot, slot + 1), slice(None), rows), (slice(k_slot, k_slot + 1), slice(None), keys)
        found = backward(part.problem, part.operands, out[own], lse[own], dout[own], None if dlse is None else dlse[own], needs)
        dq[own], dk[of_keys], dv[of_keys] = found.q, found.k, found.v
        if dbias is not None:
            b = part.problem.first - problem.first if dbias.shape[0] > 1 else 0
            dbias[b:b + 1, :, :found.bias.shape[2], :found.bias.shape[3]] += found.bias
        for i, gradient in enumerate((found.sinks, *found.captured)):
            sums[i] = gradient if sums[i] is None else sums[i] + gradient if gradient is not None else sums[i]
    return Gradients(dq, dk, dv, dbias, sums[0], sums[1:])
