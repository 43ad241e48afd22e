"""A user's torch function becomes an expression graph: it is run once, on stand-ins that record what is done to them.

    mask_mod(b, h, q_idx, kv_idx) -> boolean             score_mod(score, b, h, q_idx, kv_idx) -> number

Arguments behave like zero-dimensional tensors (FlexAttention's signature). Tensors of the enclosing scope may be indexed by
any index expression. Whatever cannot become a graph raises `CaptureError`, which names the operation and the line.
"""
from __future__ import annotations

import contextlib
import inspect
import linecache
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tilewise.trace import graph
from tilewise.trace.graph import Captured, Expr, cast, load, var, wrap
from tilewise.trace.torch_functions import IN_PLACE, RANDOM, RULES

INDICES = ("b", "h", "p", "k")
MAX_DIMS = 4


class CaptureError(Exception):
    """A function that cannot become a graph. (No TypeError: torch's operators take those for "try the other side".)"""


def mask_graph(fn: Callable) -> Expr:
    """The graph of mask_mod(b, h, q_idx, kv_idx)."""
    result = run(fn, INDICES, "mask_mod(b, h, q_idx, kv_idx)")
    if isinstance(result, bool):
        return graph.equal(wrap(0), wrap(int(not result)))
    if not isinstance(result, Expr) or result.kind != "b":
        raise CaptureError(f"{describe(fn)}: a mask_mod returns a boolean for each score, got {_what(result)}")
    return result


def score_graph(fn: Callable) -> Expr:
    """The graph of score_mod(score, b, h, q_idx, kv_idx)."""
    result = run(fn, ("s", *INDICES), "score_mod(score, b, h, q_idx, kv_idx)")
    if isinstance(result, (int, float)) and not isinstance(result, bool):
        result = wrap(float(result))
    if not isinstance(result, Expr) or result.kind == "b":
        raise CaptureError(f"{describe(fn)}: a score_mod returns a score, a number, got {_what(result)}")
    return cast("float", result)


def run(fn: Callable, names: Sequence[str], signature: str) -> Any:
    """fn's result on stand-ins, as an Expr where it is a traced value or a tensor."""
    if torch.compiler.is_compiling():
        raise CaptureError("inside torch.compile a function cannot be captured: make it a mask or score function outside, by "
                           "tw.mask_mod(function), tw.score_mod(function) or tw.block_mask")
    if not callable(fn):
        raise CaptureError(f"expected a function {signature}, got {fn!r}")
    try:
        inspect.signature(fn).bind(*names)
    except (TypeError, ValueError) as error:  # ValueError: a builtin, which does not tell
        raise CaptureError(f"{describe(fn)}: expected {signature}: {error}") from None
    with Recorder(fn) as recorder:
        result = fn(*[Traced(var(name), recorder) for name in names])
    recorder.running = False
    return recorder.expr(result) if isinstance(result, (Traced, Tensor)) else result


class Recorder(TorchFunctionMode):
    """Sees every torch function while a user's function runs."""

    def __init__(self, fn: Callable):
        super().__init__()
        self.fn = fn
        self.running = True
        self.tensors: dict[int, Captured] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if kwargs.get("out") is not None:
            raise self.error("out=: writing into tensors is not supported")
        if any(isinstance(x, (Traced, Rows)) for x in _flat((args, kwargs.values()))):
            return self.call(name, args, kwargs)
        if name in RANDOM:
            raise self.error(f"{name}: random numbers are not supported (for dropout use dropout_p)")
        if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            raise self.error(f"{name}: writing into tensors is not supported")
        if any(isinstance(x, torch.device) and x == NOWHERE for x in _flat((args, kwargs.values()))):
            raise self.error("device: make tensors outside the function")
        return func(*args, **kwargs)

    def call(self, name: str, args: Sequence, kwargs: dict) -> Any:
        """A function of traced values."""
        plain = name.strip("_")
        if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None:
            raise self.error(f"{plain}: writing into tensors is not supported")
        if plain == "getitem":
            return self.index(*args)
        if plain in RANDOM:
            raise self.error(f"{plain}: random numbers are not supported (for dropout use dropout_p)")
        rule = RULES.get(plain)
        if rule is None:
            raise self.error(f"{plain} is not supported in mask and score functions")
        try:
            return Traced(rule(self, *args, **kwargs), self)
        except CaptureError:
            raise
        except TypeError as error:
            raise self.error(f"{plain}: {error}") from None

    def expr(self, x: Any) -> Expr:
        """An argument as a node; the same tensors are one."""
        if isinstance(x, Traced):
            return x.expr
        if isinstance(x, Expr):
            return x
        if isinstance(x, bool):
            return cast("bool", self.expr(int(x)))
        if isinstance(x, (int, float)):
            if isinstance(x, int) and not -2**31 <= x < 2**31:
                raise self.error(f"{x} is beyond 32 bits, in which indices are computed")
            return wrap(x)
        if isinstance(x, Tensor) and x.dim() == 0:
            return load(self.captured(x))
        if isinstance(x, (Tensor, Rows)):
            raise self.error(f"a tensor of {x.dim()} dimensions among indices: index it, down to one number")
        raise self.error(f"{type(x).__name__} among index expressions is not supported")

    def captured(self, tensor: Tensor) -> Captured:
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
            raise self.error(f"a captured tensor must be a plain floating, integer or boolean tensor, got {tensor.dtype}, "
                             f"{tensor.layout}")
        name = f"{describe(self.fn)}: {self.name_of(tensor)}"
        return self.tensors.setdefault(id(tensor), Captured(tensor, name, whole=False))

    def name_of(self, tensor: Tensor) -> str:
        """What the function calls a tensor that it captures."""
        inner = getattr(self.fn, "__func__", self.fn)
        code = getattr(inner, "__code__", None)
        if code is not None:
            cells = zip(code.co_freevars, getattr(inner, "__closure__", None) or (), strict=False)
            for name, cell in cells:
                with contextlib.suppress(ValueError):  # a variable not assigned yet
                    if cell.cell_contents is tensor:
                        return name
            for name in code.co_names:
                if getattr(inner, "__globals__", {}).get(name) is tensor:
                    return name
        return f"captured tensor {list(tensor.shape)}"

    def index(self, base: Any, key: Any) -> Any:
        """base[key] for a tensor, or for rows of one."""
        rows = base if isinstance(base, Rows) else Rows(base, (), self)
        if isinstance(base, Traced):
            raise self.error("an index expression cannot be indexed")
        indices = list(rows.indices)
        for one in key if isinstance(key, tuple) else (key,):
            if one is None or one is Ellipsis or isinstance(one, (slice, list)):
                raise self.error("indexing by slices, lists, None or ... is not supported: give one index per dimension")
            if len(indices) == rows.tensor.dim():
                raise self.error(f"too many indices for a tensor of {rows.tensor.dim()} dimensions")
            size = rows.tensor.shape[len(indices)]
            if isinstance(one, int) and not isinstance(one, bool) and -size <= one < 0:
                one += size
            expr = self.expr(one)
            if expr.kind != "i":
                raise self.error("an index must be a whole number: floor it and call .int(), or use torch.where for booleans")
            indices.append(expr)
        if len(indices) < rows.tensor.dim():
            return Rows(rows.tensor, tuple(indices), self)
        if len(indices) > MAX_DIMS:
            raise self.error(f"captured tensors have at most {MAX_DIMS} dimensions, got {len(indices)}")
        return Traced(load(self.captured(rows.tensor), *indices), self)

    def error(self, message: str) -> CaptureError:
        """The error, with the line of the user's code that is running."""
        frame = sys._getframe(1) if self.running else None
        while frame is not None and frame.f_code.co_filename.startswith(NOT_THE_USERS):
            frame = frame.f_back
        where = describe(self.fn)
        if frame is None:
            return CaptureError(f"{where}: {message}")
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        return CaptureError(f"{where}, line {frame.f_lineno}: {message}" + (f"\n    {line}" if line else ""))


NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))     # code in these folders


def describe(fn: Callable) -> str:
    """A function's name, for errors."""
    return getattr(fn, "__qualname__", type(fn).__name__).replace("<locals>.", "")


def _what(result: Any) -> str:
    if isinstance(result, Expr):
        return {"b": "a boolean", "i": "a whole number", "f": "a floating number"}[result.kind]
    return type(result).__name__


def _flat(values: Any):
    for x in values:
        if isinstance(x, (tuple, list)) or type(x).__name__ == "dict_values":
            yield from _flat(x)
        else:
            yield x


class Rows:
    """A captured tensor with fewer indices than dimensions: `bias[h]`, waiting for the rest."""

    def __init__(self, tensor: Tensor, indices: tuple[Expr, ...], recorder: Recorder):
        self.tensor, self.indices, self.recorder = tensor, indices, recorder

    def __getitem__(self, key):
        return self.recorder.index(self, key)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.recorder.error(f"{name} of a whole row of a captured tensor: index it, down to one number")

    def dim(self) -> int:
        return self.tensor.dim() - len(self.indices)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        rows = next(x for x in _flat((args, (kwargs or {}).values())) if isinstance(x, Rows))
        raise rows.recorder.error(f"{func.__name__} of a whole row of a captured tensor: index it, down to one number")


NOWHERE = torch.device("meta")          # where stand-ins are: others may be sent `.to` it, tensors cannot be made on it


class Traced:
    """Stands for an argument, or what became of it: a zero-dimensional tensor whose value is not known."""

    shape, ndim, is_cuda = torch.Size(()), 0, False

    def __init__(self, expr: Expr, recorder: Recorder):
        self.expr, self.recorder = expr, recorder

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        traced = next(x for x in _flat((args, kwargs.values())) if isinstance(x, (Traced, Rows)))
        return traced.recorder.call(func.__name__, args, kwargs)

    @property
    def dtype(self) -> torch.dtype:
        return {"b": torch.bool, "i": torch.int64, "f": torch.float32}[self.expr.kind]

    @property
    def device(self) -> torch.device:
        return NOWHERE

    def dim(self) -> int:
        return 0

    def size(self) -> torch.Size:
        return torch.Size(())

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        if not callable(getattr(Tensor, name, len)):
            raise self.recorder.error(f"{name} is not supported in mask and score functions")
        return lambda *args, **kwargs: self.recorder.call(name, (self, *args), kwargs)

    def where(self, condition: Any, other: Any) -> Traced:
        """self where the condition holds."""
        return self.recorder.call("where", (condition, self, other), {})

    def _no_value(self, *_):
        raise self.recorder.error("the value of an index expression is not known when the function is captured: write "
                                  "torch.where(condition, a, b) instead of if, and & | ~ instead of and, or, not")

    __bool__ = __int__ = __float__ = __index__ = __iter__ = __len__ = __contains__ = _no_value

    def __getitem__(self, key):
        return self.recorder.index(self, key)

    def __setitem__(self, key, value):
        raise self.recorder.error("writing into tensors is not supported")

    def __pos__(self):
        return self

    def __hash__(self):
        return id(self)


def _operator(name: str, reflected: bool = False) -> Callable:
    def apply(self, *other):
        return self.recorder.call(name, (*other, self) if reflected else (self, *other), {})
    return apply


def _refused(name: str) -> Callable:
    def apply(self, *_):
        raise self.recorder.error(f"{name} of a whole row of a captured tensor: index it, down to one number")
    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul",
              "divmod"):
    setattr(Traced, f"__{_name}__", _operator(_name))
    setattr(Traced, f"__r{_name}__", _operator(_name, reflected=True))
    setattr(Rows, f"__{_name}__", _refused(_name))
    setattr(Rows, f"__r{_name}__", _refused(_name))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert", "round"):
    setattr(Traced, f"__{_name}__", _operator(_name))
    setattr(Rows, f"__{_name}__", _refused(_name))
