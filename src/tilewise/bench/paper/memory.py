"""Peak memory of a forward and backward pass with its inputs and results, as FlashAttention's table 21 counts it.

On CUDA what torch allocates; elsewhere resident memory, as Linux counts it, in a process of its own.
"""
from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict

import torch

from tilewise.bench.paper.inputs import Inputs, Setting
from tilewise.bench.paper.methods import Method, of_flash_attention
from tilewise.bench.paper.passes import both, entrant
from tilewise.bench.paper.race import Row, admit
from tilewise.bench.resident import GIVE_BACK, restart_peak, status_bytes

PATIENCE = 300.0        # seconds for all methods on one setting


def measure(setting: Setting, device: torch.device) -> Row:
    """{"contenders": {method: its state and bytes}}."""
    if device.type == "cuda":
        found = measured_here(setting, device)
    elif sys.platform == "linux":
        found = measured_apart(setting)
    else:
        words = "resident memory is counted on Linux only"
        found = {method.name: {"state": "refused", "reason": words} for method in of_flash_attention(setting, device)}
    return {"contenders": found, "times_faster": {}}


def measured_apart(setting: Setting) -> dict[str, Row]:
    """The same on the CPU in another process, in which freed memory is given back. Raises RuntimeError with its last words."""
    code = f"from tilewise.bench.paper import memory; memory.print_measured({json.dumps(asdict(setting))!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=os.environ | GIVE_BACK, capture_output=True,
                          text=True, timeout=PATIENCE)
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or ["it was killed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def print_measured(text: str) -> None:
    print(json.dumps(measured_here(Setting(**json.loads(text)), torch.device("cpu"))))


def measured_here(setting: Setting, device: torch.device) -> dict[str, Row]:
    return {method.name: of_method(method, setting, device) for method in of_flash_attention(setting, device)}


def of_method(method: Method, setting: Setting, device: torch.device) -> Row:
    """Its state, and bytes if it is right; the first run, which may compile and allocate for good, is not counted."""
    if (state := admit(entrant(method, [Inputs(setting, device)]), device))["state"] != "timed":
        return state
    gc.collect()
    before = start(device)
    x = Inputs(setting, device)
    both([x], [method.prepare(x)], 0)
    return state | {"bytes": max(0, peak(device) - before)}


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
