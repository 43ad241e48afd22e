"""What was found out about a call, and the call made with it, in the caller's order of dimensions."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewise import backends, known, ops
from tilewise.backends import Needs
from tilewise.derivatives import Call, followed, gradients
from tilewise.known import state
from tilewise.plan import choose
from tilewise.problem import TENSORS, Operands, Problem
from tilewise.state import sink_gradient
from tilewise.statistics import Statistics


class Found:
    """What was found out about a call.

    launch: the backend's forward of operands that lie like these, if it has one; otherwise `ops` computes them.
    """
    __slots__ = ("backend", "backwards", "call", "captured", "floats", "held", "ints", "keys", "launch", "lse", "out",
                 "problem")

    def __init__(self, problem: Problem, x: Operands, backend: str, settled: bool = True):
        self.problem, self.backend, self.ints, self.floats = problem, choose(problem, backend), x.ints, x.floats
        module = backends.load(self.backend)
        self.call = Call(module, problem, (x.ints, x.floats))
        self.keys: list[tuple] = []     # all that it is kept under
        self.held: tuple[tuple[Callable[[], Any], tuple | None], ...] = ()
        self.captured: tuple[tuple[Callable[[], Tensor | None], tuple | None], ...] = ()
        self.backwards: dict[tuple, Callable[..., None] | None] = {}    # by all strides
        self.launch: Callable[..., None] | None = None
        self.out: Tensor
        self.lse: Tensor
        if settled and hasattr(module, "prepared") and not (problem.statistics or problem.quantized):
            packed = problem.packed_q is not None
            out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
            self.launch = module.prepared(problem, x, out)
            self.out = shape_of(given_order(out, problem.layout, packed))
            self.lse = shape_of(lse[0] if packed else lse)

    def keep(self, key: tuple, held: tuple, captured: Sequence[Tensor]) -> None:
        """Remembers this for as long as what it was found for is there."""
        given = [x for x in held if isinstance(x, Tensor)]
        if any(x.is_inference() for x in (*given, *captured)):
            return                      # no one is told when these are written to
        keys = self.keys = [key]
        entries = known.calls           # when Python ends, modules may go before what is held

        def forget(_: Any) -> None:
            for key in keys:
                entries.pop(key, None)

        def weakly(x: Tensor) -> tuple[Callable[[], Tensor | None], tuple | None]:
            """A tensor that someone else keeps; one made of the mask given shares its memory, and goes and changes with it."""
            if any(x is not t and x.data_ptr() == t.data_ptr() for t in given):
                alias = x.detach()
                return (lambda: alias), None
            return weakref.ref(x), state(x)

        self.held = tuple((weakref.ref(x, forget), state(x)) for x in held)
        self.captured = tuple(weakly(x) for x in captured)
        known.remember(key, self)

    def keep_also(self, key: tuple) -> None:
        """Remembers this under one more key, as it was when it was kept: for as long, and not if it was not."""
        if self.keys:
            if key not in self.keys:
                self.keys.append(key)
            known.remember(key, self)

    def unchanged(self, held: tuple) -> list[Tensor] | None:
        """The captured tensors, if the objects that the call names are those of then, and all are as they were."""
        for (at, before), given in zip(self.held, held, strict=True):
            if at() is not given or (before is not None and state(given) != before):
                return None
        found: list[Tensor] = []
        for at, before in self.captured:
            x = at()
            if x is None or (before is not None and state(x) != before):
                return None
            found.append(x)
        return found

    def compute(self, x: Operands, with_lse: bool) -> tuple[Tensor, Tensor | None, Statistics | None]:
        """out, lse and statistics, differentiable, in the shapes of the caller's q; q, k and v of x as the caller gave them."""
        if self.launch is None:
            return through_ops(self.problem, self.heads_first(x), self.backend)
        if not ops.recorded(x):
            out, lse = self.run(x, with_lse)
        elif with_lse:
            out, lse = record(self, x, True, *given(x))
        else:
            out, lse = record(self, x, False, *given(x)), None
        return out, lse, None

    def run(self, x: Operands, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
        """out and lse, by the backend."""
        out, packed = torch.empty_like(self.out), self.problem.packed_q is not None
        if packed:                      # what no sequence holds
            out.zero_()
        assert self.launch is not None
        if not with_lse:
            self.launch(x, out=out)
            return out, None
        lse = torch.empty_like(self.lse)
        if packed:
            lse.fill_(-torch.inf)
        self.launch(x, out=out, lse=lse)
        return out, lse

    def backward_of(self, dout: Tensor, out: Tensor, tensors: Sequence[Tensor | None]) -> Callable[..., None] | None:
        """The backend's backward for such a dout, if it has one for these operands."""
        if dout.stride(-1) != 1 and dout.shape[-1] > 1:
            return None                 # such as the expanded gradient of a sum: it has to be copied
        # hooks on saved tensors may have moved them
        key = tuple([None if t is None else t.stride() for t in (dout, out, *tensors)])
        if key not in self.backwards:
            make_it = getattr(self.call.module, "prepared_backward", None)
            x, order = self.heads_first(self.call.operands(tensors)), self.problem.layout
            self.backwards[key] = make_it and make_it(self.problem, x, heads_first(out, order), heads_first(dout, order))
        return self.backwards[key]

    def run_backward(self, run: Callable[..., None], tensors: Sequence[Tensor | None], out: Tensor, lse: Tensor, dout: Tensor,
                     dlse: Tensor | None, needs: Needs) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, None for the bias, dsinks."""
        packed = self.problem.packed_q is not None
        x, delta = self.call.operands(tensors), torch.zeros_like(lse)
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x.q, x.k, x.v))
        if packed:                      # what no sequence holds
            for t in (dq, dk, dv):
                t.zero_()
        run(x, out=out, lse=lse, dout=dout, dlse=None if dlse is None else dlse.contiguous(), delta=delta, dq=dq, dk=dk, dv=dv)
        dsinks = None
        if needs.sinks and x.sinks is not None:
            dsinks = sink_gradient(x.sinks, *((t[None] if packed else t) for t in (lse, delta)))
        return dq, dk, dv, None, dsinks

    def heads_first(self, x: Operands) -> Operands:
        """Operands as the problem speaks of them, [.., heads, .., dim]; keys and values of a cache are."""
        order, cached = self.problem.layout, self.problem.cached
        k, v = (t if cached else heads_first(t, order) for t in (x.k, x.v))
        return x._replace(q=heads_first(x.q, order), k=k, v=v)


class Recorded(torch.autograd.Function):
    """out, or (out, lse), of a call that only autograd follows, in the caller's order of dimensions.

    Like `derivatives.Native`, without what torch.func's transforms need, which costs more than a small kernel; and every
    argument does, so that operands which are not there are none.
    """

    @staticmethod
    def forward(ctx, found: Found, x: Operands, with_lse: bool, *tensors: Tensor):
        out, lse = found.run(x)
        ctx.found, ctx.there = found, tuple([t is not None for t in x[:TENSORS]])
        ctx.save_for_backward(out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        found: Found = ctx.found
        out, lse, *tensors = ctx.saved_tensors
        singles = sum(ctx.there)
        tensors = [*spread(ctx.there, tensors), *tensors[singles:]]
        wanted = spread(ctx.there, ctx.needs_input_grad[3:])
        needs = Needs(bool(wanted[3]), bool(wanted[4]), ctx.needs_input_grad[3 + singles:])
        run = None
        if dout is not None and not (needs.bias or followed() or any(needs.captured)):
            run = found.backward_of(dout, out, tensors)
        captured: Sequence[Tensor | None]
        if run is not None:
            single, captured = found.run_backward(run, tensors, out, lse, dout, dlse, needs), [None] * (len(tensors) - TENSORS)
        else:
            q, k, v, *others = tensors
            packed, order = found.problem.packed_q is not None, found.problem.layout
            if packed:
                lse, dlse = lse[None], None if dlse is None else dlse[None]
            q, k, v, out = (heads_first(x, order) for x in (q, k, v, out))
            dout = torch.zeros_like(out) if dout is None else heads_first(dout, order)
            dq, dk, dv, *others = gradients(found.call, needs, out, lse, dout, dlse, [q, k, v, *others])
            single = (*(given_order(x, order, packed) for x in (dq, dk, dv) if x is not None), *others[:2])
            captured = others[2:]
        single = (*single, *[None] * (TENSORS - len(single)))
        return None, None, None, *(x for x, there in zip(single, ctx.there, strict=True) if there), *captured


# Without what `apply` of torch.autograd.Function does for transforms, which are none here.
record = super(torch.autograd.Function, Recorded).apply


def given(x: Operands) -> list[Tensor]:
    """The tensors that are there."""
    singles: Sequence[Any] = x[:TENSORS]
    return [t for t in (*singles, *x.captured) if t is not None]


def spread(there: Sequence[bool], found: Sequence[Any]) -> list[Any]:
    """What was found for those that are there, None for the others."""
    following = iter(found)
    return [next(following) if one else None for one in there]


def through_ops(problem: Problem, x: Operands, backend: str) -> tuple[Tensor, Tensor, Statistics | None]:
    """The same by `ops`, of any operands."""
    packed, found = problem.packed_q is not None, None
    if problem.statistics:
        out, lse, found = ops.attention_with_statistics(problem, x, backend)
    else:
        out, lse = ops.attention(problem, x, backend)
    if packed:
        lse = lse[0]
    if packed and found is not None:
        max_score, entropy, key_mass = found
        found = Statistics(None if max_score is None else max_score[0], None if entropy is None else entropy[0],
                           key_mass if key_mass is None or problem.cached else key_mass[0])
    return given_order(out, problem.layout, packed), lse, found


def shape_of(x: Tensor) -> Tensor:
    """A tensor like x in shape, dtype and device that holds one number: a pattern for `torch.empty_like`, in rows' order."""
    return torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)


def heads_first(x: Tensor, order: str) -> Tensor:
    """[slots, heads, rows, head_dim] of a tensor in the caller's order, packed if it has three dimensions."""
    if x.dim() == 3:
        return x.transpose(0, 1)[None]
    return x.transpose(1, 2) if order == "bshd" else x


def given_order(x: Tensor, order: str, packed: bool) -> Tensor:
    """The opposite."""
    if packed:
        return x[0].transpose(0, 1)
    return x.transpose(1, 2) if order == "bshd" else x
