"""Where backends meet autograd, torch.compile and torch.func.

One operation, wired twice. While torch.compile or torch.export traces, it is the opaque custom op `tilewise::attention`
with a registered backward. Otherwise it is an `autograd.Function` that torch.func can transform; `tiled` and `reference`
are then differentiable themselves, to any order.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tilewise import backends, reference
from tilewise.backends import Gradients, Needs, flat_dims, over_leading
from tilewise.plan import choose
from tilewise.problem import TENSORS, Graphs, Operands, Problem, Settings, describe


def attention(problem: Problem, x: Operands, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem on a backend, "auto" or a name; differentiable."""
    if backend == "reference":
        return reference.attention(problem, x)  # plain torch: autograd and every compiler read it
    if torch.compiler.is_compiling():
        return torch.ops.tilewise.attention(*x, *problem.settings, backend)
    module = backends.load(choose(problem, backend))
    if hasattr(module, "attention"):
        return module.attention(problem, x)
    if not tracked(x):
        return module.forward(problem, x)
    return Native.apply(module, problem, (x.ints, x.floats), *x[:TENSORS], *x.captured)


def tracked(x: Operands) -> bool:
    """Whether autograd or torch.func follows what is computed from these operands; `apply` costs more than a small kernel."""
    tensors = (x.q, x.k, x.v, x.bias, x.sinks, *x.captured)
    return (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
            or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)))


class Native(torch.autograd.Function):
    """A backend with a forward and a backward of its own. Differentiable once, in reverse.

    Captured tensors are inputs like the others: autograd sees when they are changed in between, vmap when they are batched.
    """

    @staticmethod
    def forward(module: ModuleType, problem: Problem, numbers: Sequence, *tensors: Tensor | None):
        return module.forward(problem, operands(tensors, numbers))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.module, ctx.problem, ctx.numbers, *tensors = inputs
        ctx.save_for_backward(*output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, *tensors = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        needs = Needs(ctx.needs_input_grad[6], ctx.needs_input_grad[7], tuple(ctx.needs_input_grad[3 + TENSORS:]))
        gradients = NativeBackward.apply(ctx.module, ctx.problem, ctx.numbers, needs, out, lse, dout, dlse, *tensors)
        return None, None, None, *gradients[:5], *[None] * (TENSORS - 5), *gradients[5:]

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(once(ctx.module))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return over_leading(Native.apply, info, flat_dims(in_dims), *inputs)


class NativeBackward(torch.autograd.Function):
    """The backward of `Native`; its own derivative says what to do instead."""

    @staticmethod
    def forward(module: ModuleType, problem: Problem, numbers: Sequence, needs: Needs, out: Tensor, lse: Tensor,
                dout: Tensor, dlse: Tensor | None, *tensors: Tensor | None):
        *gradients, captured = module.backward(problem, operands(tensors, numbers), out, lse, dout, dlse, needs)
        return *gradients, *(captured or [None] * (len(tensors) - TENSORS))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.module = inputs[0]

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(once(ctx.module))

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(once(ctx.module))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return over_leading(NativeBackward.apply, info, flat_dims(in_dims), *inputs)


def operands(tensors: Sequence[Tensor | None], numbers: Sequence) -> Operands:
    """From the flat arguments of a Function: the single tensors, the captured ones; (ints, floats)."""
    return Operands._make((*tensors[:TENSORS], tensors[TENSORS:], *numbers))


def once(module: ModuleType) -> str:
    name = module.__name__.rpartition(".")[2]
    return (f"backend {name!r} has first derivatives in reverse mode only: "
            'use backend="tiled" for forward mode and higher orders')


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


@torch.library.custom_op("tilewise::attention", mutates_args=(), schema=f"({ARGUMENTS}, str backend) -> (Tensor, Tensor)")
def attention_op(*arguments) -> tuple[Tensor, Tensor]:
    problem, x, backend = described(arguments)
    out, lse = backends.load(choose(problem, backend)).forward(problem, x)
    return arranged(out, problem.new_q(problem.head_dim_v)), lse


def arranged(x: Tensor, promised: Tensor) -> Tensor:
    """x [.., H, .., D] with the memory order that was promised; itself where it has it."""
    return x if x.stride() == promised.stride() else promised.copy_(x)


@attention_op.register_fake
def _(*arguments):
    problem, _, _ = described(arguments)
    return problem.new_q(problem.head_dim_v), problem.new_lse()


@torch.library.custom_op(
    "tilewise::attention_backward", mutates_args=(),
    schema=f"(Tensor dout, Tensor dlse, Tensor out, Tensor lse, bool needs_bias, bool needs_sinks, bool[] needs_captured, "
           f"{ARGUMENTS}, str backend) -> Tensor[]")
def attention_backward_op(dout, dlse, out, lse, needs_bias, needs_sinks, needs_captured, *arguments) -> list[Tensor]:
    """[dq, dk, dv], then dbias, dsinks and the gradients of captured tensors where needed."""
    problem, x, backend = described(arguments)
    problem = replace(problem, learning=any(needs_captured), differentiated=True)
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
    ctx.save_for_backward(*inputs[:TENSORS], *inputs[TENSORS], *output)
    ctx.rest = inputs[TENSORS + 1:]


def _backward(ctx, dout, dlse):
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


attention_op.register_autograd(_backward, setup_context=_save)
