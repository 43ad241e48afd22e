"""Shared memory: allocations, and views of them (Gluon's shared_memory_descriptor)."""
from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from support.hopper.clocks import Access, Clock, Fault
from support.hopper.formats import STORED, decode, encode
from support.hopper.machine import Operation, me, place, site
from support.hopper.tensor import Tensor, block_shape, to_tensor

WRITTEN = 0xFF      # mask of a byte


class Allocation:
    """Unwritten bytes are ones: NaN in every floating-point type."""

    def __init__(self, size: int, name: str):
        self.name = name
        self.memory = np.full(size, 0xFF, np.uint8)
        self.written = np.zeros(size, np.uint8)
        self.accesses: list[Access] = []
        self.barriers: dict[int, Any] = {}      # byte offset -> MBarrier

    def access(self, new: Access, clock: Clock) -> None:
        """Checks a new access, whose agent knows `clock`, against the earlier ones, then remembers it."""
        kept = []
        for old in self.accesses:
            if new.conflicts(old) and np.shares_memory(old.region, new.region):
                new.check(clock, old)
            same = old.region.__array_interface__ == new.region.__array_interface__
            if not (same and clock.knows(old.stamp) and (new.kind == "write" or old.kind == "read")):
                kept.append(old)    # otherwise the new one stands for both
        self.accesses = [*kept, new]


class SharedView:
    """Part of an allocation, with a shape and a type."""

    def __init__(self, allocation: Allocation, memory: np.ndarray, written: np.ndarray, dtype: Any, layout: Any, label: str):
        self.allocation, self.memory, self.written = allocation, memory, written
        self.dtype, self.layout, self.label = dtype, layout, label
        self.in_one_panel = False

    shape = property(lambda self: list(self.memory.shape))
    rank = property(lambda self: self.memory.ndim)
    numel = property(lambda self: self.memory.size)
    type = property(lambda self: self)
    element_ty = property(lambda self: self.dtype)

    @property
    def offset(self) -> int:
        """In bytes, from the start of the allocation."""
        return self.memory.__array_interface__["data"][0] - self.allocation.memory.__array_interface__["data"][0]

    def _view(self, function: Callable[[np.ndarray], np.ndarray], label: str = "") -> SharedView:
        return SharedView(self.allocation, function(self.memory), function(self.written), self.dtype, self.layout,
                          self.label + label)

    def index(self, index: Any) -> SharedView:
        i = int(index)
        me().machine.visited.add(place()[:2])
        if not 0 <= i < self.shape[0]:
            raise Fault("bounds", f"index {i} of {self.label}, which has {self.shape[0]}, at {site()}")
        return self._view(lambda x: x[i], f"[{i}]")

    def slice(self, start: int, length: int, dim: int = 0) -> SharedView:
        if isinstance(start, Tensor):
            raise Fault("type", f"slice of {self.label} at {site()}: its start must be a constexpr")
        if start < 0 or start + length > self.shape[dim]:
            raise Fault("bounds", f"slice {start} + {length} of {self.label} {self.shape} at {site()}")
        return self._view(lambda x: x[(slice(None),) * dim + (slice(start, start + length),)], f"[{start}:{start + length}]")

    def panel_piece(self, first: int, rows: int, column: int, columns: int) -> SharedView:
        """Some rows of the columns that a swizzle spans, which lie together in real shared memory: there panels lie one behind
        another. Here rows are whole."""
        piece = self.slice(first, rows).slice(column, columns, 1)
        piece.in_one_panel = True
        return piece

    def permute(self, order: Sequence[int]) -> SharedView:
        return self._view(lambda x: x.transpose(order))

    def reshape(self, shape: Sequence[int]) -> SharedView:
        return self._view(lambda x: x.reshape(shape, copy=False))

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> SharedView:
        def view(array: np.ndarray, element: np.dtype) -> np.ndarray:
            flat = array.reshape(-1, copy=False).view(element)
            if math.prod(shape) > flat.size:
                raise Fault("bounds", f"{self.label} at {site()} holds {flat.size} elements of {dtype}, not {list(shape)}")
            return flat[:math.prod(shape)].reshape(shape)

        stored = STORED[dtype]
        return SharedView(self.allocation, view(self.memory, stored), view(self.written, _mask(stored)), dtype, layout,
                          self.label)

    def load(self, layout: Any = None) -> Tensor:
        actor = me()
        actor.pause()
        block_shape(self.shape)
        self.touch("read", "load")
        return Tensor(self.read(f"the load at {site()}"), self.dtype)

    def store(self, value: Tensor) -> None:
        actor = me()
        actor.pause()
        value = to_tensor(value)
        if value.shape != self.shape or value.dtype != self.dtype:
            raise Fault("type", f"store of {value} to {self.label} {self.dtype}{self.shape} at {site()}")
        self.touch("write", "store")
        self.write(encode(value.values, value.dtype))
        actor.machine.effect()

    def _keep_alive(self) -> None:
        pass

    def touch(self, kind: str, verb: str) -> None:
        """Records an ordinary access by the running actor."""
        actor = me()
        text = f"{verb} of {self.label} by {actor.name} at {site()}"
        self.allocation.access(Access(actor.tick(), kind, False, text, self.memory), actor.clock)

    def touch_asynchronously(self, operation: Operation, kind: str) -> None:
        text = f"{operation.text} {kind}s {self.label}"
        self.allocation.access(Access(operation.stamp, kind, True, text, self.memory), operation.clock)

    def read(self, who: str) -> np.ndarray:
        if self.written.min() != np.iinfo(self.written.dtype).max:
            raise Fault("unwritten", f"{who} reads {self.label}, which nothing has written")
        return decode(self.memory, self.dtype)

    def write(self, stored: np.ndarray) -> None:
        self.memory[...] = stored
        self.written[...] = np.iinfo(self.written.dtype).max

    def spoil(self) -> None:
        """Makes the contents unwritten."""
        self.memory[...] = np.frombuffer(b"\xFF" * self.memory.itemsize, self.memory.dtype)[0]
        self.written[...] = 0

    def __str__(self) -> str:
        return f"{self.label} {self.dtype}{self.shape}"


def _mask(stored: np.dtype) -> np.dtype:
    return np.dtype(f"u{stored.itemsize}")


def allocate_shared_memory(element_ty: Any, shape: Sequence[int], layout: Any, value: Tensor | None = None) -> SharedView:
    actor, stored = me(), STORED[element_ty]
    allocation = Allocation(math.prod(shape) * stored.itemsize, _assigned_name())
    actor.program.allocations.append(allocation)
    actor.machine.shared = max(actor.machine.shared, sum(a.memory.size for a in actor.program.allocations))
    view = SharedView(allocation, allocation.memory.view(stored).reshape(shape),
                      allocation.written.view(_mask(stored)).reshape(shape), element_ty, layout, allocation.name)
    if value is not None:
        view.store(value)
    return view


def _assigned_name() -> str:
    """The variable to which the running line of the kernel assigns."""
    file, line, _ = place()
    match = re.match(r"\s*(\w+)\s*=", linecache.getline(file, line))
    return match[1] if match else f"memory of {site()}"


def proxy_fence(shared: bool = True, everywhere: bool = False) -> None:
    """What the running actor knows to be written is open to asynchronous operations after it."""
    actor = me()
    actor.pause()
    stamp = actor.tick()
    histories = [allocation.accesses for allocation in actor.program.allocations] if shared else []
    histories += [shadow.accesses for shadow in actor.machine.shadows.values()] if everywhere else []
    for access in (access for history in histories for access in history):
        if access.kind != "read" and not access.asynchronous and actor.clock.knows(access.stamp):
            access.fences.append(stamp)
