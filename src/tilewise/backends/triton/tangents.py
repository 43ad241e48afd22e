"""Forward mode and the derivative of the backward pass: what is allocated, what each kernel is told, on which grid."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs, Tangents
from tilewise.backends.gpu_math.arguments import arguments, blocks, strides, visits, work
from tilewise.backends.gpu_math.preprocess import preprocess
from tilewise.backends.triton import backward_tangent_kernels as bwd
from tilewise.backends.triton.configs import of_directions
from tilewise.backends.triton.launch import Run, allocate_dbias, bias_mode, like, per_key_block, per_query_block, run
from tilewise.backends.triton.tangent_kernel import tangent as tangent_kernel
from tilewise.problem import Operands, Problem
from tilewise.state import sink_gradient_tangent


def tangent(problem: Problem, x: Operands, u: Tangents, out: Tensor, lse: Tensor, run: Run = run) -> tuple[Tensor, Tensor]:
    problem, out_tangent, lse_tangent = of_directions(problem), problem.new_q(problem.head_dim_v), torch.zeros_like(lse)
    if problem.seqlen_q == 0:
        return out_tangent, lse_tangent
    x, u = alike(problem, x, u)
    run(tangent_kernel, problem, per_query_block(problem), arguments(problem, x) | of_direction(u) | dict(
        SINKS=x.sinks, SINKS_TANGENT=u.sinks, OUT=arranged(out, out_tangent), LSE=lse, OUT_TANGENT=out_tangent,
        LSE_TANGENT=lse_tangent, out_strides=strides(out_tangent), HAS_SINKS=problem.has_sinks, visits=visits(problem, x),
        work=work(problem, x, "BLOCK_M")))
    return out_tangent, lse_tangent


def backward_tangent(problem: Problem, x: Operands, u: Tangents, out: Tensor, lse: Tensor, out_tangent: Tensor,
                     lse_tangent: Tensor, dout: Tensor, dlse: Tensor | None, needs: Needs, run: Run = run) -> Gradients:
    problem = of_directions(problem)
    dq, dk, dv = problem.new_q(problem.head_dim), problem.new_k(problem.head_dim), problem.new_k(problem.head_dim_v)
    mode = bias_mode(problem, needs)
    if problem.seqlen_q == 0:
        dbias, dsinks = (None if t is None else torch.zeros_like(t) for t in (x.bias, x.sinks))
        return Gradients(dq, dk.zero_(), dv.zero_(), dbias if needs.bias else None, dsinks if needs.sinks else None)
    x, u = alike(problem, x, u)
    out, out_tangent, dout = (arranged(t, like(problem)[3]) for t in (out, out_tangent, dout))
    of_queries, of_keys = work(problem, x, "BLOCK_M"), work(problem, x, "BLOCK_N", keys=True)
    deltas = []
    for of, dlse_of in ((out, dlse), (out_tangent, None)):
        deltas.append(torch.empty_like(lse))
        run(preprocess, problem, per_query_block(problem), dict(
            OUT=of, DO=dout, DLSE=None if dlse_of is None else dlse_of.contiguous(), DELTA=deltas[-1], Q_ROWS=x.q_rows,
            out_strides=strides(of), do_strides=strides(dout), heads=problem.heads, nq=problem.seqlen_q,
            lse_rows=problem.rows_q[1], HAS_DLSE=dlse_of is not None, work=of_queries))
    lse_tangent = lse_tangent.contiguous()
    dbias = allocate_dbias(problem, x, mode)
    common = arguments(problem, x) | of_direction(u) | dict(
        DO=dout, LSE=lse, DELTA=deltas[0], LSE_TANGENT=lse_tangent, DELTA_TANGENT=deltas[1], out_strides=strides(dout),
        DBIAS=dbias, dbias_strides=(0, 0, 0) if dbias is None else strides(dbias))
    for part in (" dk", " dv"):
        run(bwd.key_gradient_tangents, problem, per_key_block(problem), common | dict(
            DK=dk, DV_=dv, PART=part, visits=visits(problem, x, transposed=True), work=of_keys,
            DBIAS_MODE=mode if mode == "over_rows" and part == " dk" else None))
    run(bwd.query_gradient_tangents, problem, per_query_block(problem), common | dict(
        DQ=dq, DBIAS_MODE=mode if mode in ("direct", "over_cols") else None,
        visits=visits(problem, x), work=of_queries))
    if mode == "summed" and x.bias is not None:
        batch, heads = x.bias.shape[:2]
        run(bwd.bias_gradient_tangent, problem,
            lambda c: (batch * heads * blocks(problem.seqlen_q, c.BLOCK_M) * blocks(problem.seqlen_k, c.BLOCK_N),),
            common | dict(VISIT=len(problem.graphs.keys) // 4, sum_batch=problem.batch // max(1, batch),
                          sum_heads=problem.heads // heads))
    if dbias is not None and x.bias is not None:
        dbias = dbias.sum_to_size(x.bias.shape).to(x.bias.dtype)
    dsinks = None
    if needs.sinks and x.sinks is not None and u.sinks is not None:
        dsinks = sink_gradient_tangent(x.sinks, u.sinks, lse, lse_tangent, *deltas)
    return Gradients(dq, dk, dv, dbias, dsinks)


def of_direction(u: Tangents) -> dict[str, Any]:
    return dict(Q_TANGENT=u.q, K_TANGENT=u.k, V_TANGENT=u.v, BIAS_TANGENT=u.bias)


def alike(problem: Problem, x: Operands, u: Tangents) -> tuple[Operands, Tangents]:
    """Operands and a direction, zeros where nothing moves, that lie in memory as the gradients will: kernels are told one
    tensor's strides for all."""
    q, k, v = (arranged(t, order) for t, order in zip(x[:3], like(problem), strict=False))
    bias = None if x.bias is None else arranged(x.bias, torch.empty_like(x.bias, device="meta"))
    of_u = [None if t is None else torch.zeros_like(t) if tangent is None else arranged(tangent, t)
            for t, tangent in zip((q, k, v, bias, x.sinks), u, strict=True)]
    return x._replace(q=q, k=k, v=v, bias=bias), Tangents(*of_u)


def arranged(x: Tensor, order: Tensor) -> Tensor:
    """x, or a copy of it, with the strides of `order`."""
    return x if strides(x) == strides(order) and x.stride(-1) == order.stride(-1) else torch.empty_like(
        order, device=x.device).copy_(x)
