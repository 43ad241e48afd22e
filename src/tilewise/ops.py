"""Where backends meet autograd, torch.compile and torch.func.

One operation, wired twice. While torch.compile or torch.export traces, it is the opaque custom op `tilewise::attention`
with a registered backward. Otherwise it is an `autograd.Function` that torch.func can transform; `tiled` and `reference`
are then differentiable themselves, to any order.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from tilewise import backends, reference
from tilewise.backends import Gradients, Needs, flat_dims, over_leading
from tilewise.plan import choose
from tilewise.problem import Graphs, Operands, Problem, Settings, describe


def attention(problem: Problem, x: Operands, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem on a backend, "auto" or a name; differentiable."""
    if backend == "reference":
        return reference.attention(problem, x)  # plain torch: autograd and every compiler read it
    if torch.compiler.is_compiling():
        return torch.ops.tilewise.attention(*x, *problem.settings, backend)
    module = backends.load(choose(problem, backend))
    if hasattr(module, "attention"):
        return module.attention(problem, x)
    return Native.apply(module, problem, (x.ints, x.floats), *x[:6], *x.captured)


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
        needs = Needs(ctx.needs_input_grad[6], ctx.needs_input_grad[7], tuple(ctx.needs_input_grad[9:]))
        gradients = NativeBackward.apply(ctx.module, ctx.problem, ctx.numbers, needs, out, lse, dout, dlse, *tensors)
        return None, None, None, *gradients[:5], None, *gradients[5:]

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
        return *gradients, *(captured or [None] * (len(tensors) - 6))

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
    """From the flat arguments of a Function: q, k, v, bias, sinks, rng and captured tensors; (ints, floats)."""
    return Operands._make((*tensors[:6], tensors[6:], *numbers))


def once(module: ModuleType) -> str:
    name = module.__name__.rpartition(".")[2]
    return (f"backend {name!r} has first derivatives in reverse mode only: "
            'use backend="tiled" for forward mode and higher orders')


# ---- while tracing --------------------------------------------------------------------------------------------------

@torch.library.custom_op("tilewise::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, rng: Tensor | None,
                 captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], scale: float, dropout: int,
                 program: str, layout: str, precision: str, deterministic: bool, batch_invariant: bool,
                 backend: str) -> tuple[Tensor, Tensor]:
    x = Operands(q, k, v, bias, sinks, rng, captured, ints, floats)
    problem = describe(x, Settings(scale, dropout, program, layout, precision, deterministic, batch_invariant))
    out, lse = backends.load(choose(problem, backend)).forward(problem, x)
    return arranged(problem, out), lse


def arranged(problem: Problem, x: Tensor) -> Tensor:
    """x [B, H, S, D] with the memory order that the problem's layout promises; itself where it has it."""
    heads, seqlen, dim = x.shape[1:]
    promised = problem.empty(heads, seqlen, dim, x.dtype)
    return x if x.stride() == promised.stride() else promised.copy_(x)


@attention_op.register_fake
def _(q, k, v, bias, sinks, rng, captured, ints, floats, *settings_and_backend):
    x = Operands(q, k, v, bias, sinks, rng, captured, ints, floats)
    problem = describe(x, Settings(*settings_and_backend[:-1]))
    return problem.empty(problem.heads, problem.seqlen_q, problem.head_dim_v), problem.empty_lse()


@torch.library.custom_op("tilewise::attention_backward", mutates_args=())
def attention_backward_op(dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, needs_bias: bool, needs_sinks: bool,
                          needs_captured: Sequence[bool], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
                          sinks: Tensor | None, rng: Tensor | None,
                          captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], scale: float,
                          dropout: int, program: str, layout: str, precision: str, deterministic: bool,
                          batch_invariant: bool, backend: str) -> list[Tensor]:
    """[dq, dk, dv], then dbias, dsinks and the gradients of captured tensors where needed."""
    x = Operands(q, k, v, bias, sinks, rng, captured, ints, floats)
    problem = describe(x, Settings(scale, dropout, program, layout, precision, deterministic, batch_invariant))
    module = backends.load(choose(problem, backend))
    gradients: Gradients = module.backward(problem, x, out, lse, dout, dlse,
                                            Needs(needs_bias, needs_sinks, tuple(needs_captured)))
    return ([arranged(problem, g) for g in gradients[:3]]
            + [g.contiguous() for g in (gradients.bias, gradients.sinks, *gradients.captured) if g is not None])


@attention_backward_op.register_fake
def _(dout, dlse, out, lse, needs_bias, needs_sinks, needs_captured, q, k, v, bias, sinks, rng, captured, ints, floats,
      *settings_and_backend):
    problem = describe(Operands(q, k, v, bias, sinks, rng, captured, ints, floats), Settings(*settings_and_backend[:-1]))
    gradients = [problem.empty(problem.heads, problem.seqlen_q, problem.head_dim),
                 problem.empty(problem.kv_heads, problem.seqlen_k, problem.head_dim),
                 problem.empty(problem.kv_heads, problem.seqlen_k, problem.head_dim_v)]
    return gradients + [torch.empty_like(t, memory_format=torch.contiguous_format)
                        for t, needed in zip((bias, sinks, *captured), (needs_bias, needs_sinks, *needs_captured), strict=True)
                        if needed]


def _save(ctx, inputs, output):
    tensors, ctx.captured = inputs[:6], len(inputs[6])
    ctx.save_for_backward(*tensors, *inputs[6], *output)
    ctx.rest = inputs[7:]


def _backward(ctx, dout, dlse):
    saved = ctx.saved_tensors
    tensors, captured, (out, lse) = saved[:6], saved[6:6 + ctx.captured], saved[6 + ctx.captured:]
    learned = {lookup.slot for lookup in Graphs.of(ctx.rest[4]).learned}
    of_captured = [slot in learned and needed for slot, needed in enumerate(ctx.needs_input_grad[6])]
    needs = (*ctx.needs_input_grad[3:5], of_captured)
    found = iter(torch.ops.tilewise.attention_backward(dout, dlse, out, lse, *needs, *tensors, list(captured), *ctx.rest))
    dq, dk, dv = next(found), next(found), next(found)
    dbias, dsinks, *dcaptured = (next(found) if needed else None for needed in (*needs[:2], *of_captured))
    # torch takes an empty list for a list of tensors, and wants a list back
    nothing: list = [[] if isinstance(value, (list, tuple)) and not value else None for value in ctx.rest]
    return dq, dk, dv, dbias, dsinks, None, dcaptured, *nothing


attention_op.register_autograd(_backward, setup_context=_save)
