"""What torch's functions become in a graph (`capture.py`): a rule for each name, given the recorder and its arguments.

A rule has the parameters of the torch function, and raises TypeError for what it does not support.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tilewise.trace import graph
from tilewise.trace.graph import BITWISE, COMPARISONS, OF_FLOATS, Expr, cast, function, where, wrap

if TYPE_CHECKING:
    from tilewise.trace.capture import Recorder


def _binary(op: Callable, swap: bool = False) -> Callable:
    def rule(recorder: Recorder, input: Any, other: Any, *, out=None) -> Expr:
        a, b = recorder.expr(input), recorder.expr(other)
        return op(b, a) if swap else op(a, b)
    return rule


def _unary(op: Callable) -> Callable:
    return lambda recorder, input: op(recorder.expr(input))


def _logical(op: str) -> Callable:
    return _binary(lambda a, b: graph.bitwise(op, cast("bool", a), cast("bool", b)))


def _add(recorder: Recorder, input: Any, other: Any, *, alpha=1) -> Expr:
    other = recorder.expr(other)
    return recorder.expr(input) + (other if alpha == 1 else other * recorder.expr(alpha))


def _sub(recorder: Recorder, input: Any, other: Any, *, alpha=1) -> Expr:
    other = recorder.expr(other)
    return recorder.expr(input) - (other if alpha == 1 else other * recorder.expr(alpha))


def _div(recorder: Recorder, input: Any, other: Any, *, rounding_mode=None) -> Expr:
    a, b = recorder.expr(input), recorder.expr(other)
    if rounding_mode is None:
        return a / b
    if rounding_mode == "floor":
        return a // b
    raise TypeError(f"rounding_mode={rounding_mode!r} is not supported")


def _where(recorder: Recorder, condition: Any, input: Any, other: Any) -> Expr:
    chosen = recorder.expr(condition)
    if chosen.kind != "b":
        raise TypeError("expected a boolean condition")
    return where(chosen, recorder.expr(input), recorder.expr(other))


def _extreme(op: Callable) -> Callable:
    def rule(recorder: Recorder, input: Any, other: Any = None) -> Expr:
        if other is None or isinstance(other, (int, float)):
            raise TypeError("a reduction is not supported: a mask or score function sees one score")
        return op(recorder.expr(input), recorder.expr(other))
    return rule


def _clamp(recorder: Recorder, input: Any, min: Any = None, max: Any = None) -> Expr:
    x = recorder.expr(input)
    x = x if min is None else graph.maximum(x, recorder.expr(min))
    return x if max is None else graph.minimum(x, recorder.expr(max))


DTYPES = {torch.bool: "bool", torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16",
          **dict.fromkeys((torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8), "int")}


def _to(recorder: Recorder, input: Any, *args: Any, dtype: Any = None, **_) -> Expr:
    x = recorder.expr(input)
    named = [getattr(a, "dtype", a) for a in (*args, dtype)]      # of a tensor its own
    dtype = next((a for a in named if isinstance(a, torch.dtype)), None)
    if dtype is None:
        return x
    if dtype not in DTYPES:
        raise TypeError(f"{dtype} is not supported: scores are computed in fp32")
    return cast(DTYPES[dtype], x)


def _filled(value: Any) -> Callable:
    def rule(recorder: Recorder, input: Any, *_, dtype=None, **__) -> Expr:
        return _to(recorder, value, input.dtype if dtype is None else dtype)
    return rule


def _full_like(recorder: Recorder, input: Any, fill_value: Any, *, dtype=None, **_) -> Expr:
    return _to(recorder, fill_value, input.dtype if dtype is None else dtype)


def _new_full(recorder: Recorder, input: Any, size: Any, fill_value: Any, *, dtype=None, **_) -> Expr:
    return _full_like(recorder, input, fill_value, dtype=dtype)


def _masked_fill(recorder: Recorder, input: Any, mask: Any, value: Any) -> Expr:
    return _where(recorder, mask, value, input)


ZERO, NOTHING, ONE = wrap(0), wrap(0.0), wrap(1.0)  # single nodes, so that equal expressions stay equal


def _relu(x: Expr) -> Expr:
    return graph.maximum(x, NOTHING if x.kind == "f" else ZERO)


def _sign(x: Expr) -> Expr:
    zero = NOTHING if x.kind == "f" else ZERO
    return cast("float" if x.kind == "f" else "int", x > zero) - cast("int", x < zero)


def _square(recorder: Recorder, input: Any) -> Expr:
    x = recorder.expr(input)
    return x * x


RULES: dict[str, Callable[..., Expr]] = {
    **dict.fromkeys(("add",), _add), **dict.fromkeys(("sub", "subtract"), _sub),
    "rsub": lambda recorder, input, other: recorder.expr(other) - recorder.expr(input),
    **dict.fromkeys(("mul", "multiply"), _binary(lambda a, b: a * b)),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _div),
    **dict.fromkeys(("floordiv", "floor_divide"), _binary(lambda a, b: a // b)),
    **dict.fromkeys(("mod", "remainder"), _binary(lambda a, b: a % b)),
    "pow": _binary(graph.power), "square": _square,
    **{name: _binary(lambda a, b, op=name: graph.comparison(op, a, b)) for name in COMPARISONS},
    **{long: _binary(lambda a, b, op=short: graph.comparison(op, a, b)) for long, short in dict(
        less="lt", less_equal="le", greater="gt", greater_equal="ge", not_equal="ne").items()},
    **{name: _binary(lambda a, b, op=name: graph.bitwise(op, a, b)) for name in BITWISE},
    **{f"bitwise_{name}": _binary(lambda a, b, op=name: graph.bitwise(op, a, b)) for name in BITWISE},
    **{f"logical_{name}": _logical(name) for name in BITWISE},
    **dict.fromkeys(("invert", "bitwise_not"), _unary(lambda x: ~x)),
    "logical_not": _unary(lambda x: ~cast("bool", x)),
    "where": _where, "clamp": _clamp, "clip": _clamp,
    "clamp_min": lambda recorder, input, min: _clamp(recorder, input, min),
    "clamp_max": lambda recorder, input, max: _clamp(recorder, input, None, max),
    **dict.fromkeys(("min", "minimum"), _extreme(graph.minimum)), **dict.fromkeys(("max", "maximum"), _extreme(graph.maximum)),
    "relu": lambda recorder, input, inplace=False: _relu(recorder.expr(input)), "sign": _unary(_sign),
    "full_like": _full_like, "new_full": _new_full, "masked_fill": _masked_fill,
    **dict.fromkeys(("neg", "negative"), _unary(lambda x: -x)), **dict.fromkeys(("abs", "absolute"), _unary(abs)),
    **{name: _unary(lambda x, op=name: x if x.kind == "i" and op in ("floor", "ceil") else function(op, x))
       for name in OF_FLOATS},
    "reciprocal": _unary(lambda x: ONE / x),
    **dict.fromkeys(("to", "type", "type_as"), _to),
    **{name: _unary(lambda x, target=target: cast(target, x)) for name, target in dict(
        float="float", int="int", long="int", bool="bool", half="fp16", bfloat16="bf16").items()},
    **dict.fromkeys(("zeros_like", "new_zeros"), _filled(0)), **dict.fromkeys(("ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("clone", "contiguous"), _unary(lambda x: x)),
}
RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial",
          "normal", "poisson", "dropout"}
IN_PLACE = {"__setitem__", "__set__", *(f"__i{name}__" for name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"))}
