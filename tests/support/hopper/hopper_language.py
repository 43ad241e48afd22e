"""The names of gluon.language.nvidia.hopper: mbarriers, TMA, wgmma, fences."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon.language.nvidia import hopper

from support.hopper.barriers import MBarrier
from support.hopper.clocks import Fault
from support.hopper.formats import decode, encode, rounded
from support.hopper.global_memory import Box, Descriptor
from support.hopper.machine import Operation, me, site
from support.hopper.shared_memory import SharedView, proxy_fence
from support.hopper.tensor import InFlight, Tensor
from support.hopper.translate import simulate

# --- mbarriers --------------------------------------------------------------------------------------------------------


def _barrier(view: SharedView) -> MBarrier:
    try:
        return view.allocation.barriers[view.offset]
    except KeyError:
        raise Fault("barrier", f"{view.label} at {site()} is not initialised") from None


def init(mbarrier: SharedView, count: Any) -> None:
    actor = me()
    actor.pause()
    if mbarrier.numel != 1 or mbarrier.dtype != tl.int64:
        raise Fault("type", f"mbarrier {mbarrier} at {site()}; it must be one int64")
    mbarrier.touch("write", "mbarrier.init")
    mbarrier.allocation.barriers[mbarrier.offset] = MBarrier(int(count), mbarrier.label, actor.tick())


def invalidate(mbarrier: SharedView) -> None:
    me().pause()
    _barrier(mbarrier)
    mbarrier.touch("write", "mbarrier.invalidate")
    del mbarrier.allocation.barriers[mbarrier.offset]


def expect(mbarrier: SharedView, bytes: Any, pred: Any = True) -> None:
    _arrive(mbarrier, 1, int(bytes), pred)


def arrive(mbarrier: SharedView, *, count: Any = 1, pred: Any = True) -> None:
    _arrive(mbarrier, int(count), 0, pred)


def _arrive(mbarrier: SharedView, count: int, transaction: int, pred: Any) -> None:
    actor = me()
    actor.pause()
    if pred:
        actor.tick()
        _barrier(mbarrier).arrive(actor, count, transaction)
        actor.machine.effect()


def wait(mbarrier: SharedView, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
    if pred:
        _barrier(mbarrier).wait(me(), int(phase))
        me().machine.effect()


def fence_async_shared(cluster: bool = False) -> None:
    proxy_fence()


# --- TMA --------------------------------------------------------------------------------------------------------------


def _check_block(descriptor: Descriptor, view: SharedView) -> None:
    """A tile takes a block of the same rows in the same order, [1, 32, 1, 64] as [32, 64]. Compiling does not check that."""
    block = descriptor.block_shape
    if view.numel != math.prod(block) or view.shape[-1] != block[-1] or view.dtype != descriptor.dtype:
        raise Fault("type", f"{descriptor} and {view} at {site()} differ in shape or type")
    if not (view.memory.flags.c_contiguous or view.in_one_panel):
        raise Fault("type", f"{view} at {site()} is not contiguous, as TMA needs it")


def tma_load(descriptor: Descriptor, coordinates: Sequence[Any], barrier: SharedView, result: SharedView,
             pred: Any = True) -> None:
    actor = me()
    actor.pause()
    if not pred:
        return
    _check_block(descriptor, result)
    box, mbarrier = descriptor.box(coordinates), _barrier(barrier)

    def perform(operation: Operation) -> None:
        box.touch(operation, "read")
        result.write(box.load().reshape(result.shape))
        mbarrier.deliver(descriptor.block_type.nbytes, operation.stamp)

    operation = Operation(actor, "TMA load", perform)
    barrier.touch_asynchronously(operation, "read")
    result.touch_asynchronously(operation, "write")
    result.spoil()
    actor.program.loads.append(operation)
    actor.machine.effect()


def _outward(what: str, kind: str, apply: Callable[[Box, np.ndarray], None]) -> Callable[..., None]:
    """TMA from shared to global memory: an operation that reads its source, then one that writes."""
    def issue(descriptor: Descriptor, coordinates: Sequence[Any], source: SharedView) -> None:
        actor = me()
        actor.pause()
        _check_block(descriptor, source)
        box = descriptor.box(coordinates)

        def read(operation: Operation) -> None:
            operation.result = encode(source.read(operation.text), source.dtype)

        def write(operation: Operation) -> None:
            box.touch(operation, kind)
            apply(box, reading.result.reshape(descriptor.block_shape))

        reading = Operation(actor, what, read)
        source.touch_asynchronously(reading, "read")
        actor.stores.append(reading)
        actor.writes.append(Operation(actor, what, write, after=reading))
        actor.machine.effect()
    return issue


tma_store = _outward("TMA store", "write", Box.store)


def _reduction(name: str, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., None]:
    def apply(box: Box, block: np.ndarray) -> None:
        dtype = box.descriptor.dtype
        box.combine(lambda old, new: encode(rounded(function(decode(old, dtype), decode(new, dtype)), dtype), dtype), block)
    return _outward(f"TMA {name}", "atomic", apply)


tma_reduce_add = _reduction("addition", np.add)
tma_reduce_min = _reduction("minimum", np.fmin)
tma_reduce_max = _reduction("maximum", np.fmax)


def store_wait(pendings: Any = 0) -> None:
    """The sources have been read. What has been written to global memory is known only after `store_complete`."""
    me().retire(me().stores, int(pendings), "TMA stores")


# --- wgmma ------------------------------------------------------------------------------------------------------------


def _check_product(a: Any, b: SharedView, acc: Any, threads: int) -> None:
    if not isinstance(b, SharedView) or not isinstance(a, (SharedView, Tensor)):
        raise Fault("type", f"wgmma of {a} and {b} at {site()}: b must be in shared memory, a there or in registers")
    what = f"wgmma of {a} and {b} into {acc.dtype}{acc.shape} by {threads} threads at {site()}"
    bits = b.dtype.primitive_bitwidth
    if a.shape[1] != b.shape[0] or [a.shape[0], b.shape[1]] != list(acc.shape):
        raise Fault("type", f"{what}: shapes do not fit")
    if a.dtype != b.dtype and not (bits == 8 and a.dtype.primitive_bitwidth == 8):
        raise Fault("type", f"{what}: types differ")
    if threads % 128 or acc.shape[0] % 64 or acc.shape[1] % 8 or a.shape[1] % (256 // bits):
        raise Fault("type", f"{what}: takes whole warpgroups and 64 x 8 x {256 // bits} blocks")
    along_k = [x.memory.strides[axis] == x.memory.itemsize for x, axis in ((a, 1), (b, 0)) if isinstance(x, SharedView)]
    if bits != 16 and not all(along_k):
        raise Fault("type", f"{what}: operands of {bits} bits must be contiguous along k")


def _as_operand(values: np.ndarray, dtype: Any) -> np.ndarray:
    """fp32 is read as tf32: without its last 13 bits."""
    if dtype != tl.float32:
        return values
    return (np.array(values, order="C").view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def warpgroup_mma(a: Any, b: SharedView, acc: Any, *, use_acc: Any = True, precision: Any = None,
                  max_num_imprecise_acc: Any = None, is_async: bool = False) -> Any:
    actor = me()
    actor.pause()
    _check_product(a, b, acc, actor.threads)
    keep = bool(use_acc)
    before = None
    if isinstance(acc, InFlight):
        acc.take()
        before = acc.operation
    start = acc.values if keep and before is None else None

    def perform(operation: Operation) -> None:
        x = a.values if isinstance(a, Tensor) else a.read(operation.text)
        total = _as_operand(x, a.dtype) @ _as_operand(b.read(operation.text), b.dtype)
        if keep:
            total = total + (start if before is None else before.result)
        operation.result = rounded(total, acc.dtype)

    operation = Operation(actor, "wgmma", perform, after=actor.products[-1] if actor.products else None)
    for operand in (a, b):
        if isinstance(operand, SharedView):
            operand.touch_asynchronously(operation, "read")
    actor.products.append(operation)
    actor.machine.effect()
    result = InFlight(operation, list(acc.shape), acc.dtype)
    return result if is_async else warpgroup_mma_wait(0, [result])


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Sequence[Any] | None = None) -> Any:
    """Results in `deps` that are finished become tensors; the others stay in flight."""
    actor = me()
    if deps is None:
        raise Fault("type", f"warpgroup_mma_wait without deps at {site()}")
    actor.retire(actor.products, int(num_outstanding), "wgmmas")

    def value(x: Any) -> Any:
        if not isinstance(x, InFlight) or x.operation in actor.products:
            return x
        x.take()
        return Tensor(x.operation.result, x.dtype)

    results = tuple(map(value, deps))
    return results[0] if len(results) == 1 else results


# --- names ------------------------------------------------------------------------------------------------------------

NAMES: dict[Any, dict[str, Callable[..., Any]]] = {
    hopper: dict(fence_async_shared=fence_async_shared, warpgroup_mma=warpgroup_mma,
                 warpgroup_mma_wait=warpgroup_mma_wait, warpgroup_mma_init=lambda value: value),
    hopper.mbarrier: dict(init=init, invalidate=invalidate, expect=expect, arrive=arrive, wait=wait),
    hopper.tma: dict(async_copy_global_to_shared=tma_load, async_load=tma_load, async_copy_shared_to_global=tma_store,
                     async_store=tma_store, async_atomic_add=tma_reduce_add, store_wait=store_wait)}

for _module, _functions in NAMES.items():
    for _name, _function in _functions.items():
        if hasattr(_module, _name):
            simulate(getattr(_module, _name), _function)
