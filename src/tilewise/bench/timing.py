"""How long calls take and what memory they need.

Calls that are compared run in turns, each round in another order: what else the machine does, and its clock rate, hit all
of them alike, and ratios are taken within a round. On CUDA a call is timed by events, with the L2 cache overwritten before
each; that also keeps the device busy while the host prepares the call, so that only calls whose host time exceeds it
(`Timing.host`) show the host's.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

Call = Callable[[int], object]          # given the round's number, so that it can take turns with several inputs

K = TypeVar("K", bound=Hashable)

FLUSH_BYTES = 2**30


class Timing(NamedTuple):
    """Seconds of each round: until the result was there, and until the host was free again."""
    rounds: list[float]
    host: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        first, _, third = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return first, third

    def summary(self) -> dict[str, Any]:
        return {"seconds": self.median, "quartiles": self.quartiles, "host_seconds": statistics.median(self.host),
                "rounds": len(self.rounds)}


def compare(calls: Mapping[K, Call], device: torch.device, *, seconds: float, least: int = 3,
            most: int = 100) -> dict[K, Timing]:
    """Times calls in turns for about `seconds` in all, at least `least` rounds and at most `most`.

    Each call first runs twice (once, if that took very long): for compilation, then to see how long it takes. One that
    takes longer than `seconds` by itself is not run again; that time is its only round. Errors of a call are raised.
    """
    clock = _on_cuda(device) if device.type == "cuda" else _on_host
    found: dict[K, Timing] = {name: Timing([], []) for name in calls}
    trial: dict[K, tuple[float, float]] = {}
    for name, call in calls.items():
        trial[name] = clock({name: call}, 0)[name]
        if trial[name][0] <= 5 * seconds:       # compilation may have been part of it
            trial[name] = clock({name: call}, 0)[name]
    turns = {name: call for name, call in calls.items() if trial[name][0] <= seconds}
    begin, done = time.perf_counter(), 0
    while turns and done < most and (done < least or time.perf_counter() - begin < seconds):
        names = list(turns)
        first = done % len(names)
        measured = clock({name: turns[name] for name in names[first:] + names[:first]}, done)
        for name, (duration, host) in measured.items():
            found[name].rounds.append(duration)
            found[name].host.append(host)
        done += 1
    return {name: timing if timing.rounds else Timing([trial[name][0]], [trial[name][1]])
            for name, timing in found.items()}


def times_faster(ours: Timing, other: Timing) -> dict[str, Any]:
    """How many times faster `ours` is: median and quartiles over rounds, where both have the same rounds."""
    if len(ours.rounds) != len(other.rounds):
        ours, other = Timing([ours.median], []), Timing([other.median], [])
    found = [b / a for a, b in zip(ours.rounds, other.rounds, strict=True)]
    paired = Timing(found, found)
    return {"median": paired.median, "quartiles": paired.quartiles}


def minus(whole: Timing, piece: Timing) -> Timing:
    """What is left of a call's times without those of another, round by round where both have the same rounds."""
    if len(whole.rounds) != len(piece.rounds):
        whole, piece = (Timing([t.median], [statistics.median(t.host)]) for t in (whole, piece))
    return Timing(*([max(a - b, 1e-9) for a, b in zip(x, y, strict=True)] for x, y in zip(whole, piece, strict=True)))


def _on_host(calls: Mapping[K, Call], turn: int) -> dict[K, tuple[float, float]]:
    found = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        call(turn)
        found[name] = (time.perf_counter() - begin,) * 2
    return found


def _on_cuda(device: torch.device) -> Callable[[Mapping[K, Call], int], dict[K, tuple[float, float]]]:
    share = torch.cuda.get_device_properties(device).total_memory // 16
    buffer = torch.empty(min(FLUSH_BYTES, share), dtype=torch.int8, device=device)

    def clock(calls: Mapping[K, Call], turn: int) -> dict[K, tuple[float, float]]:
        marks = {}
        with torch.cuda.device(device):
            for name, call in calls.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                buffer.zero_()
                start.record()
                begin = time.perf_counter()
                call(turn)
                host = time.perf_counter() - begin
                end.record()
                marks[name] = start, end, host
            torch.cuda.synchronize()
        return {name: (start.elapsed_time(end) / 1000, host) for name, (start, end, host) in marks.items()}

    return clock


def workspace(call: Call, device: torch.device) -> int:
    """Bytes that a call on a CUDA device holds at its peak, beside what was held before and the tensors that it returns."""
    call(0)     # what libraries allocate once and keep is not counted
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = call(0)
    torch.cuda.synchronize(device)
    own = [x for x in (results if isinstance(results, tuple) else (results,)) if isinstance(x, torch.Tensor)]
    return torch.cuda.max_memory_allocated(device) - before - sum(x.nbytes for x in own)


def finish(device: torch.device) -> None:
    """Waits until the device has done its work; its errors come up here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alive(device: torch.device) -> bool:
    """Whether the device still takes work: after an illegal access it does not, for the rest of the process."""
    try:
        finish(device)
        return bool((torch.ones(1, device=device) + 1).item() == 2)
    except RuntimeError:
        return False
