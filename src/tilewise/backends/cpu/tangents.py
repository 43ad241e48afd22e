"""Forward mode and the derivative of the backward pass: what is allocated, and what their kernels are told."""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs, Tangents
from tilewise.backends.cpu import gradients, launch, sizes
from tilewise.backends.cpu.abi import Compiled
from tilewise.problem import Operands, Problem
from tilewise.state import sink_gradient_tangent


def tangent(problem: Problem, x: Operands, u: Tangents, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    u, out = readable(u), launch.with_rows(out)
    out_tangent, lse_tangent = problem.new_q(problem.head_dim_v), torch.zeros_like(lse)
    if problem.queries and problem.batch and problem.seqlen_q:
        launch.call("tangent", problem, x, tensors(u) | dict(
            out=out, lse=lse, out_tangent=out_tangent, lse_tangent=lse_tangent), strides(u) | dict(
            out_strides=out, out_tangent_strides=out_tangent),
            sizes.tangent(problem), compiled=Compiled(paired=launch.paired(x)))
    return out_tangent, lse_tangent


def backward_tangent(problem: Problem, x: Operands, u: Tangents, out: Tensor, lse: Tensor, out_tangent: Tensor,
                     lse_tangent: Tensor, dout: Tensor, dlse: Tensor | None, needs: Needs) -> Gradients:
    u, out, out_tangent, dout = readable(u), *map(launch.with_rows, (out, out_tangent, dout))
    lse_tangent, dlse = lse_tangent.contiguous(), None if dlse is None else dlse.contiguous()
    dq, dk, dv = problem.new_q(problem.head_dim), problem.new_k(problem.head_dim), problem.new_k(problem.head_dim_v)
    delta, delta_tangent = torch.zeros_like(lse), torch.zeros_like(lse)
    of_bias = gradients.bias_sums(problem, x) if needs.bias and x.bias is not None else None
    if problem.batch and (problem.seqlen_q or problem.seqlen_k):
        launch.call("backward_tangent", problem, x, tensors(u) | dict(
            out=out, lse=lse, out_tangent=out_tangent, lse_tangent=lse_tangent, dout=dout, dlse=dlse, delta=delta,
            delta_tangent=delta_tangent, dq=dq, dk=dk, dv=dv, dbias=of_bias and of_bias.tensor), strides(u) | dict(
            out_strides=out, out_tangent_strides=out_tangent, dout_strides=dout, dq_strides=dq, dk_strides=dk, dv_strides=dv,
            dbias_strides=of_bias and of_bias.by_entry),
            sizes.backward(problem, **gradients.kinds([of_bias]), moving=True) | gradients.of_bias_numbers(of_bias),
            compiled=Compiled(paired=launch.paired(x)))
    dsinks = None
    if needs.sinks and x.sinks is not None:
        sinks_tangent = torch.zeros_like(x.sinks) if u.sinks is None else u.sinks
        dsinks = sink_gradient_tangent(x.sinks, sinks_tangent, lse, lse_tangent, delta, delta_tangent)
    return Gradients(dq, dk, dv, gradients.bias_gradient(problem, x, of_bias), dsinks)


def readable(u: Tangents) -> Tangents:
    """The direction as kernels read it: rows in one piece, a bias with any strides, sinks one after another."""
    q, k, v = (None if t is None else launch.with_rows(t) for t in u[:3])
    return Tangents(q, k, v, u.bias, None if u.sinks is None else u.sinks.contiguous())


def tensors(u: Tangents) -> dict[str, Tensor | None]:
    return {f"{name}_tangent": t for name, t in u._asdict().items()}


def strides(u: Tangents) -> dict[str, Tensor | None]:
    return {f"{name}_tangent_strides": t for name, t in u._asdict().items() if name != "sinks"}
