"""Peak memory of a forward and backward pass with its inputs and results, as FlashAttention's table 21 counts it.

On CUDA what torch allocates; elsewhere resident memory, as Linux counts it, in a process of its own, which says little below a
megabyte: pages that the process holds already are not counted again.
"""
from __future__ import annotations

import gc
import sys
from dataclasses import asdict
from typing import Any

import torch

from tilewise.bench.contest import Outcome, admit
from tilewise.bench.paper.inputs import Inputs, Setting
from tilewise.bench.paper.methods import Method, methods
from tilewise.bench.paper.passes import both, entrant
from tilewise.bench.record import Entry
from tilewise.bench.resident import GIVE_BACK, restart_peak, status_bytes
from tilewise.bench.suite import Wanted
from tilewise.bench.workers import apart

MEMORY = "memory"       # the mode of table 21
PATIENCE = 600.0        # seconds for all methods on one setting


def measure(setting: Setting, wanted: Wanted) -> dict[str, Outcome]:
    """Each method's state, and bytes."""
    found: dict[str, Entry]
    if wanted.device.type == "cuda":
        found = {method.name: held(method, setting, wanted.device) for method in methods(setting, wanted)}
    elif sys.platform == "linux":
        found = apart("paper.memory", "held_here", asdict(setting), environment=GIVE_BACK, patience=PATIENCE)
    else:
        found = {method.name: Entry(state="refused", reason="resident memory is counted on Linux only")
                 for method in methods(setting, wanted)}
    return {MEMORY: Outcome(contenders=found, times_faster={})}


def held_here(fields: dict[str, Any]) -> dict[str, Entry]:
    """All methods, in a process in which freed memory is given back at once."""
    setting, device = Setting(**fields), torch.device("cpu")
    return {method.name: held(method, setting, device) for method in methods(setting, Wanted(device))}


def held(method: Method, setting: Setting, device: torch.device) -> Entry:
    """A method's state, and bytes if it is right; the first run, which may compile and allocate for good, is not counted."""
    state = admit(entrant(method, [drawn(method, setting, device)]), device)
    if state["state"] != "timed":
        return state
    gc.collect()
    before = start(device)
    x = drawn(method, setting, device)
    both([x], [method.prepare(x)], 0)
    return state | Entry(state="timed", reason="", bytes=max(0, peak(device) - before))


def drawn(method: Method, setting: Setting, device: torch.device) -> Inputs:
    x = Inputs(setting, device)
    return x.like(relaid=True) if method.wants_bhsd else x


def start(device: torch.device) -> int:
    if device.type != "cuda":
        restart_peak()
        return status_bytes("VmRSS")
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")
