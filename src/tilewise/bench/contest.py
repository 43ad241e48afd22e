"""One case and who takes part in it: each is held to the tolerance rule, those that are right are timed in turns.

A yardstick is what the machine can do, such as a copy of memory: nobody judges it, and its time is that of as much work as
ours does (`Entrant.factor`), so that it is compared like any other.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from tilewise.bench import record
from tilewise.bench.gate import faults
from tilewise.bench.record import Entry, Faster, State
from tilewise.bench.timing import Call, Timing, alive, compare, minus, times_faster, workspace
from tilewise.bench.tolerance import Verdict

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASSES = FORWARD, BACKWARD, BOTH


@dataclass(frozen=True)
class Entrant:
    """A contender. calls: what is timed, by mode; without one for a mode, `state` and `reason` say why.

    check: verdicts on one such call; None: a yardstick. factor: what its time is multiplied by.
    """
    name: str
    calls: Mapping[str, Call] = field(default_factory=dict)
    check: Callable[[], Sequence[Verdict]] | None = None
    state: State = "absent"
    reason: str = ""
    factor: float = 1.0


class Outcome(TypedDict):
    """What a row of results says beside its name and setting."""
    contenders: dict[str, Entry]
    times_faster: dict[str, Faster]


def admit(entrant: Entrant, device: torch.device) -> Entry:
    """The contender's state before timing, with the errors found."""
    if not entrant.calls:
        return {"state": entrant.state, "reason": entrant.reason}
    if entrant.check is None:
        return {"state": "timed", "reason": "", "yardstick": True}
    try:
        verdicts = entrant.check()
    except Exception as error:  # whatever a library raises on what it does not take, such as memory
        if not alive(device):
            raise SystemExit(f"{entrant.name}: {record.words(error)}; the device no longer answers") from None
        return {"state": "refused", "reason": record.words(error)}
    words = faults(verdicts)
    return {"state": "wrong" if words else "timed", "reason": words, "errors": {v.name: [v.error, v.allowed] for v in verdicts}}


def race(entrants: Sequence[Entrant], device: torch.device, modes: Sequence[str], *, seconds: float, least: int = 3,
         most: int = 100, rates: Callable[[str, float], Any] = lambda mode, seconds: {}) -> dict[str, Outcome]:
    """For each mode the contenders' states and times, and how many times faster the first is than each other.

    The backward is the difference of both passes together and the forward alone, within a round. seconds: for all together.
    rates: more of a contender's entry, from mode and seconds.
    """
    states = {e.name: admit(e, device) for e in entrants}
    right = [e for e in entrants if states[e.name]["state"] == "timed"]
    calls = {(e.name, mode): call for e in right for mode, call in e.calls.items()}
    held = {key: workspace(call, device) for key, call in calls.items()} if device.type == "cuda" else {}
    timed = compare(calls, device, seconds=seconds, least=least, most=most)
    timed = {(e.name, mode): scaled(timed[e.name, mode], e.factor) for e in right for mode in e.calls}
    for e in right:
        if FORWARD in e.calls and BOTH in e.calls:
            timed[e.name, BACKWARD] = minus(timed[e.name, BOTH], timed[e.name, FORWARD])
    found = {}
    for mode in modes:
        of_mode = {e.name: timed[e.name, mode] for e in right if (e.name, mode) in timed}
        contenders = {e.name: entry(e, states[e.name], of_mode.get(e.name)) for e in entrants}
        for name, timing in of_mode.items():
            contenders[name].update(rates(mode, timing.median))
            if (name, mode) in held:
                contenders[name]["bytes"] = held[name, mode]
        found[mode] = Outcome(contenders=contenders, times_faster=dict(compared(entrants[0].name, of_mode)))
    return found


def outcome(timed: Mapping[str, Timing]) -> Outcome:
    """Of contenders that are right, ours first."""
    contenders = {name: entry(Entrant(name), {"state": "timed", "reason": ""}, timing) for name, timing in timed.items()}
    return Outcome(contenders=contenders, times_faster=dict(compared(next(iter(timed)), timed)))


def entry(entrant: Entrant, state: Entry, timing: Timing | None) -> Entry:
    """What is said of a contender in one mode."""
    if timing is not None:
        summary: Any = timing.summary()
        return state | summary
    if state["state"] == "timed":       # in other modes
        return {"state": entrant.state, "reason": entrant.reason}
    return state


def compared(first: str, timed: Mapping[str, Timing]) -> Iterator[tuple[str, Faster]]:
    for name, timing in timed.items():
        if first in timed and name != first:
            ratio: Any = times_faster(timed[first], timing)
            yield name, ratio


def scaled(timing: Timing, factor: float) -> Timing:
    return Timing([factor * x for x in timing.rounds], [factor * x for x in timing.host])


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses; a guess where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
