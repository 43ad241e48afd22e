"""What Triton kernels move and compute, counted while Triton's interpreter runs them.

    TRITON_INTERPRET=1 python ...       # for the whole process
    with counting() as launches:
        kernel[grid](...)               # any Triton kernels, ours or others'
    launches[0].read["K"]               # bytes that the first launch loaded from its argument K

Counted is what is asked for: each active element of each load, store and atomic, as often as it is asked for. Elements that
are masked out are not counted, nor is anything that a compiler adds or a cache saves. So a number says what moves between slow
and fast memory when fast memory is what a program holds: registers and shared memory.

How an element is known to belong to an argument: while counting, pointers carry their argument's number in the top 16 bits,
which no address uses, and arithmetic leaves there.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triton.runtime import interpreter

from tilewise.inspect.interpreter import install

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
SHIFT = np.uint64(48)                   # of an argument's number in its pointers
ADDRESS = np.uint64((1 << 48) - 1)
EXPONENTIALS = (np.exp, np.exp2, np.log, np.log2)
ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.minimum, np.maximum, np.fmin, np.fmax)


@dataclass
class Launch:
    """What all programs of one launch did.

    read, written   bytes by the kernel's argument; an element of a tuple argument is "name[i]"
    products        FLOPs of tl.dot, with the padding of tiles: 2 m n k
    exponentials    elements of exp, exp2, log and log2
    arithmetic      other floating-point operations: + - * / min max of elements, and those of reductions; a fused multiply-add
                    is two; comparisons, selections and conversions are none
    """
    kernel: str
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    products: int = 0
    exponentials: int = 0
    arithmetic: int = 0

    @property
    def bytes(self) -> int:
        return self.read.total() + self.written.total()


class Meter:
    """The launch that runs now, and the names of its arguments by the number in their pointers."""

    def __init__(self) -> None:
        self.launch = Launch("")
        self.names: list[str] = []
        self.numbers: dict[int, int] = {}       # id of a tensor on the host -> its number
        self.paused = False                     # inside a reduction, which is counted as one

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.launch, self.names, self.numbers = Launch(kernel), ["?"], {}
        for name, argument in arguments.items():
            self.enter(name, argument)

    def enter(self, name: str, argument: Any) -> None:
        if isinstance(argument, tuple):
            for i, one in enumerate(argument):
                self.enter(f"{name}[{i}]", one)
        elif hasattr(argument, "data_ptr"):
            self.numbers[id(argument)] = len(self.names)
            self.names.append(name)
        elif hasattr(argument, "base"):         # a tensor descriptor
            self.enter(name, argument.base)

    def move(self, by_name: Counter[str], pointers: Any, active: np.ndarray) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        numbers = (pointers.data >> SHIFT)[np.broadcast_to(active, pointers.data.shape)]
        for number, count in enumerate(np.bincount(numbers.astype(np.int64))):
            if count:
                by_name[self.names[number]] += int(count) * size


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Gives a list to which each launch of a Triton kernel inside adds what it did.

    Raises RuntimeError where Triton does not interpret (TRITON_INTERPRET=1 for the whole process) or has other internals.
    """
    install()
    launches: list[Launch] = []
    meter = Meter()
    replaced = [(owner, name, getattr(owner, name), make(getattr(owner, name), meter)) for owner, name, make in HOOKS]
    executor = interpreter.GridExecutor
    run = executor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        def begin(*host: Any, **named: Any) -> None:
            meter.begin(self.fn.__name__, dict(zip(self.arg_names, host, strict=False)) | named)

        self.pre_run_hooks = [*self.pre_run_hooks, begin]
        run(self, *args, **kwargs)
        launches.append(meter.launch)

    for owner, name, _, counted in replaced:
        setattr(owner, name, counted)
    executor.__call__ = launch
    try:
        yield launches
    finally:
        executor.__call__ = run
        for owner, name, before, _ in replaced:
            setattr(owner, name, before)


# --- what is replaced while counting: each takes the stock function and gives one that counts and calls it -------------


def plain(pointers: Any) -> Any:
    """Pointers without their argument's number."""
    return Handle(pointers.data & ADDRESS, pointers.dtype)


def numbered(convert: Callable, meter: Meter) -> Callable:
    def converted(argument: Any) -> Any:
        result = convert(argument)
        number = meter.numbers.get(id(argument))
        if number is not None:
            result.handle.data = result.handle.data | np.uint64(number) << SHIFT
        return result
    return converted


def load(stock: Callable, meter: Meter) -> Callable:
    def counted(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        meter.move(meter.launch.read, pointers, mask.data)
        return stock(self, plain(pointers), mask, *rest, **options)
    return counted


def store(stock: Callable, meter: Meter) -> Callable:
    def counted(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        meter.move(meter.launch.written, pointers, mask.data)
        return stock(self, plain(pointers), value, mask, *rest)
    return counted


def atomic(stock: Callable, meter: Meter) -> Callable:
    def counted(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for side in (meter.launch.read, meter.launch.written):
            meter.move(side, pointers, mask.data)
        return stock(self, operation, plain(pointers), value, mask, *rest)
    return counted


def exchange(stock: Callable, meter: Meter) -> Callable:
    def counted(self: Any, pointers: Any, *rest: Any) -> Any:
        for side in (meter.launch.read, meter.launch.written):
            meter.move(side, pointers, np.ones(pointers.data.shape, bool))
        return stock(self, plain(pointers), *rest)
    return counted


def dot(stock: Callable, meter: Meter) -> Callable:
    def counted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        meter.launch.products += 2 * a.data.size * b.data.shape[-1]
        return stock(self, a, b, *rest)
    return counted


def is_float(handle: Any) -> bool:
    return handle.dtype.scalar.is_floating()


def unary(stock: Callable, meter: Meter) -> Callable:
    def counted(self: Any, argument: Any, operation: Any) -> Any:
        if operation in EXPONENTIALS and not meter.paused:
            meter.launch.exponentials += argument.data.size
        return stock(self, argument, operation)
    return counted


def binary(stock: Callable, meter: Meter) -> Callable:
    def counted(self: Any, lhs: Any, rhs: Any, operation: Any) -> Any:
        result = stock(self, lhs, rhs, operation)
        if operation in ARITHMETIC and is_float(lhs) and not meter.paused:
            meter.launch.arithmetic += result.data.size
        return result
    return counted


def fused(stock: Callable, meter: Meter) -> Callable:
    def counted(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not meter.paused:
            meter.launch.arithmetic += 2 * z.data.size
        return stock(self, x, y, z)
    return counted


def reduction(stock: Callable, meter: Meter) -> Callable:
    def counted(self: Any, inputs: Any) -> Any:
        paused, meter.paused = meter.paused, True
        try:
            results = stock(self, inputs)
        finally:
            meter.paused = paused
        first = (results if isinstance(results, (tuple, list)) else (results,))[0]
        if is_float(inputs[0].handle):
            meter.launch.arithmetic += inputs[0].handle.data.size - first.handle.data.size
        return results
    return counted


HOOKS: list[tuple[Any, str, Callable[[Callable, Meter], Callable]]] = [
    (interpreter, "_implicit_cvt", numbered), (Builder, "create_masked_load", load), (Builder, "create_masked_store", store),
    (Builder, "create_atomic_rmw", atomic), (Builder, "create_atomic_cas", exchange), (Builder, "create_dot", dot),
    (Builder, "unary_op", unary), (Builder, "binary_op", binary), (Builder, "create_fma", fused),
    (interpreter.ReduceOps, "apply_impl", reduction)]
