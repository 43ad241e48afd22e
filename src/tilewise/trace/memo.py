"""Values that follow from tensors, remembered for as long as no one writes to those."""
from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Memo:
    """The last `kept` values, by key and by the tensors they were made from."""

    def __init__(self, kept: int = 64):
        self.kept = kept
        self.known: OrderedDict[tuple, tuple[list, Any]] = OrderedDict()

    def find(self, key: tuple, tensors: Sequence[Tensor]) -> Any:
        """The value remembered for a key and these very tensors, unchanged since; None if there is none."""
        whole = (*key, *map(id, tensors))
        if whole not in self.known or not _tell_writes(tensors):
            return None
        found, value = self.known[whole]
        if any(ref() is not t or version != t._version for (ref, version), t in zip(found, tensors, strict=True)):
            return None
        self.known.move_to_end(whole)
        return value

    def keep(self, key: tuple, tensors: Sequence[Tensor], value: Any) -> Any:
        """The value, remembered where it can be."""
        if _tell_writes(tensors):
            whole = (*key, *map(id, tensors))
            self.known[whole] = [(weakref.ref(t), t._version) for t in tensors], value
            while len(self.known) > self.kept:
                self.known.popitem(last=False)
        return value

    def get(self, key: tuple, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """The value, made where it is not remembered; always made in a CUDA graph, whose replay shall make it again."""
        if abstract(*tensors) or (tensors and capturing(tensors[0].device)):
            return make()
        value = self.find(key, tensors)
        return self.keep(key, tensors, make()) if value is None else value


def _tell_writes(tensors: Sequence[Tensor]) -> bool:
    return not any(t.is_inference() for t in tensors)


def abstract(*tensors: Tensor) -> bool:
    """Whether something follows operations rather than values: a compiler, a dispatch mode, or tensors that are fake, on `meta`
    or wrap others. What such tensors hold is not looked at."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for x in tensors:  # noqa: SIM110  every call comes here; a generator takes three times as long
        if x.is_meta or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return True
    return False


def readable(*tensors: Tensor) -> bool:
    """Whether the host may look at values without waiting: on the CPU, not abstract, not inside torch.func's wrappers."""
    return not abstract(*tensors) and all(
        x.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
