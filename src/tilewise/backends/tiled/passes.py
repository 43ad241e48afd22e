"""Forward, backward and forward-mode derivative, tile by tile."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs, flat_dims, over_leading
from tilewise.backends.tiled.sums import BOTH, COLS, ROWS, WHOLE, Axes, BlockSum, Diagonals, Sum, cut, full_precision
from tilewise.backends.tiled.walk import Tile, Walk, probabilities, product, product_over_rows, tile_sizes, walk
from tilewise.problem import Operands, Problem
from tilewise.state import AttentionState, merge_states
from tilewise.trace.evaluate import evaluate
from tilewise.trace.learned import Learned, gather, sums_shape, tile_sums


def forward_tiles(w: Walk, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """out in q's dtype and lse (without sink), by the online softmax."""
    problem = w.problem
    wide = torch.promote_types(problem.dtype, torch.float32)
    q, k, v = w.clean(dict(q=q.to(wide), k=k.to(wide), v=v.to(wide))).values()
    bias = None if bias is None else bias.to(wide)
    out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
    tile_q = tile_sizes(problem)[0]
    for i, row in enumerate(w.tiles):
        rows = slice(i * tile_q, min((i + 1) * tile_q, problem.seqlen_q))
        q_i = q[:, :, rows] * problem.scale
        parts = [row[first::problem.splits] for first in range(problem.splits)] if problem.splits > 1 else [row]
        states = [attend(w, q_i, k, v, bias, part) for part in parts]
        out[:, :, rows], lse[:, :, rows] = states[0] if len(states) == 1 else merged(states)
    return out, lse


def merged(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    state = merge_states([AttentionState(*state) for state in states])
    return state.out, state.lse


def attend(w: Walk, q_i: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor]:
    """(out, lse) of a block of queries, multiplied by scale, over some of its tiles."""
    m_i = q_i.new_full((*q_i.shape[:3], 1), -torch.inf)
    l_i = q_i.new_zeros(m_i.shape)
    acc = q_i.new_zeros((*q_i.shape[:3], v.shape[3]))
    for tile in tiles:
        s, _ = w.scores(tile, q_i, cut(k, COLS, tile), None if bias is None else cut(bias, BOTH, tile))
        m_new = torch.maximum(m_i, s.amax(-1, keepdim=True))
        pivot = torch.where(m_new == -torch.inf, 0.0, m_new)
        p = s.sub_(pivot).exp_()
        alpha = torch.exp(m_i - pivot)
        l_i.mul_(alpha).add_(p.sum(-1, keepdim=True))
        acc.mul_(alpha).add_(product(w.dropped(tile, p), cut(v, COLS, tile), w.problem.group))
        m_i = m_new
    empty = l_i == 0
    return acc / torch.where(empty, 1.0, l_i), torch.where(empty, -torch.inf, m_i + torch.log(l_i))[..., 0]


Inputs = dict[str, Tensor]              # q, k, v, then bias and captured tensors, by the names of their slots
CUTS: dict[str, Axes] = dict(q=ROWS, k=COLS, v=COLS, bias=BOTH)


def backward_terms(w: Walk, inputs: Inputs, wanted: Sequence[str]) -> Sum:
    """The sum over tiles (dout, delta, lse, *inputs) -> gradients of the wanted inputs, q, k and v first.

    Those of captured tensors are the sums that `learned.gather` takes, one for each lookup of each.
    """
    problem, names = w.problem, tuple(inputs)
    group, scale = problem.group, problem.scale
    lookups = wanted_lookups(problem, wanted)

    def function(tile: Tile, dout, delta, lse, *pieces):
        piece = dict(zip(names, pieces, strict=True))
        tables = {name: x for name, x in piece.items() if name not in CUTS}
        q, k, v = piece["q"] * scale, piece["k"], piece["v"]
        s, values = w.scores(tile, q, k, piece.get("bias"), tables)
        p = probabilities(s, lse)
        dv = product_over_rows(w.dropped(tile, p), dout, group)
        dp = w.dropped(tile, product(dout, v.mT, group))
        ds = where_seen(tile, s, p * (dp - delta[..., None]))
        ds_raw = chained(w, tile, s, ds, values)
        gradients = [product(ds_raw, k, group) * scale, product_over_rows(ds_raw, q, group), dv]
        if "bias" in wanted:
            gradients.append(ds.sum_to_size(piece["bias"].shape))
        for lookup in lookups:
            terms = where_seen(tile, s, ds * evaluate(lookup.factor, values))
            gradients.append(sums_of(lookup, tile, terms, values, tables[lookup.name]))
        return tuple(gradients)

    cuts = [CUTS[name] for name in wanted if name in CUTS]
    shapes = [inputs[name].shape for name in wanted if name in CUTS]
    for lookup in lookups:
        cuts.append(PATTERN_CUTS[lookup.pattern] if lookup.pattern != "diagonal" else Diagonals(problem.seqlen_k))
        shapes.append(torch.Size(sums_shape(lookup, inputs[lookup.name], problem.batch, problem.heads, problem.seqlen_q,
                                            problem.seqlen_k)))
    return Sum(function, w.flat, (ROWS, ROWS, ROWS, *(CUTS.get(name, WHOLE) for name in names)), tuple(cuts), tuple(shapes))


PATTERN_CUTS: dict[str, Axes] = dict(rows=ROWS, cols=COLS, direct=BOTH, any=WHOLE)


def wanted_lookups(problem: Problem, wanted: Sequence[str]) -> list[Learned]:
    return [lookup for lookup in problem.graphs.learned if lookup.name in wanted]


def sums_of(lookup: Learned, tile: Tile, terms: Tensor, values: Mapping[str, Any], table: Tensor) -> Tensor:
    """What a tile adds to the sums of a lookup."""
    if lookup.pattern == "diagonal" and len(tile.cols) > 1:  # all diagonals of the tile's rows
        rows, keys = tile.rows.stop - tile.rows.start, values["nk"]
        place = values["q"] - tile.rows.start - values["k"] + (keys - 1)
        total = terms.new_zeros((*terms.shape[:2], rows + keys - 1))
        return total.scatter_add(2, place.flatten().expand(*terms.shape[:2], -1), terms.flatten(2))
    return tile_sums(lookup, terms, values, table)


def where_seen(tile: Tile, s: Tensor, x: Tensor) -> Tensor:
    """x, 0 where the score is hidden, also where x is not finite."""
    return torch.where(s == -torch.inf, 0.0, x) if tile.masked else x


def chained(w: Walk, tile: Tile, s: Tensor, ds: Tensor, values: Mapping[str, Any]) -> Tensor:
    """The gradient of scale * q.k from that of the finished scores."""
    gradient = w.problem.graphs.score_gradient
    return ds if gradient is None else where_seen(tile, s, ds * evaluate(gradient, values))


def tangent_terms(w: Walk, inputs: Inputs, moving: Sequence[str], shapes: Sequence[torch.Size]) -> Sum:
    """The sum over tiles (lse, *inputs, tangents of the moving ones) -> (sum of p s' v + p v', sum of p s')."""
    problem, names = w.problem, tuple(inputs)
    group, scale = problem.group, problem.scale

    def function(tile: Tile, lse: Tensor, *x: Tensor):
        piece, tangent = dict(zip(names, x, strict=False)), dict(zip(moving, x[len(names):], strict=True))
        tables = {name: x for name, x in piece.items() if name not in CUTS}
        q, k, v = piece["q"] * scale, piece["k"], piece["v"]
        s, values = w.scores(tile, q, k, piece.get("bias"), tables)
        ds = chained(w, tile, s, product(tangent["q"] * scale, k.mT, group) + product(q, tangent["k"].mT, group), values)
        if "bias" in tangent:
            ds = ds + tangent["bias"]
        for lookup in wanted_lookups(problem, moving):
            of_table = evaluate(lookup.load, {**values, lookup.name: tangent[lookup.name]})
            ds = ds + evaluate(lookup.factor, values) * of_table
        p = probabilities(s, lse)
        weighted = torch.where(s == -torch.inf, 0.0, p * ds)
        values_sum = product(w.dropped(tile, weighted), v, group) + product(w.dropped(tile, p), tangent["v"], group)
        return values_sum, weighted.sum(-1)

    cuts = (ROWS, *(CUTS.get(name, WHOLE) for name in (*names, *moving)))
    return Sum(function, w.flat, cuts, (ROWS, ROWS), tuple(shapes))


class Tiled(torch.autograd.Function):
    """(q, k, v, bias, rng, captured tensors) -> (out, lse) without sink; every derivative is a BlockSum."""

    @staticmethod
    def forward(problem: Problem, numbers: Sequence, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
                rng: Tensor | None, *captured: Tensor):
        with full_precision(q):
            return forward_tiles(walk(problem, operands(q, k, v, bias, rng, captured, numbers)), q, k, v, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.problem, ctx.numbers, *tensors = inputs
        ctx.save_for_backward(*output, *tensors)
        ctx.save_for_forward(*output, *tensors)

    @staticmethod
    def saved(ctx) -> tuple[Operands, Tensor, Tensor]:
        """The operands, out and lse."""
        out, lse, q, k, v, bias, rng, *captured = ctx.saved_tensors
        return operands(q, k, v, bias, rng, captured, ctx.numbers), out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        x, out, lse = Tiled.saved(ctx)
        needs = Needs(ctx.needs_input_grad[5], False, tuple(ctx.needs_input_grad[7:]))
        gradients, _ = gradients_of(ctx.problem, x, out, lse, dout, dlse, needs)
        return None, None, gradients.q, gradients.k, gradients.v, gradients.bias, None, *gradients.captured

    @staticmethod
    def jvp(ctx, _problem, _numbers, q, k, v, bias, _rng, *captured):
        x, out, lse = Tiled.saved(ctx)
        w = walk(ctx.problem, x)
        tangents = dict(q=q, k=k, v=v) | ({} if bias is None else {"bias": bias})
        tangents |= {f"tf{slot}": t for slot, t in enumerate(captured) if t is not None and t.is_floating_point()}
        inputs = w.clean({name: t.to(lse.dtype) for name, t in named_inputs(x, tangents).items()})
        filled = w.clean({name: torch.zeros_like(inputs[name]) if t is None else t.to(lse.dtype)
                          for name, t in tangents.items()})
        terms = tangent_terms(w, inputs, tuple(filled), (out.shape, lse.shape))
        values, lse_tangent = BlockSum.apply(terms, lse, *inputs.values(), *filled.values())
        return (values - lse_tangent[..., None] * out.to(lse.dtype)).to(out.dtype), lse_tangent

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return over_leading(Tiled.apply, info, flat_dims(in_dims), *inputs)


def operands(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rng: Tensor | None, captured: Sequence[Tensor],
             numbers: Sequence) -> Operands:
    ints, floats = numbers
    return Operands(q, k, v, bias, rng=rng, captured=captured, ints=ints, floats=floats)


def named_inputs(x: Operands, wanted: Collection[str]) -> Inputs:
    """q, k, v, bias where there is one, and the captured tensors among the wanted names."""
    tables = {f"tf{slot}": t for slot, t in enumerate(x.captured) if f"tf{slot}" in wanted}
    return dict(q=x.q, k=x.k, v=x.v) | ({} if x.bias is None else {"bias": x.bias}) | tables


def gradients_of(problem: Problem, x: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
                 needs: Needs) -> tuple[Gradients, Tensor]:
    """Gradients but that of the sinks, and delta = rowsum(dO * O) - dlse; differentiable."""
    w = walk(problem, x)
    learned = {lookup.name for lookup in problem.graphs.learned}
    slots = [slot for slot, needed in enumerate(needs.captured) if needed and f"tf{slot}" in learned]
    wanted = ("q", "k", "v", *(["bias"] if needs.bias and x.bias is not None else []), *(f"tf{slot}" for slot in slots))
    inputs = w.clean({name: t.to(lse.dtype) for name, t in named_inputs(x, wanted).items()})
    dout = w.queries(dout).to(lse.dtype)
    delta = (dout * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    terms = backward_terms(w, inputs, wanted)
    dq, dk, dv, *rest = BlockSum.apply(terms, dout, delta, lse, *inputs.values())
    dbias = rest.pop(0).to(x.bias.dtype) if "bias" in wanted and x.bias is not None else None
    tables: dict[str, Tensor] = {}
    for lookup, sums in zip(wanted_lookups(problem, wanted), rest, strict=True):
        name = lookup.name
        found = gather(lookup, sums, w.values, inputs[name], problem.seqlen_k)
        tables[name] = tables[name] + found if name in tables else found
    captured = [tables[f"tf{slot}"].to(t.dtype) if slot in slots else None for slot, t in enumerate(x.captured)]
    return Gradients(dq.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype), dbias, None, captured), delta
