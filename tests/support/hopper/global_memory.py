"""Global memory: torch tensors, pointers into them, TMA descriptors of them."""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl

from support.hopper.clocks import Access, Clock, Fault
from support.hopper.formats import FROM_TORCH, STORED
from support.hopper.machine import Machine, Operation, me, site
from support.hopper.tensor import Tensor, to_tensor


class Shadow:
    """Who has used the elements of a storage. Writes are found by element; reads are listed and searched at writes."""

    def __init__(self, size: int):
        self.accesses: list[Access] = []        # writes and atomics, numbered from 1 in `writer`
        self.writer = np.zeros(size, np.int32)
        self.marked = np.zeros(size, bool)
        self.reads: list[Access] = []
        self.others: dict[int, list[Access]] = {}    # atomics that the numbered one does not order

    def access(self, new: Access, clock: Clock) -> None:
        """Checks a new access, whose agent knows `clock`; its region is a function that gives the elements."""
        where = new.region()
        if not where.size:
            return
        numbers = self.writer[where]
        unordered: list[Access] = []
        if numbers.any():
            for number in np.unique(numbers[numbers > 0]).tolist():
                for old in [self.accesses[number - 1], *self.others.get(number, ())]:
                    if self._meet(where, old):
                        new.check(clock, old)
                        if not clock.knows(old.stamp):
                            unordered.append(old)
        if new.kind == "read":
            self.reads.append(new)
            return
        for old in self.reads:
            if not clock.knows(old.stamp) and self._meet(where, old):
                new.check(clock, old)
        self.accesses.append(new)
        self.writer[where] = len(self.accesses)
        if unordered:
            self.others[len(self.accesses)] = unordered

    def _meet(self, where: np.ndarray, old: Access) -> bool:
        self.marked[where] = True
        found = bool(self.marked[old.region()].any())
        self.marked[where] = False
        return found


class GlobalArray:
    """A torch tensor as kernels see it: from its first element to its last."""

    def __init__(self, tensor: torch.Tensor, name: str, machine: Machine):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be a CPU tensor, got one on {tensor.device}")
        self.name, self.dtype = name, FROM_TORCH[tensor.dtype]
        self.addition = "write" if name in machine.ordered else "atomic"    # the kind of access
        stored, storage = STORED[self.dtype], tensor.untyped_storage()
        self.extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        self.first = tensor.storage_offset()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.data = whole[self.first * stored.itemsize:][:self.extent * stored.itemsize].view(stored)
        key = storage.data_ptr(), stored.itemsize
        self.shadow = machine.shadows.setdefault(key, Shadow(storage.nbytes() // stored.itemsize))
        self.key = key

    def touch(self, kind: str, verb: str, offsets: np.ndarray) -> None:
        """Records an ordinary access by the running actor."""
        actor, where = me(), offsets + self.first
        text = f"{verb} of {self.name} by {actor.name} at {site()}"
        self.shadow.access(Access(actor.tick(), kind, False, text, lambda: where), actor.clock)


class Pointer(Tensor):
    """A pointer into an array, or a block of them; `values` are offsets in elements."""

    def __init__(self, array: GlobalArray, values: Any):
        super().__init__(values, tl.pointer_type(array.dtype))
        self.array = array

    def like(self, values: Any) -> Pointer:
        return Pointer(self.array, values)

    def to(self, *_: Any, **__: Any) -> Tensor:
        raise Fault("unknown", f"cast of a pointer at {site()}")

    def __add__(self, offset: Any) -> Pointer:
        steps = offset.values if isinstance(offset, Tensor) else np.asarray(offset)
        if isinstance(offset, Pointer) or steps.dtype.kind not in "iu":
            raise Fault("type", f"pointer plus {offset} at {site()}")
        if steps.ndim and self.values.ndim and steps.ndim != self.values.ndim:
            raise Fault("type", f"pointers {self.shape} plus {list(steps.shape)} at {site()}: their ranks differ")
        return self.like(self.values + steps.astype(np.int64))

    __radd__ = __add__

    def __sub__(self, offset: Any) -> Pointer:
        return self + offset * -1

    def selected(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Offsets where the mask holds, inside the array, and the mask."""
        keep = mask.values if isinstance(mask, Tensor) else np.asarray(True if mask is None else mask)
        if keep.ndim and self.values.ndim and keep.ndim != self.values.ndim:
            raise Fault("type", f"mask {list(keep.shape)} of pointers {self.shape} at {site()}: their ranks differ")
        offsets, keep = np.broadcast_arrays(self.values, keep)
        chosen = offsets[keep]
        outside = (chosen < 0) | (chosen >= self.array.extent)
        if outside.any():
            raise Fault("bounds", f"element {chosen[outside][0]} of {self.array.name} [{self.array.extent}] at {site()}")
        return chosen, keep

    def __str__(self) -> str:
        return f"pointer to {self.array.name}{self.shape}"


class Descriptor:
    """A TMA descriptor: loads give zeros outside the tensor, stores and additions leave it alone."""

    def __init__(self, array: GlobalArray, shape: Any, strides: Any, block_shape: Any, layout: Any, padding: str = "zero"):
        if padding != "zero":
            raise Fault("unknown", f"descriptor with padding {padding}")
        self.array, self.layout, self.dtype = array, layout, array.dtype
        self.sizes, self.steps, self.block_shape = list(shape), list(strides), list(block_shape)
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.steps, strict=True))
        if last >= array.extent:
            raise Fault("bounds", f"{self.sizes} at strides {self.steps} reaches beyond {array.name} [{array.extent}]")
        self.elements = np.lib.stride_tricks.as_strided(array.data, self.sizes, [s * array.data.itemsize for s in self.steps])

    shape = property(lambda self: tuple(map(to_tensor, self.sizes)))
    strides = property(lambda self: tuple(to_tensor(s).to(tl.int64) for s in self.steps))

    @property
    def block_type(self) -> Any:
        nbytes = int(np.prod(self.block_shape)) * self.dtype.primitive_bitwidth // 8
        return SimpleNamespace(shape=self.block_shape, nbytes=nbytes, element_ty=self.dtype)

    nbytes_per_cta = property(lambda self: self.block_type.nbytes)

    def box(self, coordinates: Any) -> Box:
        if len(coordinates) != len(self.sizes):
            raise Fault("type", f"{len(coordinates)} coordinates for {self} at {site()}")
        if any(isinstance(c, Tensor) and c.dtype == tl.int64 for c in coordinates):
            raise Fault("type", f"64-bit coordinate of a TMA transfer at {site()}")
        return Box(self, [int(c) for c in coordinates])

    def __str__(self) -> str:
        return f"descriptor of {self.array.name}{self.block_shape}"


class Box:
    """The part of a descriptor's tensor that one transfer concerns."""

    def __init__(self, descriptor: Descriptor, coordinates: list[int]):
        self.descriptor, self.array = descriptor, descriptor.array
        lows = [max(c, 0) for c in coordinates]
        highs = [max(min(c + b, n), low) for c, b, n, low in
                 zip(coordinates, descriptor.block_shape, descriptor.sizes, lows, strict=True)]
        self.inside = tuple(slice(low, high) for low, high in zip(lows, highs, strict=True))
        self.part = tuple(slice(low - c, high - c) for low, high, c in zip(lows, highs, coordinates, strict=True))

    def flat(self) -> np.ndarray:
        """The elements' places in the storage."""
        place: Any = np.array([self.array.first])
        for extent, stride in zip(self.inside, self.descriptor.steps, strict=True):
            place = (place[:, None] + np.arange(extent.start, extent.stop) * stride).reshape(-1)
        return place

    def touch(self, operation: Operation, kind: str) -> None:
        """Records an access by an operation."""
        text = f"{operation.text} {'adds to' if kind == 'atomic' else kind + 's'} {self.array.name}"
        kind = self.array.addition if kind == "atomic" else kind
        self.array.shadow.access(Access(operation.stamp, kind, True, text, self.flat), operation.clock)

    def load(self) -> np.ndarray:
        block = np.zeros(self.descriptor.block_shape, self.array.data.dtype)
        block[self.part] = self.descriptor.elements[self.inside]
        return block

    def store(self, block: np.ndarray) -> None:
        self.descriptor.elements[self.inside] = block[self.part]

    def combine(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray], block: np.ndarray) -> None:
        target = self.descriptor.elements[self.inside]
        target[...] = function(target, block[self.part])
