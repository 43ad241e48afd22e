"""Memory beside inputs, outputs and gradients, as the sequence grows.

On a GPU torch's allocator says it; on a CPU Linux does, of processes whose allocator gives memory back at once, one for each
contender. The seconds are those of one such call.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from tilewise.bench import record
from tilewise.bench.attention import contenders, entrant, inputs_laid_bhsd
from tilewise.bench.contest import BOTH, FORWARD, Outcome, admit
from tilewise.bench.gate import Gate
from tilewise.bench.peers import Contender
from tilewise.bench.record import Entry
from tilewise.bench.resident import GIVE_BACK, restart_peak, status_bytes
from tilewise.bench.shapes import Shape
from tilewise.bench.suite import Trial, Wanted
from tilewise.bench.timing import Call, Timing, finish, workspace
from tilewise.bench.workers import apart

MODES = FORWARD, BOTH
SHORT = 256             # rows of the problem on which contenders are judged: fp64 scores of long ones would need too much
SHOWN = "tilewise", "sdpa flash", "sdpa cudnn", "standard"


def trials(wanted: Wanted) -> list[Trial]:
    if wanted.device.type == "cuda":
        lengths = [2048] if wanted.quick else [16384, 32768, 65536, 131072]
        shapes = [Shape(1, length, 16, 16, 128, True, "bfloat16") for length in lengths]
    else:
        lengths = [512, 2048] if wanted.quick else [1024, 2048, 4096, 8192, 16384]
        shapes = [Shape(1, length, 4, 4, 64, True, "float32") for length in lengths]
    return [Trial("memory", str(shape), asdict(shape) | {"mask": shape.mask}, MODES,
                  partial(measure, shape, wanted)) for shape in shapes]


def measure(shape: Shape, wanted: Wanted) -> dict[str, Outcome]:
    """Bytes of the forward pass, which keeps what the backward needs, and of both."""
    found: dict[str, Outcome] = {mode: {"contenders": {}, "times_faster": {}} for mode in MODES}
    for contender in contenders(shape, wanted):
        if contender.name in SHOWN:
            for mode, entry in of_one(contender, shape, wanted.device).items():
                found[mode]["contenders"][contender.name] = entry
    return found


def of_one(contender: Contender, shape: Shape, device: torch.device) -> dict[str, Entry]:
    """A contender's entries by mode."""
    short = replace(shape, seqlen=SHORT)
    inputs = short.draw(device, 0)
    judged = entrant(contender, short, [inputs], Gate(*inputs, short.causal), False, device)
    if BOTH not in judged.calls:
        return dict.fromkeys(MODES, Entry(state=judged.state, reason=judged.reason))
    state = admit(judged, device)
    if state["state"] != "timed":
        return dict.fromkeys(MODES, state)
    try:
        found = (held(contender, shape, device) if device.type == "cuda" else
                 apart("memory", "held_here", contender.name, asdict(shape), environment=GIVE_BACK, patience=600.0))
    except Exception as error:  # such as memory
        return dict.fromkeys(MODES, Entry(state="refused", reason=record.words(error)))
    summaries: dict[str, Any] = {mode: Timing([seconds], [seconds]).summary() for mode, (_, seconds) in found.items()}
    return {mode: state | summaries[mode] | Entry(state="timed", reason="", bytes=found[mode][0]) for mode in MODES}


def held_here(name: str, fields: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """`held` of a contender by name, in a process of its own."""
    shape, device = Shape(**fields), torch.device("cpu")
    return held(next(c for c in contenders(shape, Wanted(device)) if c.name == name), shape, device)


def held(contender: Contender, shape: Shape, device: torch.device) -> dict[str, tuple[int, float]]:
    """Bytes at the peak beyond inputs and results, and seconds of a call, by mode. Raises MemoryError for what is too large."""
    own = shape.draw(device, 0)
    if contender.wants_bhsd:
        own = inputs_laid_bhsd(own)
    inputs = replace(shape, seqlen=16).draw(device, 0)
    ready = entrant(contender, shape, [own], Gate(*inputs, shape.causal), False, device)
    if not ready.calls:
        raise MemoryError(ready.reason)
    peak: Callable[[Call, torch.device], int] = workspace if device.type == "cuda" else resident
    return {mode: (peak(call, device), seconds_of(call, device)) for mode, call in ready.calls.items()}


def seconds_of(call: Call, device: torch.device) -> float:
    begin = time.perf_counter()
    call(0)
    finish(device)
    return time.perf_counter() - begin


def resident(call: Call, device: torch.device) -> int:
    """As `timing.workspace`, of this process."""
    call(0)
    restart_peak()
    before = status_bytes("VmRSS")
    found: Any = call(0)
    results = found if isinstance(found, tuple) else (found,)
    return max(0, status_bytes("VmHWM") - before - sum(x.nbytes for x in results))
