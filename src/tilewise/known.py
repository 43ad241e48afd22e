"""The memory of calls: bounded, each process's own, and by keys that hold no tensor (`calls.py`, `steps.py`)."""
from __future__ import annotations

import os
import threading
from typing import Any

from torch import Tensor

KEPT = 512                              # entries; the oldest goes first
ALIGNED = 16                            # bytes: what a kernel may assume of where a tensor begins

calls: dict[tuple, Any] = {}
_lock = threading.Lock()


def layout(x: Tensor) -> tuple:
    """All of a tensor that decides how it is computed with: neither what it holds nor where it begins."""
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNED


def state(x: Any) -> tuple | None:
    """How a tensor is, what it holds included; None of anything else, since it does not change."""
    return (layout(x), x._version, x.requires_grad) if isinstance(x, Tensor) else None


def remember(key: tuple, found: Any) -> None:
    with _lock:
        while len(calls) >= KEPT:
            calls.pop(next(iter(calls)), None)
        calls[key] = found


def remembered(key: tuple) -> Any:
    try:
        return calls.get(key)
    except TypeError:                   # something that is no option at all, as `problem.make` will say
        return None


def forget() -> None:
    """Forgets all calls, as a forked child does: its threads are others."""
    global _lock
    _lock = threading.Lock()
    calls.clear()


os.register_at_fork(after_in_child=forget)
