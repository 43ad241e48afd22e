"""Where backends meet autograd, torch.compile and torch.func.

One operation, wired twice. While torch.compile or torch.export traces, it is the opaque custom op `tilewise::attention`
with a registered backward. Otherwise it is an `autograd.Function` that torch.func can transform (`derivatives.py`); `tiled` and
`reference` are then differentiable themselves, to any order.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tilewise import backends, reference, sharding, widening
from tilewise.backends import Gradients, Needs
from tilewise.derivatives import differentiable, transformed
from tilewise.plan import choose, takes_fp8
from tilewise.problem import TENSORS, Graphs, Operands, Problem, Settings, describe
from tilewise.statistics import Statistics
from tilewise.trace.memo import abstract


def taking_fp8(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute` with fp8 inputs for all backends: those that do not take them compute with copies in bf16 (`widening.py`).

    While tracing nothing is copied: the custom op does so when it runs.
    """
    @functools.wraps(compute)
    def computed(problem: Problem, x: Operands, backend: str) -> Any:
        if problem.quantized and sharding.sharded(x.q, x.k, x.v):
            raise NotImplementedError("q: expected no DTensor of float8_e4m3fn: give tw.attention .to_local() of each")
        if not problem.quantized or (abstract(x.q, x.k, x.v) and backend != "reference") or takes_fp8(problem, backend):
            return compute(problem, x, backend)
        out, *others = compute(*widening.widened(problem, x), backend)
        return widening.rescaled(problem, x, out), *others

    return computed


@taking_fp8
def attention(problem: Problem, x: Operands, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem on a backend, "auto" or a name; differentiable."""
    if sharding.sharded(x.q, x.k, x.v):
        own, operands_here, part = sharding.local(problem, x)
        return sharding.whole(problem, part, *attention(own, operands_here, backend))
    if backend == "reference":
        return reference.attention(problem, x)  # plain torch: autograd and every compiler read it
    if abstract(x.q, x.k, x.v):
        return torch.ops.tilewise.attention(*x, *problem.settings, backend)
    module = backends.load(choose(problem, backend))
    if hasattr(module, "attention"):
        return module.attention(problem, x)
    if not tracked(x):
        return module.forward(problem, x)
    return differentiable(module, problem, x)


@taking_fp8
def attention_with_statistics(problem: Problem, x: Operands, backend: str) -> tuple[Tensor, Tensor, Statistics]:
    """The same, and what `problem.statistics` names, which has no gradient."""
    if sharding.sharded(x.q, x.k, x.v):
        raise NotImplementedError("return_stats: statistics are not computed of DTensors: ask for them of .to_local()")
    if backend == "reference":
        return reference.attention_with_statistics(problem, x)
    if abstract(x.q, x.k, x.v):
        out, lse, found = torch.ops.tilewise.attention_with_statistics(*x, *problem.settings, backend)
        named = zip(problem.statistics.split(), found, strict=True)
        return out, lse, Statistics(**{name: t.detach() for name, t in named})
    module = backends.load(choose(problem, backend))
    if hasattr(module, "attention"):
        return module.attention_with_statistics(problem, x)
    if not tracked(x):
        return module.forward_with_statistics(problem, x)
    out, lse, *found = differentiable(module, problem, x)
    return out, lse, Statistics(*found)


def tracked(x: Operands) -> bool:
    """Whether autograd or torch.func follows what is computed from these operands; `apply` costs more than a small kernel."""
    return transformed() or recorded(x)


def recorded(x: Operands) -> bool:
    """Whether autograd does."""
    if torch.is_grad_enabled():
        for t in (x.q, x.k, x.v, x.bias, x.sinks, *x.captured):
            if t is not None and t.requires_grad:
                return True
    return False


# ---- while tracing --------------------------------------------------------------------------------------------------

KINDS = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "Sequence[Tensor]": "Tensor[]", "Sequence[int]": "SymInt[]",
         "Sequence[float]": "float[]", "float": "float", "int": "SymInt", "str": "str", "bool": "bool"}
ARGUMENTS = ", ".join(f"{KINDS[kind.__forward_arg__]} {name}" for of in (Operands, Settings)
                      for name, kind in of.__annotations__.items())


def described(arguments: Sequence) -> tuple[Problem, Operands, str]:
    """From the operations' flat arguments: operands, settings, the backend's name."""
    count = len(Operands._fields)
    x = Operands(*arguments[:count])
    return describe(x, Settings(*arguments[count:-1])), x, arguments[-1]


@taking_fp8
def forward(problem: Problem, x: Operands, backend: str) -> tuple[Tensor, Tensor]:
    return backends.load(choose(problem, backend)).forward(problem, x)


@taking_fp8
def forward_with_statistics(problem: Problem, x: Operands, backend: str) -> tuple[Tensor, Tensor, Statistics]:
    return backends.load(choose(problem, backend)).forward_with_statistics(problem, x)


@torch.library.custom_op("tilewise::attention", mutates_args=(), schema=f"({ARGUMENTS}, str backend) -> (Tensor, Tensor)")
def attention_op(*arguments) -> tuple[Tensor, Tensor]:
    problem, x, backend = described(arguments)
    out, lse = forward(problem, x, backend)
    return arranged(out, problem.new_q(problem.head_dim_v)), lse


@torch.library.custom_op("tilewise::attention_with_statistics", mutates_args=(),
                         schema=f"({ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor[])")
def attention_with_statistics_op(*arguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same, and the statistics that are named, in that order."""
    problem, x, backend = described(arguments)
    out, lse, found = forward_with_statistics(problem, x, backend)
    return arranged(out, problem.new_q(problem.head_dim_v)), lse, [t for t in found if t is not None]


def arranged(x: Tensor, promised: Tensor) -> Tensor:
    """x [.., H, .., D] with the memory order that was promised; itself where it has it."""
    return x if x.stride() == promised.stride() else promised.copy_(x)


@attention_op.register_fake
def _(*arguments):
    problem, _, _ = described(arguments)
    return problem.new_q(problem.head_dim_v), problem.new_lse()


@attention_with_statistics_op.register_fake
def _(*arguments):
    problem, _, _ = described(arguments)
    found = problem.new_statistics()
    return problem.new_q(problem.head_dim_v), problem.new_lse(), [t for t in found if t is not None]


@torch.library.custom_op(
    "tilewise::attention_backward", mutates_args=(),
    schema=f"(Tensor dout, Tensor dlse, Tensor out, Tensor lse, bool needs_bias, bool needs_sinks, bool[] needs_captured, "
           f"{ARGUMENTS}, str backend) -> Tensor[]")
def attention_backward_op(dout, dlse, out, lse, needs_bias, needs_sinks, needs_captured, *arguments) -> list[Tensor]:
    """[dq, dk, dv], then dbias, dsinks and the gradients of captured tensors where needed."""
    problem, x, backend = described(arguments)
    problem = replace(problem, learning=any(needs_captured))
    gradients: Gradients = backends.load(choose(problem, backend)).backward(
        problem, x, out, lse, dout, dlse, Needs(needs_bias, needs_sinks, tuple(needs_captured)))
    return ([arranged(g, promised) for g, promised in zip(gradients[:3], like_inputs(problem), strict=True)]
            + [g.contiguous() for g in (gradients.bias, gradients.sinks, *gradients.captured) if g is not None])


def like_inputs(problem: Problem) -> list[Tensor]:
    return [problem.new_q(problem.head_dim), problem.new_k(problem.head_dim), problem.new_k(problem.head_dim_v)]


@attention_backward_op.register_fake
def _(dout, dlse, out, lse, needs_bias, needs_sinks, needs_captured, *arguments):
    problem, x, _ = described(arguments)
    wanted = zip((x.bias, x.sinks, *x.captured), (needs_bias, needs_sinks, *needs_captured), strict=True)
    return like_inputs(problem) + [torch.empty_like(t, memory_format=torch.contiguous_format) for t, needed in wanted
                                   if needed and t is not None]


def _save(ctx, inputs, output):
    ctx.captured = len(inputs[TENSORS])
    ctx.save_for_backward(*inputs[:TENSORS], *inputs[TENSORS], *output[:2])
    ctx.rest = inputs[TENSORS + 1:]


def _backward(ctx, dout, dlse, *_statistics):
    saved = ctx.saved_tensors
    tensors, captured, (out, lse) = saved[:TENSORS], saved[TENSORS:TENSORS + ctx.captured], saved[TENSORS + ctx.captured:]
    learned = {lookup.slot for lookup in Graphs.of(Settings(*ctx.rest[2:-1]).program).learned}
    of_captured = [slot in learned and needed for slot, needed in enumerate(ctx.needs_input_grad[TENSORS])]
    needs = (*ctx.needs_input_grad[3:5], of_captured)
    found = iter(torch.ops.tilewise.attention_backward(dout, dlse, out, lse, *needs, *tensors, list(captured), *ctx.rest))
    dq, dk, dv = next(found), next(found), next(found)
    dbias, dsinks, *dcaptured = (next(found) if needed else None for needed in (*needs[:2], *of_captured))
    # torch takes an empty list for a list of tensors, and wants a list back
    nothing: list = [[] if isinstance(value, (list, tuple)) and not value else None for value in ctx.rest]
    return dq, dk, dv, dbias, dsinks, *[None] * (TENSORS - 5), dcaptured, *nothing


for of in (attention_op, attention_with_statistics_op):
    of.register_autograd(_backward, setup_context=_save)
