"""The papers' algorithms in torch operations: exact attention on any device, in linear memory, differentiable to any order.

Forward: FlashAttention-2 (Dao 2023, algorithm 1), tile by tile with the online softmax, over all sequences and heads at
once. Backward (algorithm 2), forward-mode derivative and every further derivative are sums over tiles (`BlockSum`) whose
own derivatives are again such sums: nothing of size N² is kept at any order.

Products and sums are fp32 (fp64 for fp64).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise import rng
from tilewise.backends import Gradients, Needs, flat_dims, over_leading
from tilewise.problem import Operands, Problem
from tilewise.state import AttentionState, sink_gradient
from tilewise.trace.bounds import EMPTY, FULL, hidden_rows, tile_classes
from tilewise.trace.evaluate import evaluate, leaf_values, slot_values
from tilewise.trace.graph import leaves

TILE_ELEMENTS = 1 << 20                 # scores held at a time, over all sequences and heads
LONGEST_TILE, SHORTEST_TILE = 512, 32
BLOCK = 128, 64                         # (queries, keys) at most, of masks without intervals: their kept blocks are gathered


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
    queries = problem.batch * problem.heads * problem.seqlen_q
    keys = problem.batch * problem.kv_heads * problem.seqlen_k
    inputs = queries * problem.head_dim + keys * (problem.head_dim + problem.head_dim_v)
    tile_q, tile_k = tile_sizes(problem)
    tile = problem.batch * problem.heads * min(tile_q, problem.seqlen_q) * min(tile_k, problem.seqlen_k)
    return wide * (queries + inputs + 3 * tile), wide * (2 * queries + 2 * inputs + queries * problem.head_dim_v + 6 * tile)


class Tile(NamedTuple):
    rows: slice
    cols: slice | Tensor                # a tensor where kept blocks are not neighbours
    masked: bool


@dataclass(frozen=True)
class Walk:
    """A problem with its operands' small parts, ready to be walked tile by tile."""
    problem: Problem
    values: dict[str, Any]              # of the program's leaves, except s, q and k
    rng: Tensor | None
    tiles: tuple[tuple[Tile, ...], ...] # per block of queries
    hidden_queries: Tensor | None       # [B or 1, H or 1, S_q]: those that see no key, and
    hidden_keys: Tensor | None          # [B or 1, H_kv or 1, S_k]: those that no query sees; None: there are none

    @property
    def flat(self) -> tuple[Tile, ...]:
        return tuple(tile for row in self.tiles for tile in row)

    def scores(self, tile: Tile, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """Finished scores [B, H, rows, cols] of a tile; q comes multiplied by scale."""
        problem, graphs = self.problem, self.problem.graphs
        s = product(q, k.mT, problem.group)
        if graphs.score is None and bias is None and not tile.masked:
            return s
        values = self.values | self.indices(tile)
        if graphs.score is not None:
            s = evaluate(graphs.score, values | {"s": s})
        if bias is not None:
            s = s + bias
        if tile.masked and graphs.mask is not None:
            s = torch.where(torch.as_tensor(evaluate(graphs.mask, values), device=s.device), s, -torch.inf)
        return s

    def queries(self, x: Tensor) -> Tensor:
        """x [B, H, S_q, ...], 0 where a query sees no key: it may be padding, which may hold anything."""
        return x if self.hidden_queries is None else torch.where(self.hidden_queries[..., None], 0.0, x)

    def keys(self, x: Tensor) -> Tensor:
        """x [B, H_kv, S_k, ...], 0 where no query sees a key."""
        return x if self.hidden_keys is None else torch.where(self.hidden_keys[..., None], 0.0, x)

    def clean(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """q, k, v[, bias] without what no product may see."""
        q, k, v, *bias = inputs
        return [self.queries(q), self.keys(k), self.keys(v), *bias]

    def indices(self, tile: Tile) -> dict[str, Tensor]:
        device = self.problem.device
        cols = tile.cols
        return dict(q=torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None],
                    k=torch.arange(cols.start, cols.stop, device=device) if isinstance(cols, slice) else cols)

    def dropped(self, tile: Tile, p: Tensor) -> Tensor:
        """p after dropout."""
        if self.rng is None:
            return p
        index = self.indices(tile)
        kept = rng.keep(self.rng, self.problem.dropout, self.values["b"], self.values["h"], self.problem.heads, index["q"],
                        index["k"])
        return torch.where(kept, p, 0.0) * rng.rescale(self.problem.dropout)


def walk(problem: Problem, x: Operands) -> Walk:
    values = leaf_values(slot_values(x.captured, x.ints, x.floats, problem.dtype), problem.batch, problem.heads,
                         problem.seqlen_q, problem.seqlen_k, problem.device)
    graphs, device = problem.graphs, problem.device
    queries = dict(q=torch.arange(problem.seqlen_q, device=device)[:, None])
    keys = dict(k=torch.arange(problem.seqlen_k, device=device)[:, None])
    hidden_queries = hidden_keys = None
    if graphs.keys:
        hidden_queries = hidden_rows(graphs.keys, values | queries, problem.seqlen_k, device)
        hidden_keys = hidden_rows(graphs.queries, values | keys, problem.seqlen_q, device)
        if hidden_keys.shape[1] > 1:  # hidden from a whole group
            hidden_keys = hidden_keys.unflatten(1, (problem.kv_heads, problem.group)).all(2)
    return Walk(problem, values, x.rng, tuple(_visited(problem, values)), _if_any(hidden_queries), _if_any(hidden_keys))


def _if_any(hidden: Tensor | None) -> Tensor | None:
    """None where the host knows that there are none."""
    return None if hidden is None or (hidden.device.type == "cpu" and not hidden.any()) else hidden


def tile_sizes(problem: Problem) -> tuple[int, int]:
    """(queries, keys) per tile: near TILE_ELEMENTS over all sequences and heads."""
    side = (TILE_ELEMENTS / max(1, problem.batch * problem.heads)) ** 0.5
    length = min(LONGEST_TILE, max(SHORTEST_TILE, 1 << int(side).bit_length() - 1))
    if problem.graphs.mask is not None and not problem.graphs.keys:
        return min(length, BLOCK[0]), min(length, BLOCK[1])
    return length, length


def _visited(problem: Problem, values: dict[str, Any]) -> Iterator[tuple[Tile, ...]]:
    """The tiles that are not EMPTY for some sequence and head, per block of queries, keys ascending."""
    tile_q, tile_k = tile_sizes(problem)
    mask, bands = problem.graphs.mask, problem.graphs.keys
    undecided = False
    if problem.device.type != "cpu" and mask is not None:  # reading the device's values would wait for it
        undecided = not bands or any(leaf[0] == "t" or leaf in "bh" for node in bands for leaf in leaves(node))
        values = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    classes = tile_classes(None if undecided else mask, () if undecided else bands, values, problem.batch, problem.heads,
                           (problem.seqlen_q, problem.seqlen_k), (tile_q, tile_k))
    certain = classes.amin((0, 1)).tolist() if classes.numel() else []
    visible = classes.amax((0, 1)).tolist() if classes.numel() else []
    for i in range(-(-problem.seqlen_q // tile_q)):
        rows = slice(i * tile_q, min((i + 1) * tile_q, problem.seqlen_q))
        kept = [j for j in range(-(-problem.seqlen_k // tile_k)) if visible[i][j] != EMPTY]
        if mask is None or bands or undecided:
            yield tuple(Tile(rows, slice(j * tile_k, min((j + 1) * tile_k, problem.seqlen_k)),
                             undecided or certain[i][j] != FULL) for j in kept)
        else:
            yield (*_gathered(problem, rows, [j for j in kept if certain[i][j] == FULL], tile_k, False),
                   *_gathered(problem, rows, [j for j in kept if certain[i][j] != FULL], tile_k, True))


def _gathered(problem: Problem, rows: slice, blocks: list[int], size: int, masked: bool) -> Iterator[Tile]:
    """Blocks of keys as few tiles of near TILE_ELEMENTS scores."""
    together = max(1, TILE_ELEMENTS // max(1, problem.batch * problem.heads * (rows.stop - rows.start) * size))
    for first in range(0, len(blocks), together):
        some = blocks[first:first + together]
        if some[-1] - some[0] == len(some) - 1:
            yield Tile(rows, slice(some[0] * size, min((some[-1] + 1) * size, problem.seqlen_k)), masked)
        else:
            cols = (torch.tensor(some)[:, None] * size + torch.arange(size)).flatten()
            yield Tile(rows, cols[cols < problem.seqlen_k], masked)


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which the caller's autocast does not touch the fp32 products."""
    return torch.autocast(x.device.type, enabled=False)


def product(a: Tensor, b: Tensor, group: int) -> Tensor:
    """a [B, H, M, K] @ b [B, H_kv, K, N] -> [B, H, M, N]: the heads of a group share one factor and one product."""
    if group == 1:
        return a @ b
    batch, heads, rows, inner = a.shape
    folded = a.reshape(batch, heads // group, group * rows, inner) @ b
    return folded.reshape(batch, heads, rows, b.shape[-1])


def product_over_rows(a: Tensor, b: Tensor, group: int) -> Tensor:
    """Sum over a group's heads and rows of a^T b: a [B, H, M, N], b [B, H, M, K] -> [B, H_kv, N, K]."""
    if group == 1:
        return a.mT @ b
    batch, heads, rows, _ = a.shape
    fold = (batch, heads // group, group * rows)
    return a.reshape(*fold, a.shape[-1]).mT @ b.reshape(*fold, b.shape[-1])


def probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse), 0 for rows without keys."""
    return torch.exp(s - torch.where(lse == -torch.inf, torch.inf, lse)[..., None])


# ---- sums over tiles ------------------------------------------------------------------------------------------------

ROWS, COLS, BOTH = "rows", "cols", "both"   # how a tensor is cut: dimension 2 by rows, by cols, or 2 and 3 by both


def cut(x: Tensor, axes: str, tile: Tile) -> Tensor:
    """The part of x that belongs to a tile; dimensions of size 1 are shared by all tiles."""
    if axes == BOTH:
        x = x[:, :, tile.rows] if x.shape[2] > 1 else x
        return x[..., tile.cols] if x.shape[3] > 1 else x
    return x[:, :, tile.rows if axes == ROWS else tile.cols]


def accumulate(out: Tensor, axes: str, tile: Tile, part: Tensor) -> None:
    """cut(out, axes, tile) += part, also where the cut gathers."""
    by_cols = axes == COLS or (axes == BOTH and out.shape[3] > 1)
    if isinstance(tile.cols, slice) or not by_cols:
        cut(out, axes, tile).add_(part)
    else:
        within = out[:, :, tile.rows] if axes == BOTH and out.shape[2] > 1 else out
        within.index_add_(2 if axes == COLS else 3, tile.cols, part)


@dataclass(frozen=True)
class Sum:
    """outputs[cut] += function(tile, *inputs[cut]) over tiles; the function is differentiable, of wide dtype."""
    function: Callable[..., tuple[Tensor, ...]]
    tiles: tuple[Tile, ...]
    inputs: tuple[str, ...]             # how each input is cut
    outputs: tuple[str, ...]
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


# ---- forward --------------------------------------------------------------------------------------------------------

def forward_tiles(w: Walk, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """out in q's dtype and lse (without sink), by the online softmax."""
    problem = w.problem
    wide = torch.promote_types(problem.dtype, torch.float32)
    q, k, v = w.clean([q.to(wide) * problem.scale, k.to(wide), v.to(wide)])
    bias = None if bias is None else bias.to(wide)
    out = problem.empty(problem.heads, problem.seqlen_q, problem.head_dim_v)
    lse = problem.empty_lse()
    tile_q = tile_sizes(problem)[0]
    for i, row in enumerate(w.tiles):
        rows = slice(i * tile_q, min((i + 1) * tile_q, problem.seqlen_q))
        q_i = q[:, :, rows]
        m_i = q_i.new_full((*q_i.shape[:3], 1), -torch.inf)
        l_i = q_i.new_zeros(m_i.shape)
        acc = q_i.new_zeros((*q_i.shape[:3], v.shape[3]))
        for tile in row:
            s = w.scores(tile, q_i, k[:, :, tile.cols], None if bias is None else cut(bias, BOTH, tile))
            m_new = torch.maximum(m_i, s.amax(-1, keepdim=True))
            pivot = torch.where(m_new == -torch.inf, 0.0, m_new)
            p = s.sub_(pivot).exp_()
            alpha = torch.exp(m_i - pivot)
            l_i.mul_(alpha).add_(p.sum(-1, keepdim=True))
            acc.mul_(alpha).add_(product(w.dropped(tile, p), v[:, :, tile.cols], problem.group))
            m_i = m_new
        empty = l_i == 0
        out[:, :, rows] = acc / torch.where(empty, 1.0, l_i)
        lse[:, :, rows] = torch.where(empty, -torch.inf, m_i + torch.log(l_i))[..., 0]
    return out, lse


def backward_terms(w: Walk, inputs: Sequence[Tensor], bias_gradient: bool) -> Sum:
    """The sum over tiles (dout, delta, lse, q, k, v[, bias]) -> (dq, dk, dv[, dbias]). inputs: q, k, v[, bias]."""
    group, scale = w.problem.group, w.problem.scale

    def function(tile: Tile, dout, delta, lse, q, k, v, bias=None):
        q = q * scale
        s, chain = _scores_with_chain(w, tile, q, k, bias)
        p = probabilities(s, lse)
        dv = product_over_rows(w.dropped(tile, p), dout, group)
        dp = w.dropped(tile, product(dout, v.mT, group))
        ds = p * (dp - delta[..., None])
        if tile.masked:
            ds = torch.where(s == -torch.inf, 0.0, ds)
        ds_raw = chain(ds)
        gradients = (product(ds_raw, k, group) * scale, product_over_rows(ds_raw, q, group), dv)
        return (*gradients, ds.sum_to_size(bias.shape)) if bias_gradient else gradients

    cuts = (ROWS, COLS, COLS, BOTH)
    outputs = 4 if bias_gradient else 3
    return Sum(function, w.flat, (ROWS, ROWS, ROWS, *cuts[:len(inputs)]), cuts[:outputs],
               tuple(x.shape for x in inputs[:outputs]))


def _scores_with_chain(w: Walk, tile: Tile, q: Tensor, k: Tensor, bias: Tensor | None):
    """Finished scores, and the function from their gradient to that of scale * q.k."""
    gradient = w.problem.graphs.score_gradient
    s = w.scores(tile, q, k, bias)
    if gradient is None:
        return s, lambda ds: ds
    raw = product(q, k.mT, w.problem.group)
    return s, lambda ds: ds * evaluate(gradient, w.values | w.indices(tile) | {"s": raw})


def tangent_terms(w: Walk, shapes: Sequence[torch.Size], with_bias: bool) -> Sum:
    """The sum over tiles (q, k, v, lse[, bias] and tangents of q, k, v[, bias]) -> (sum of p s' v + p v', sum of p s')."""
    n = 5 if with_bias else 4
    group, scale = w.problem.group, w.problem.scale

    def function(tile: Tile, *x: Tensor):
        q, k, v, lse = x[:4]
        dq, dk, dv = x[n:n + 3]
        bias, dbias = (x[4], x[n + 3]) if with_bias else (None, 0.0)
        s, chain = _scores_with_chain(w, tile, q * scale, k, bias)
        ds = chain(product(dq * scale, k.mT, group) + product(q * scale, dk.mT, group)) + dbias
        p = probabilities(s, lse)
        weighted = torch.where(s == -torch.inf, 0.0, p * ds)
        values = product(w.dropped(tile, weighted), v, group) + product(w.dropped(tile, p), dv, group)
        return values, weighted.sum(-1)

    bias = (BOTH,) if with_bias else ()
    cuts = (ROWS, COLS, COLS, ROWS, *bias, ROWS, COLS, COLS, *bias)
    return Sum(function, w.flat, cuts, (ROWS, ROWS), tuple(shapes))


class Tiled(torch.autograd.Function):
    """(q, k, v, bias, rng, captured tensors) -> (out, lse) without sink; every derivative is a BlockSum."""

    @staticmethod
    def forward(problem: Problem, numbers: Sequence, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
                rng: Tensor | None, *captured: Tensor):
        with full_precision(q):
            return forward_tiles(walk(problem, Operands(q, k, v, bias, None, rng, captured, *numbers)), q, k, v, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.problem, ctx.numbers, *tensors = inputs
        ctx.save_for_backward(*output, *tensors)
        ctx.save_for_forward(*output, *tensors)

    @staticmethod
    def saved(ctx) -> tuple[Walk, list[Tensor], Tensor, Tensor]:
        """(walk, q, k, v[, bias], out, lse)."""
        out, lse, q, k, v, bias, rng, *captured = ctx.saved_tensors
        x = Operands(q, k, v, bias, None, rng, captured, *ctx.numbers)
        return walk(ctx.problem, x), [q, k, v, *([] if bias is None else [bias])], out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        w, inputs, out, lse = Tiled.saved(ctx)
        gradients, _ = gradients_of(w, inputs, out, lse, dout, dlse, ctx.needs_input_grad[5])
        return (None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 2 - len(gradients)))

    @staticmethod
    def jvp(ctx, _problem, _numbers, *tangents):
        w, inputs, out, lse = Tiled.saved(ctx)
        filled = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=False)]
        inputs, filled = w.clean(inputs), w.clean(filled)
        x = [t.to(lse.dtype) for t in (*inputs[:3], lse, *inputs[3:], *filled)]
        terms = tangent_terms(w, (out.shape, lse.shape), len(inputs) == 4)
        values, lse_tangent = BlockSum.apply(terms, *x)
        return (values - lse_tangent[..., None] * out.to(lse.dtype)).to(out.dtype), lse_tangent

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return over_leading(Tiled.apply, info, flat_dims(in_dims), *inputs)


def gradients_of(w: Walk, inputs: Sequence[Tensor], out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
                 bias_gradient: bool) -> tuple[list[Tensor], Tensor]:
    """Gradients of the inputs q, k, v[, bias], and delta = rowsum(dO * O) - dlse; differentiable."""
    dout, inputs = w.queries(dout), w.clean(inputs)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    terms = backward_terms(w, inputs, bias_gradient)
    gradients = BlockSum.apply(terms, dout.to(lse.dtype), delta, lse, *(x.to(lse.dtype) for x in inputs))
    return [g.to(x.dtype) for g, x in zip(gradients, inputs, strict=False)], delta


# ---- the backend ----------------------------------------------------------------------------------------------------

def attention(problem: Problem, x: Operands) -> tuple[Tensor, Tensor]:
    """out and lse, sinks included, as a differentiable function of the operands: any order, forward and reverse."""
    state = AttentionState(*Tiled.apply(problem, (x.ints, x.floats), x.q, x.k, x.v, x.bias, x.rng, *x.captured))
    if x.sinks is not None:
        state = state.with_sink(x.sinks)
    return state.out, state.lse


def forward(problem: Problem, x: Operands) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return attention(problem, x)


def backward(problem: Problem, x: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
             needs: Needs) -> Gradients:
    with torch.no_grad():
        inputs = [x.q, x.k, x.v] + ([] if x.bias is None else [x.bias])
        gradients, delta = gradients_of(walk(problem, x), inputs, out, lse, dout, dlse, needs.bias)
        dq, dk, dv, dbias, *_ = [*gradients, None]
        return Gradients(dq, dk, dv, dbias, sink_gradient(x.sinks, lse, delta) if needs.sinks and x.sinks is not None else None)
