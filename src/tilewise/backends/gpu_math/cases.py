"""A kernel launch as a case to compile without a GPU (`tilewise.inspect`)."""
from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from tilewise.backends.gpu_math.arguments import TYPES


@dataclass(frozen=True)
class Case:
    """See `tilewise.inspect.KernelCase`."""
    name: str
    direction: str
    arch: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    key: str
    unaligned: frozenset[str] = frozenset()
    maxnreg: int | None = None


def typed(point: Any, flat: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """(types, constants) of an entry point's arguments, given what a launch would pass."""
    annotations, signature, constants = point.fn.__annotations__, {}, {}
    for argument, value in flat.items():
        if isinstance(value, torch.Tensor):
            signature[argument] = "*" + TYPES[value.dtype]
        elif hasattr(value, "block_shape"):     # a descriptor for TMA
            signature[argument] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
        elif isinstance(annotations.get(argument), str):
            signature[argument] = annotations[argument]
        else:
            constants[argument] = value
    return signature, constants


def key(*parts: Any) -> str:
    """A hash of what the machine code depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def sources_hash(modules: Iterable[ModuleType]) -> str:
    """Of kernel sources and of Triton's version."""
    import triton
    text = triton.__version__ + "".join(inspect.getsource(module) for module in modules)
    return hashlib.sha256(text.encode()).hexdigest()
