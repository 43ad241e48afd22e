"""Launches that are made again, of tensors that lie in memory as those before did.

`kernel[grid](...)` binds arguments by name, asks each what it is to be specialised by, makes a key of the answers and looks the
compiled kernel up: that takes the host several times as long as the launch itself. The answers follow from dtypes and numbers,
which are settled, and of each pointer from whether it is a multiple of 16 bytes, which is not: tensors with the same strides
may begin anywhere. So the compiled kernel, which `kernel[grid](...)` returns, is kept for the pointers that are such multiples,
and called by Triton's own `compiled[grid](*arguments)`. It never gets others: each launch looks at them all.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tilewise.backends.gpu_math.entry import entry, flatten, slots_of

ALIGNMENT = 16                          # bytes: what Triton specialises pointers by
OPTIONS = {"enable_fp_fusion": True}    # of the compiler: a * b + c rounds once; no longer its default from Triton 3.10 on
HERE = contextlib.nullcontext()


class Launch:
    """A kernel, for a program's text, and what it is told but where tensors begin. Keeps no tensor.

    values: the kernel's arguments by name. options: of Triton's compiler.
    """
    __slots__ = ("captured", "compiled", "device", "grid", "named", "options", "point", "settled")

    def __init__(self, kernel: Any, program: str, grid: Sequence[int], values: Mapping[str, Any], device: torch.device,
                 **options: int):
        point, flat = entry(kernel, program, values.get("LOOKUP")), flatten(kernel, program, values)
        self.point, self.grid, self.device, self.options = point, (*grid, 1, 1)[:3], device, options
        places = {name: place for place, name in enumerate(point.arg_names) if isinstance(flat[name], Tensor)}
        self.captured = [(name, places.pop(name)) for name in slots_of(kernel, program, "captured")]
        self.named = list(places.items())
        self.settled = [None if isinstance(flat[name], Tensor) else flat[name] for name in point.arg_names]
        self.compiled: dict[tuple[bool, ...] | None, Callable[..., None]] = {}      # by which pointers are aligned; None: all

    def __call__(self, tensors: Mapping[str, Any]) -> None:
        """tensors: by the kernel's names; others may be among them."""
        arguments, together = self.settled.copy(), 0
        for name, place in self.named:
            arguments[place] = begin = tensors[name].data_ptr()
            together |= begin
        if self.captured:
            for (_, place), x in zip(self.captured, tensors["captured"], strict=True):
                arguments[place] = begin = x.data_ptr()
                together |= begin
        aligned = None
        if together % ALIGNMENT:
            aligned = tuple([arguments[place] % ALIGNMENT == 0 for _, place in (*self.named, *self.captured)])
        compiled = self.compiled.get(aligned)
        if compiled is None:
            self.compile(tensors, aligned)
        else:
            with current(self.device):
                compiled(*arguments)

    def compile(self, tensors: Mapping[str, Any], aligned: tuple[bool, ...] | None) -> None:
        """Launches as Triton does, and keeps what it has compiled; its interpreter compiles nothing."""
        flat = dict(zip(self.point.arg_names, self.settled, strict=True)) | {name: tensors[name] for name, _ in self.named}
        if self.captured:
            flat |= {name: x for (name, _), x in zip(self.captured, tensors["captured"], strict=True)}
        compiled = start(self.point, self.grid, flat, self.device, **self.options)
        if compiled is not None:
            self.compiled[aligned] = compiled[self.grid]


def start(point: Any, grid: Sequence[int], flat: Mapping[str, Any], device: torch.device, **options: int) -> Any:
    """Launches an entry point, once; the compiled kernel, or None from Triton's interpreter."""
    with current(device):
        return point[tuple(grid)](**flat, **options, **OPTIONS)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Where Triton launches on a device: it does so on the current one, whatever device tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(device)
