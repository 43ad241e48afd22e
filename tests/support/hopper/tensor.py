"""Values in registers. Layouts are ignored (compiling checks them); shapes, types and rounding are the device's."""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic

from support.hopper.clocks import Fault
from support.hopper.formats import COMPUTED, STORED, decode, encode, rounded
from support.hopper.machine import Operation, me, site

_SEMANTIC = TritonSemantic(None)    # its rules of promotion need no builder
Number = (bool, int, float, np.number)


class Tensor:
    """A block of values, or a scalar."""
    __hash__ = None             # type: ignore[assignment]
    __array_ufunc__ = None      # numpy leaves operators to this class

    def __init__(self, values: Any, dtype: Any):
        self.values, self.dtype = np.asarray(values), dtype

    def like(self, values: Any) -> Tensor:
        return Tensor(values, self.dtype)

    shape = property(lambda self: list(self.values.shape))
    numel = property(lambda self: self.values.size)
    T = property(lambda self: self.permute(1, 0))

    @property
    def type(self) -> Any:
        return SimpleNamespace(shape=self.shape, element_ty=self.dtype, scalar=self.dtype, layout=None)

    def to(self, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
        if fp_downcast_rounding not in (None, "rtne"):
            raise Fault("unknown", f"rounding {fp_downcast_rounding} at {site()}")
        if bitcast:
            return Tensor(decode(encode(self.values, self.dtype).view(STORED[dtype]), dtype), dtype)
        if dtype == tl.int1:
            return Tensor(self.values != 0, dtype)
        return self if dtype == self.dtype else Tensor(rounded(self.values, dtype), dtype)

    def reshape(self, *shape: Any) -> Tensor:
        return self.like(self.values.reshape(flat(shape)))

    def permute(self, *order: Any) -> Tensor:
        return self.like(self.values.transpose(flat(order)))

    def expand_dims(self, axis: int) -> Tensor:
        return self.like(np.expand_dims(self.values, axis))

    def broadcast_to(self, *shape: Any) -> Tensor:
        return self.like(np.broadcast_to(self.values, flat(shape)))

    def __getitem__(self, index: Any) -> Tensor:
        items = index if isinstance(index, tuple) else (index,)
        if any(i is not None and i != slice(None) for i in items):
            raise Fault("type", f"index {index} at {site()}: blocks take only None and :")
        return self.like(self.values[index])

    def __getattr__(self, name: str) -> Any:
        """Functions of the language that are also methods."""
        from support.hopper.translate import PLAIN
        if name.startswith("__") or not hasattr(tl.tensor, name):
            raise AttributeError(name)
        return functools.partial(PLAIN.translate(getattr(tl, name)), self)

    def __bool__(self) -> bool:
        self._one("a condition")
        return bool(self.values)

    def __index__(self) -> int:
        self._one("an index")
        return int(self.values)

    def __float__(self) -> float:
        self._one("a number")
        return float(self.values)

    __int__ = __index__

    def _one(self, use: str) -> None:
        if self.values.size != 1:
            raise Fault("type", f"block {self.shape} as {use} at {site()}")

    def __str__(self) -> str:
        return f"{self.dtype}{self.shape}"

    __repr__ = __str__


class InFlight:
    """The result of a wgmma that has not been waited for."""
    __hash__ = None     # type: ignore[assignment]

    def __init__(self, operation: Operation, shape: list[int], dtype: Any):
        self.operation, self.shape, self.dtype, self.taken = operation, shape, dtype, False

    def take(self) -> None:
        """Its registers become those of another product."""
        if self.taken:
            raise Fault("unfinished", f"{me().name} at {site()} uses the {self}, which another wgmma has accumulated into")
        self.taken = True

    def used(self, *_: Any) -> Any:
        raise Fault("unfinished", f"{me().name} at {site()} uses the result of the {self.operation.text} before a wait for it")

    def __getattr__(self, name: str) -> Any:
        return self.used()

    def __str__(self) -> str:
        return f"result of the {self.operation.text}"


for _name in ("add", "sub", "mul", "truediv", "and", "or", "lt", "le", "gt", "ge", "eq", "ne", "radd", "rsub", "rmul",
              "rtruediv", "getitem", "neg", "invert", "bool", "index", "float"):
    setattr(InFlight, f"__{_name}__", InFlight.used)


def block_shape(*shape: Any) -> tuple[int, ...]:
    """A shape that blocks may have."""
    sizes = flat(shape)
    if any(n < 1 or n & (n - 1) for n in sizes):
        raise Fault("type", f"block of shape {list(sizes)} at {site()}: sizes must be powers of two")
    return sizes


def flat(items: Sequence[Any]) -> tuple[int, ...]:
    """The integers of f(1, 2) as of f((1, 2))."""
    if len(items) == 1 and isinstance(items[0], (tuple, list)):
        items = items[0]
    return tuple(int(i) for i in items)


def to_tensor(x: Any) -> Any:
    """A value of the language: numbers become scalars."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, InFlight):
        x.used()
    if isinstance(x, (bool, np.bool_)):
        return Tensor(np.bool_(x), tl.int1)
    if isinstance(x, (int, np.integer)):
        kinds = [k for k in (tl.int32, tl.uint32, tl.int64, tl.uint64)
                 if k.get_int_min_value() <= x <= k.get_int_max_value()]
        return Tensor(np.array(x, COMPUTED[kinds[0]]), kinds[0])
    if isinstance(x, (float, np.floating)):
        return Tensor(np.float32(x), tl.float32)
    raise Fault("type", f"{type(x).__name__} {x!r} used as a value at {site()}")


@functools.cache
def common_type(a: Any, a_number: bool, b: Any, b_number: bool, division: bool) -> Any:
    return _SEMANTIC.computation_type_impl(a, a_number, b, b_number, division)


def operands(a: Any, b: Any, division: bool = False) -> tuple[np.ndarray, np.ndarray, Any]:
    """The values of two operands in their common type, and that type."""
    x, y = to_tensor(a), to_tensor(b)
    if x.values.ndim and y.values.ndim and x.values.ndim != y.values.ndim:
        raise Fault("type", f"{x} and {y} at {site()}: their ranks differ")
    dtype = common_type(x.dtype, not isinstance(a, Tensor), y.dtype, not isinstance(b, Tensor), division)
    for original, value in ((a, x), (b, y)):
        if not isinstance(original, Tensor) and dtype.is_int() and not dtype.is_bool() and not (
                dtype.get_int_min_value() <= int(value.values) <= dtype.get_int_max_value()):
            raise Fault("type", f"{original} does not fit into {dtype} at {site()}")
    return x.to(dtype).values, y.to(dtype).values, dtype


def elementwise(function: Callable[..., Any], *tensors: Tensor, dtype: Any = None) -> Tensor:
    """Applies a numpy function to tensors of one type, and rounds."""
    dtype = dtype or tensors[0].dtype
    return Tensor(rounded(function(*(x.values for x in tensors)), dtype), dtype)


def binary(function: Callable[..., Any], a: Any, b: Any, dtype: Any = None, division: bool = False) -> Tensor:
    x, y, common = operands(a, b, division)
    try:
        return Tensor(rounded(function(x, y), dtype or common), dtype or common)
    except ValueError as error:
        raise Fault("type", f"{error} at {site()}") from error


def _true_divide(a: Any, b: Any) -> Tensor:
    x, y = to_tensor(a), to_tensor(b)
    if x.dtype.is_int() and y.dtype.is_int():
        a, b = x.to(tl.float32), y.to(tl.float32)
    return binary(np.true_divide, a, b, division=True)


def _quotient(a: Any, b: Any) -> np.ndarray:
    """Of integers, towards zero."""
    if a.dtype.kind == "u":
        return np.floor_divide(a, b)
    down = np.floor_divide(a, b)
    return down + ((down * b != a) & ((a < 0) != (b < 0))).astype(down.dtype)


def _floor_divide(a: Any, b: Any) -> Tensor:
    if to_tensor(a).dtype.is_floating() or to_tensor(b).dtype.is_floating():
        raise Fault("type", f"// of floating numbers at {site()}")
    _no_zero(b)
    return binary(_quotient, a, b, division=True)


def _remainder(a: Any, b: Any) -> Tensor:
    if to_tensor(a).dtype.is_floating() or to_tensor(b).dtype.is_floating():
        return binary(np.fmod, a, b, division=True)
    _no_zero(b)
    return binary(lambda x, y: x - _quotient(x, y) * y, a, b, division=True)


def _no_zero(divisor: Any) -> None:
    if np.any(to_tensor(divisor).values == 0):
        raise Fault("crash", f"integer division by zero at {site()}")


OPERATORS: dict[str, Callable[[Any, Any], Tensor]] = {
    "truediv": _true_divide, "floordiv": _floor_divide, "mod": _remainder,
    **{name: functools.partial(binary, function) for name, function in dict(
        add=np.add, sub=np.subtract, mul=np.multiply, lshift=np.left_shift, rshift=np.right_shift, xor=np.bitwise_xor,
        **{"and": np.bitwise_and, "or": np.bitwise_or}).items()},
    **{name: functools.partial(binary, function, dtype=tl.int1) for name, function in dict(
        lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal, eq=np.equal, ne=np.not_equal).items()}}


def _define(name: str, operator: Callable[[Any, Any], Tensor]) -> None:
    def accepted(x: Any) -> bool:
        return type(x) is Tensor or isinstance(x, (InFlight, *Number))

    setattr(Tensor, f"__{name}__", lambda a, b: operator(a, b) if accepted(b) else NotImplemented)
    setattr(Tensor, f"__r{name}__", lambda a, b: operator(b, a) if accepted(b) else NotImplemented)


for _name, _operator in OPERATORS.items():
    _define(_name, _operator)
setattr(Tensor, "__neg__", lambda a: OPERATORS["sub"](a.like(np.zeros((), a.values.dtype)), a))  # noqa: B010
setattr(Tensor, "__invert__", lambda a: elementwise(np.invert, a))  # noqa: B010
