"""The names of triton.language and gluon.language."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.language import standard

from support.hopper.barriers import NamedBarrier
from support.hopper.clocks import Clock, Fault
from support.hopper.formats import COMPUTED, STORED, decode, encode, rounded
from support.hopper.global_memory import Pointer
from support.hopper.machine import Actor, me, site
from support.hopper.shared_memory import allocate_shared_memory, proxy_fence
from support.hopper.tensor import OPERATORS, Tensor, binary, block_shape, elementwise, operands, to_tensor
from support.hopper.translate import Function, simulate

# --- blocks -----------------------------------------------------------------------------------------------------------


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    block_shape(end - start)
    return Tensor(np.arange(start, end, dtype=np.int32), tl.int32)


def full(shape: Sequence[Any], value: Any, dtype: Any, layout: Any = None) -> Tensor:
    scalar = value if isinstance(value, Tensor) else Tensor(np.array(value), dtype)
    if isinstance(value, int) and dtype.is_int():
        scalar = Tensor(np.array(value % 2 ** dtype.primitive_bitwidth, np.uint64), tl.uint64)
    return Tensor(np.full(block_shape(shape), rounded(scalar.values, dtype)), dtype)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    keep = to_tensor(condition)
    if isinstance(x, Pointer) or isinstance(y, Pointer):
        raise Fault("unknown", f"where of pointers at {site()}")
    a, b, dtype = operands(x, y)
    ranks = {v.ndim for v in (keep.values, a, b) if v.ndim}
    if len(ranks) > 1:
        raise Fault("type", f"where of {keep}, {x} and {y} at {site()}: their ranks differ")
    return Tensor(np.where(keep.values != 0, a, b), dtype)


def _limit(function: Any) -> Callable[..., Tensor]:
    def limit(x: Any, y: Any, propagate_nan: Any = None) -> Tensor:
        if propagate_nan == tl.PropagateNan.ALL:
            return binary(dict(fmax=np.maximum, fmin=np.minimum)[function.__name__], _wide(x), _wide(y))
        return binary(function, _wide(x), _wide(y))
    return limit


def _wide(x: Any) -> Any:
    return x.to(tl.float32) if isinstance(x, Tensor) and x.dtype == tl.bfloat16 else x


COMBINATIONS = {standard._elementwise_max.fn: np.fmax, standard._elementwise_min.fn: np.fmin, standard._sum_combine.fn: np.add,
                standard._xor_combine.fn: np.bitwise_xor, standard._or_combine.fn: np.bitwise_or}


def reduce(input: Any, axis: int | None, combine_fn: Function, keep_dims: bool = False) -> Any:
    blocks = input if isinstance(input, tuple) else (input,)
    if axis is None:
        blocks, axis = tuple(x.reshape(x.numel) for x in blocks), 0
    ufunc: Any = COMBINATIONS.get(combine_fn.jit.fn)
    if ufunc is not None:
        return elementwise(lambda x: ufunc.reduce(x, axis=axis, keepdims=keep_dims, dtype=x.dtype), blocks[0])
    parts = [x.like(np.moveaxis(x.values, axis, 0)) for x in blocks]
    while len(parts[0].values) > 1:     # neighbours first
        parts = [x.like(x.values[i::2]) for i in (0, 1) for x in parts]
        combined = combine_fn(*parts)
        parts = list(combined) if isinstance(combined, tuple) else [combined]
    parts = [x.like(np.expand_dims(x.values[0], axis) if keep_dims else x.values[0]) for x in parts]
    return tuple(parts) if isinstance(input, tuple) else parts[0]


def umulhi(x: Any, y: Any) -> Tensor:
    def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.dtype.itemsize != 4:
            raise Fault("unknown", f"umulhi of 64 bits at {site()}")
        return ((a.view(np.uint32).astype(np.uint64) * b.view(np.uint32)) >> np.uint64(32)).astype(np.uint32).view(a.dtype)
    return binary(high, x, y)


def _fp32(function: Callable[[Any], Any], name: str) -> Callable[[Any], Tensor]:
    def applied(x: Any) -> Tensor:
        x = to_tensor(x)
        if x.dtype not in (tl.float32, tl.float64):
            raise Fault("type", f"{name} of {x} at {site()}; it takes fp32")
        return elementwise(function, x)
    return applied


def _erf(x: np.ndarray) -> np.ndarray:
    return torch.erf(torch.from_numpy(np.array(x))).numpy()


FP32 = {**{name: getattr(np, name) for name in ("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "floor", "ceil")},
        "sqrt_rn": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "erf": _erf}


def fma(x: Any, y: Any, z: Any) -> Tensor:
    """Rounded once."""
    return elementwise(lambda a, b, c: a.astype(np.float64) * b + c, *(to_tensor(v) for v in (x, y, z)))


def join(a: Any, b: Any) -> Tensor:
    x, y, dtype = operands(a, b)
    return Tensor(np.stack(np.broadcast_arrays(x, y), -1), dtype)


def cast(x: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
    return to_tensor(x).to(dtype, fp_downcast_rounding, bitcast)


def loop(first: Any, second: Any = None, step: Any = 1, **_: Any) -> Iterator[Tensor]:
    start, stop = (0, first) if second is None else (first, second)
    wide = any(isinstance(x, Tensor) and x.dtype == tl.int64 for x in (start, stop, step))
    kind = tl.int64 if wide else tl.int32
    for i in range(int(start), int(stop), int(step or 1)):
        yield Tensor(np.array(i, COMPUTED[kind]), kind)


# --- global memory ----------------------------------------------------------------------------------------------------


def load(pointer: Pointer, mask: Any = None, other: Any = None, volatile: bool = False, **options: Any) -> Tensor:
    """Elements that are masked off without `other` are garbage."""
    _no_blocks(options)
    me().pause()
    offsets, keep = pointer.selected(mask)
    array = pointer.array
    array.touch("atomic" if volatile else "read", "load", offsets)
    values = np.empty(keep.shape, COMPUTED[array.dtype])
    if mask is not None:
        values[...] = _garbage(array.dtype) if other is None else to_tensor(other).to(array.dtype).values
    values[keep] = decode(array.data[offsets], array.dtype)
    return Tensor(values, array.dtype)


def _garbage(dtype: Any) -> Any:
    return np.nan if dtype.is_floating() else True if dtype == tl.int1 else dtype.get_int_max_value() // 3


def store(pointer: Pointer, value: Any, mask: Any = None, **options: Any) -> None:
    _no_blocks(options)
    me().pause()
    offsets, keep = pointer.selected(mask)
    array, value = pointer.array, to_tensor(value)
    if value.values.ndim and value.values.ndim != keep.ndim:
        raise Fault("type", f"store of {value} to {pointer} at {site()}: their ranks differ")
    array.touch("write", "store", offsets)
    array.data[offsets] = encode(np.broadcast_to(value.to(array.dtype).values, keep.shape)[keep], array.dtype)
    me().machine.effect()


def _no_blocks(options: dict[str, Any]) -> None:
    if set(options) - {"cache_modifier", "eviction_policy"}:
        raise Fault("unknown", f"options {options} at {site()}")


def _atomic(name: str, change: Callable[[np.ndarray, np.ndarray, np.ndarray], None]) -> Callable[..., Tensor]:
    """An atomic operation. `change` applies it to an array, at some offsets, with some values."""
    def atomic(pointer: Pointer, val: Any, mask: Any = None, sem: str | None = None, scope: str | None = None) -> Tensor:
        return _apply(name, pointer, mask, sem, lambda data, where, keep: change(
            data, where, np.broadcast_to(to_tensor(val).to(pointer.array.dtype).values, keep.shape)[keep]))
    return atomic


def atomic_cas(pointer: Pointer, cmp: Any, val: Any, sem: str | None = None, scope: str | None = None) -> Tensor:
    def change(data: np.ndarray, where: np.ndarray, _: np.ndarray) -> None:
        data[where] = np.where(data[where] == to_tensor(cmp).values, to_tensor(val).values, data[where])
    return _apply("atomic_cas", pointer, None, sem, change)


def _apply(name: str, pointer: Pointer, mask: Any, sem: str | None, change: Callable[..., None]) -> Tensor:
    actor, array = me(), pointer.array
    actor.pause()
    if COMPUTED[array.dtype] != STORED[array.dtype]:
        raise Fault("unknown", f"{name} of {array.dtype} at {site()}")
    if sem not in (None, "acq_rel", "acquire", "release", "relaxed"):
        raise Fault("type", f"{name} with sem={sem!r} at {site()}")
    offsets, keep = pointer.selected(mask)
    scalar = not keep.shape and keep
    if scalar and sem in (None, "acq_rel", "acquire"):
        actor.clock.join(_released(actor, pointer))
    array.touch(array.addition, name, offsets)
    if scalar and sem in (None, "acq_rel", "release"):
        _released(actor, pointer).join(actor.published())
    old = np.zeros(keep.shape, COMPUTED[array.dtype])
    before = old[keep] = array.data[offsets]
    change(array.data, offsets, keep)
    if (array.data[offsets] != before).any():
        actor.machine.effect()
    return Tensor(old, array.dtype)


def _released(actor: Actor, pointer: Pointer) -> Clock:
    array = pointer.array
    key = array.key[0] + int(pointer.values + array.first) * array.data.itemsize, array.data.itemsize
    return actor.machine.locations.setdefault(key, Clock())


def _put(data: np.ndarray, where: np.ndarray, values: np.ndarray) -> None:
    data[where] = values


# --- partitions, barriers, assembly -----------------------------------------------------------------------------------


def warp_specialize(functions_and_args: Any, worker_num_warps: Sequence[int], worker_num_regs: Any = None) -> Any:
    parent = me()
    workers = functions_and_args[1:]
    if len(workers) != len(worker_num_warps) or (worker_num_regs is not None and len(worker_num_regs) != len(workers)):
        raise Fault("type", f"warp_specialize at {site()}: one number of warps and of registers for each worker")
    parent.tick()
    actors = []
    for i, ((function, args), warps) in enumerate(zip(workers, worker_num_warps, strict=True), 1):
        actors.append(Actor(parent.program, function.__name__, i, partial(function, *args), 32 * warps, parent.clock))
    before, (function, args) = parent.function, functions_and_args[0]
    parent.become(function.__name__)
    parent.machine.effect()
    result = function(*args)
    parent.pause(lambda: all(actor.finished for actor in actors), lambda: "the workers' end")
    parent.become(before)
    for actor in actors:
        parent.clock.join(actor.clock)
    parent.synchronise()
    return result


def thread_barrier() -> None:
    me().pause()
    me().synchronise()


def barrier_sync(number: Any, threads: Any, token: Any = None) -> Any:
    """bar.sync by all threads of the partition. Here and below, `token` stands for the instruction's place in the order."""
    _named_barrier(number).sync(me(), int(threads))
    return token


def barrier_arrive(number: Any, threads: Any, token: Any = None) -> Any:
    """bar.arrive by all threads of the partition."""
    _named_barrier(number).arrive(me(), int(threads))
    return token


def named_barrier(operation: str, number: Any, threads: Any, token: Any = None) -> Any:
    """bar.sync or bar.arrive, by the operation's name."""
    return {"sync": barrier_sync, "arrive": barrier_arrive}[operation](number, threads, token)


def _named_barrier(number: Any) -> NamedBarrier:
    actor = me()
    actor.pause()
    actor.machine.effect()
    return actor.program.named_barriers.setdefault(int(number), NamedBarrier(int(number)))


def store_complete(pendings: Any = 0, token: Any = None) -> Any:
    """cp.async.bulk.wait_group: the writes of TMA stores and additions have been performed."""
    actor = me()
    actor.retire(actor.stores, int(pendings), "TMA stores")
    actor.retire(actor.writes, int(pendings), "writes of TMA stores")
    return token


_ASSEMBLY: list[tuple[re.Pattern[str], Callable[..., Any]]] = []


def simulate_assembly(pattern: str, function: Callable[..., Any]) -> None:
    """Lets `function` stand for an instruction that matches all of `pattern`; it takes the pattern's groups, then operands."""
    _ASSEMBLY.append((re.compile(pattern), function))


def inline_asm_elementwise(asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    result = None
    for instruction in filter(None, (" ".join(part.split()) for part in asm.split(";"))):
        matches = [(pattern.fullmatch(instruction), function) for pattern, function in reversed(_ASSEMBLY)]
        found = [(match, function) for match, function in matches if match]
        if not found:
            raise Fault("unknown", f"instruction {instruction!r} at {site()}")
        match, function = found[0]
        value = function(*match.groups(), *args)
        result = result if value is None else value
    if result is None or result.dtype != dtype:
        raise Fault("type", f"inline assembly at {site()} gives {result}, not {dtype}")
    return result


for _pattern, _function in {
        r"mov\.b32 \$0, \$1": to_tensor,
        r"bar\.sync (\d+), (\d+)": lambda number, threads, *_: barrier_sync(number, threads),
        r"bar\.arrive (\d+), (\d+)": lambda number, threads, *_: barrier_arrive(number, threads),
        r"ex2\.approx(?:\.ftz)?\.f32 \$0, \$1": _fp32(np.exp2, "ex2"),
        r"tanh\.approx\.f32 \$0, \$1": _fp32(np.tanh, "tanh"),
        r"cp\.async\.bulk\.wait_group (\d+)": lambda pendings, *_: store_complete(int(pendings)),
        r"fence\.proxy\.async": lambda *_: proxy_fence(everywhere=True),
        r"fence\.proxy\.async\.global": lambda *_: proxy_fence(shared=False, everywhere=True),
        r"fence\.proxy\.async\.shared::cta": lambda *_: proxy_fence(),
}.items():
    simulate_assembly(_pattern, _function)


# --- names ------------------------------------------------------------------------------------------------------------


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise Fault("type", f"static_assert at {site()} {message}")


def device_assert(condition: Any, message: str = "", mask: Any = True) -> None:
    if not np.all(to_tensor(condition).values | ~to_tensor(True if mask is None else mask).values):
        raise Fault("crash", f"device_assert at {site()} {message}")


def _without_layout(name: str, *arguments: Any, **options: Any) -> Any:
    if not me().program.machine.gluon:
        return LANGUAGE[name](*arguments, **options)
    raise Fault("type", f"tl.{name} at {site()} does not compile in Gluon, where it needs a layout: gl.{name}")


def same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def nothing(*_: Any, **__: Any) -> None:
    pass


LANGUAGE: dict[str, Callable[..., Any]] = dict(
    constexpr=same, range=loop, static_range=lambda *bounds: range(*(int(b) for b in bounds)), static_assert=static_assert,
    program_id=lambda axis: to_tensor(me().program.coordinates[axis]),
    num_programs=lambda axis: to_tensor(me().program.grid[axis]), num_warps=lambda: me().threads // 32, num_ctas=lambda: 1,
    arange=arange, full=full, cast=cast, to_tensor=to_tensor, where=where, maximum=_limit(np.fmax), minimum=_limit(np.fmin),
    reduce=reduce, umulhi=umulhi, fma=fma,
    clamp=lambda x, low, high, propagate_nan=None: _limit(np.fmin)(_limit(np.fmax)(x, low, propagate_nan), high, propagate_nan),
    _promote_bfloat16_to_float32=_wide, abs=lambda x: elementwise(np.abs, to_tensor(x)), fdiv=OPERATORS["truediv"],
    div_rn=OPERATORS["truediv"], add=lambda x, y, **_: x + y, sub=lambda x, y, **_: x - y, mul=lambda x, y, **_: x * y,
    reshape=lambda x, *shape, **_: x.reshape(*shape), permute=lambda x, *order: x.permute(*order),
    trans=lambda x, *order: x.permute(*order or range(x.values.ndim)[::-1]), expand_dims=lambda x, axis: x.expand_dims(axis),
    broadcast_to=lambda x, *shape: x.broadcast_to(*shape), join=join,
    split=lambda x: (x.like(x.values[..., 0]), x.like(x.values[..., 1])),
    convert_layout=same, set_auto_layout=same, multiple_of=same, max_contiguous=same, max_constancy=same, assume=nothing,
    static_print=nothing, device_print=nothing, device_assert=device_assert, load=load, store=store, atomic_cas=atomic_cas,
    atomic_add=_atomic("atomic_add", np.add.at), atomic_max=_atomic("atomic_max", np.maximum.at),
    atomic_min=_atomic("atomic_min", np.minimum.at), atomic_and=_atomic("atomic_and", np.bitwise_and.at),
    atomic_or=_atomic("atomic_or", np.bitwise_or.at), atomic_xor=_atomic("atomic_xor", np.bitwise_xor.at),
    atomic_xchg=_atomic("atomic_xchg", _put), allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize,
    thread_barrier=thread_barrier, barrier=thread_barrier, debug_barrier=thread_barrier,
    inline_asm_elementwise=inline_asm_elementwise, **{name: _fp32(function, name) for name, function in FP32.items()})

for _name, _function in LANGUAGE.items():
    for _module in (gl, tl, tl.math, tl.core):
        if hasattr(_module, _name):
            simulate(getattr(_module, _name), _function)
for _name in ("arange", "full"):
    simulate(getattr(tl, _name), partial(_without_layout, _name))
for _builtin, _function in ((range, loop), (max, LANGUAGE["maximum"]), (min, LANGUAGE["minimum"])):
    simulate(_builtin, _function)
