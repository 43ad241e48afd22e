"""Native backends as differentiable functions: forward mode, reverse mode and their compositions of second order.

A backend computes four things (`backends/__init__.py`), x being q, k, v, bias and sinks, u a direction of x:

    F(x) = (out, lse)                 `forward`             Native
    B(x; g) = F'(x)^T g               `backward`            NativeBackward
    T(x; u) = F'(x) u                 `tangent`             NativeTangent
    H(x; u, g) = B'(x; g) u           `backward_tangent`    NativeBackwardTangent

B is the gradient of <g, F>, so its own derivative by x is symmetric, and the four close under differentiation:

    of          forward mode                       reverse mode, c being a cotangent
    F           T(x; u)                            B(x; g)
    B           H(x; u, g) + B(x; g')              by x: H(x; c, g);  by g: T(x; c)
    T(x; u)     by u alone: T(x; u')               by x: H(x; u, g);  by u: B(x; g)
    H(x; u, g)  by u alone: H(x; u', g)            by u alone: H(x; c, g)

What is missing, third derivatives and forward mode of forward mode, raises; so do derivatives of second order by captured
tensors. `out` and `lse` are arguments, as saved from F, but no variables: what depends on them is in the formulas.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tilewise.backends import Needs, Tangents, flat_dims, over_leading
from tilewise.problem import TENSORS, Operands, Problem

X = len(Tangents._fields)               # of an operation's tensors, the first: those that have tangents
Some = Tensor | None
NONE: tuple[Some, ...] = (None,) * X

BEYOND = "third derivatives and forward mode of forward mode"
TABLES = "tangents of captured tensors and second derivatives by them"


class Call(NamedTuple):
    """What an operation is of, beside its tensors."""
    module: ModuleType
    problem: Problem
    numbers: tuple[Sequence[int], Sequence[float]]      # of the program

    def operands(self, tensors: Sequence[Some]) -> Operands:
        """From the flat arguments of a Function: the single tensors, then the captured ones."""
        return Operands._make((*tensors[:TENSORS], tensors[TENSORS:], *self.numbers))

    def primitive(self, name: str) -> Callable[..., Any]:
        """`tangent` or `backward_tangent` of the backend, if it has them for this problem."""
        if not hasattr(self.module, name):
            raise self.refusal("forward mode and higher orders", "has first derivatives in reverse mode only")
        reason = self.module.supports_tangents(self.problem)
        if reason is not None:
            raise self.refusal("these", f"cannot compute forward mode and second derivatives here: {reason}")
        return getattr(self.module, name)

    def refusal(self, instead: str,
                has: str = "has first and second derivatives by q, k, v, bias and sinks") -> NotImplementedError:
        name = self.module.__name__.rpartition(".")[2]
        return NotImplementedError(f'backend {name!r} {has}: use backend="tiled" for {instead}')


def differentiable(module: ModuleType, problem: Problem, x: Operands) -> tuple[Any, ...]:
    """(out, lse) of a backend, followed by autograd and torch.func; then statistics if the problem names some."""
    return Native.apply(Call(module, problem, (x.ints, x.floats)), *x[:TENSORS], *x.captured)


class Native(torch.autograd.Function):
    """(out, lse) by a backend with a forward and a backward of its own; then statistics, which have no derivatives.

    Captured tensors are inputs like the others: autograd sees when they are changed in between, vmap when they are batched.
    """

    @staticmethod
    def forward(of: Call, *tensors: Some):
        if not of.problem.statistics:
            return of.module.forward(of.problem, of.operands(tensors))
        out, lse, found = of.module.forward_with_statistics(of.problem, of.operands(tensors))
        return out, lse, *found

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.of, *tensors = inputs
        out, lse, *statistics = output
        ctx.mark_non_differentiable(*(x for x in statistics if x is not None))
        ctx.statistics = len(statistics)
        keep(ctx, out, lse, *tensors)

    @staticmethod
    def backward(ctx, dout, dlse, *_statistics):
        out, lse, *tensors = ctx.saved_tensors
        if dout is None and dlse is None:           # so in a second derivative: autograd walks past what nothing flows into
            return (None,) * (1 + len(tensors))
        needs = Needs(ctx.needs_input_grad[4], ctx.needs_input_grad[5], ctx.needs_input_grad[1 + TENSORS:])
        dout = torch.zeros_like(out) if dout is None else dout
        found = gradients(ctx.of, needs, out, lse, dout, dlse, tensors)
        return None, *found[:X], *[None] * (TENSORS - X), *found[X:]

    @staticmethod
    def jvp(ctx, _of, *tangents):
        out, lse, *tensors = ctx.saved_tensors
        return *NativeTangent.apply(ctx.of, out, lse, *moving(ctx.of, tangents), *tensors), *[None] * ctx.statistics

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return over_leading(Native.apply, info, flat_dims(in_dims), *inputs)


def gradients(of: Call, needs: Needs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Some,
              tensors: list[Some]) -> tuple[Some, ...]:
    """B(x; g) of an operation's tensors, as `NativeBackward` gives it; differentiable where someone follows it."""
    if not followed():
        return NativeBackward.forward(of, needs, out, lse, dout, dlse, *tensors)
    if torch.is_grad_enabled() and any(needs.captured):
        tensors = [*tensors[:TENSORS], *refusing(of, TABLES, tensors[TENSORS:])]
    return NativeBackward.apply(of, needs, out, lse, dout, dlse, *tensors)


def followed() -> bool:
    """Whether what is computed now may be differentiated or transformed; `apply` costs more than a small kernel."""
    return torch.is_grad_enabled() or transformed()


def transformed() -> bool:
    """Whether torch.func or forward mode is at work, which follow what requires no gradient."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class NativeBackward(torch.autograd.Function):
    """The gradients of q, k, v, bias, sinks and of captured tensors; None where not needed."""

    @staticmethod
    def forward(of: Call, needs: Needs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Some, *tensors: Some):
        *gradients, captured = of.module.backward(of.problem, of.operands(tensors), out, lse, dout, dlse, needs)
        return *gradients, *(captured or [None] * (len(tensors) - TENSORS))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.of, ctx.needs, *tensors = inputs
        keep(ctx, *tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        out, lse, dout, dlse, *tensors = ctx.saved_tensors
        if all(c is None for c in cotangents):
            return *[None] * 6, *[None] * len(tensors)
        u = moving(ctx.of, cotangents, first=X)
        by_dout, by_dlse, *by_x = ctx.needs_input_grad[4:6 + X]
        of_out, of_lse = NativeTangent.apply(ctx.of, out, lse, *u, *tensors)
        of_x = second(ctx.of, by_x, (out, lse, of_out, of_lse, dout, dlse), u, tensors)
        return (None, None, None, None, of_out if by_dout else None, of_lse if by_dlse else None, *of_x,
                *[None] * (len(tensors) - X))

    @staticmethod
    def jvp(ctx, _of, _needs, of_out, of_lse, of_dout, of_dlse, *tangents):
        out, lse, dout, dlse, *tensors = ctx.saved_tensors
        u, parts = moving(ctx.of, tangents), []
        if any(t is not None for t in u):
            if any(ctx.needs.captured):
                raise ctx.of.refusal(TABLES)
            if of_out is None:
                of_out, of_lse = NativeTangent.apply(ctx.of, out, lse, *u, *tensors)
            by_x = (True, True, True, ctx.needs.bias, ctx.needs.sinks)
            of_x = second(ctx.of, by_x, (out, lse, of_out, of_lse, dout, dlse), u, tensors)
            parts.append((*of_x, *[None] * (len(tensors) - TENSORS)))
        if of_dout is not None or of_dlse is not None:
            of_dout = torch.zeros_like(dout) if of_dout is None else of_dout
            parts.append(NativeBackward.apply(ctx.of, ctx.needs, out, lse, of_dout, of_dlse, *tensors))
        return parts[0] if len(parts) == 1 else tuple(a if a is None else a + b for a, b in zip(*parts, strict=True))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return over_leading(NativeBackward.apply, info, flat_dims(in_dims), *inputs)


class NativeTangent(torch.autograd.Function):
    """The tangents of out and lse in the direction u of q, k, v, bias and sinks."""

    @staticmethod
    def forward(of: Call, out: Tensor, lse: Tensor, *tensors: Some):
        return of.primitive("tangent")(of.problem, of.operands(tensors[X:]), Tangents(*tensors[:X]), out, lse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.of, *tensors = inputs
        keep(ctx, *output, *tensors)

    @staticmethod
    def backward(ctx, dout, dlse):
        of_out, of_lse, out, lse, *tensors = ctx.saved_tensors
        u, tensors = tensors[:X], tensors[X:]
        dout = torch.zeros_like(out) if dout is None else dout
        by_u, by_x = ctx.needs_input_grad[3:3 + X], ctx.needs_input_grad[3 + X:3 + 2 * X]
        of_u = NONE
        if any(by_u):
            gradients = NativeBackward.apply(ctx.of, Needs(*by_u[3:]), out, lse, dout, dlse, *tensors)
            of_u = wanted(gradients, by_u)
        of_x = second(ctx.of, by_x, (out, lse, of_out, of_lse, dout, dlse), u, tensors)
        return None, None, None, *of_u, *of_x, *[None] * (len(tensors) - X)

    @staticmethod
    def jvp(ctx, _of, _out, _lse, *tangents):
        _, _, out, lse, *tensors = ctx.saved_tensors
        if any(t is not None for t in tangents[X:]):
            raise ctx.of.refusal(BEYOND)
        return NativeTangent.apply(ctx.of, out, lse, *tangents[:X], *tensors[X:])

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return over_leading(NativeTangent.apply, info, flat_dims(in_dims), *inputs)


class NativeBackwardTangent(torch.autograd.Function):
    """The derivative of `NativeBackward` in the direction u, dout and dlse fixed; not that of captured tensors' gradients.

    It is linear in u and symmetric, so its derivatives by u are itself; `second` sees to it that all else refuses.
    """

    @staticmethod
    def forward(of: Call, needs: Needs, out: Tensor, lse: Tensor, of_out: Tensor, of_lse: Tensor, dout: Tensor, dlse: Some,
                *tensors: Some):
        function = of.primitive("backward_tangent")
        problem, x = of.problem.curved(of.operands(tensors[X:]))
        return tuple(function(problem, x, Tangents(*tensors[:X]), out, lse, of_out, of_lse, dout, dlse, needs)[:X])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.of, ctx.needs, *tensors = inputs
        keep(ctx, *tensors)

    @staticmethod
    def along(ctx, by_x: Sequence[bool], u: Sequence[Some]) -> tuple[Some, ...]:
        """The same in another direction."""
        out, lse, _of_out, _of_lse, dout, dlse, *tensors = ctx.saved_tensors
        of_out, of_lse = NativeTangent.apply(ctx.of, out, lse, *u, *tensors[X:])
        return second(ctx.of, by_x, (out, lse, of_out, of_lse, dout, dlse), u, tensors[X:])

    @staticmethod
    def backward(ctx, *cotangents):
        by_u = ctx.needs_input_grad[8:8 + X]
        nothing = not any(by_u) or all(c is None for c in cotangents)
        of_u = NONE if nothing else NativeBackwardTangent.along(ctx, by_u, cotangents)
        return *[None] * 8, *of_u, *[None] * (len(ctx.saved_tensors) - 6 - X)

    @staticmethod
    def jvp(ctx, _of, _needs, *tangents):
        return NativeBackwardTangent.along(ctx, (True, True, True, ctx.needs.bias, ctx.needs.sinks), tangents[6:6 + X])

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return over_leading(NativeBackwardTangent.apply, info, flat_dims(in_dims), *inputs)


def second(of: Call, by_x: Sequence[bool], known: Sequence[Some], u: Sequence[Some],
           tensors: Sequence[Some]) -> tuple[Some, ...]:
    """H(x; u, g) where wanted. known: out, lse, their tangents in the direction u, dout and dlse."""
    if not any(by_x):
        return NONE
    known = (*known[:4], *refusing(of, BEYOND, known[4:]))
    found = NativeBackwardTangent.apply(of, Needs(by_x[3], by_x[4]), *known, *u, *refusing(of, BEYOND, tensors))
    return wanted(found, by_x)


def wanted(gradients: Sequence[Some], by: Sequence[bool]) -> tuple[Some, ...]:
    """The gradients of q, k, v, bias and sinks that autograd asks for; it takes no others."""
    return tuple(g if asked else None for g, asked in zip(gradients, by, strict=False))


def moving(of: Call, tangents: Sequence[Some], first: int = TENSORS) -> tuple[Some, ...]:
    """The tangents of q, k, v, bias and sinks; raises where a captured tensor, from `first` on, has one."""
    if any(t is not None and t.is_floating_point() for t in tangents[first:]):
        raise of.refusal(TABLES)
    return tuple(tangents[:X])


class Refuse(torch.autograd.Function):
    """A tensor as it is; whoever asks for a derivative by it is told why there is none."""

    @staticmethod
    def forward(of: Call, instead: str, x: Tensor):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.of, ctx.instead, _ = inputs

    @staticmethod
    def backward(ctx, _gradient):
        raise ctx.of.refusal(ctx.instead)

    @staticmethod
    def jvp(ctx, *_tangents):
        raise ctx.of.refusal(ctx.instead)

    @staticmethod
    def vmap(info, in_dims, of, instead, x):
        return Refuse.apply(of, instead, x), in_dims[2]


def refusing(of: Call, instead: str, tensors: Sequence[Some]) -> list[Some]:
    """The tensors, those that a derivative could be asked of as `Refuse` hands them on."""
    return [t if t is None or not t.is_floating_point() else Refuse.apply(of, instead, t) for t in tensors]


def keep(ctx, *tensors: Some) -> None:
    """Tensors for backward and jvp. Cotangents and tangents of nothing stay None."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)
