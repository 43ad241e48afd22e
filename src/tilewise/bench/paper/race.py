"""Who takes part in one measurement: held to the tolerance rule, then timed in turns with all others that are right."""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tilewise.bench import record
from tilewise.bench.timing import Call, Timing, alive, compare, minus
from tilewise.bench.tolerance import Verdict

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASSES = FORWARD, BACKWARD, BOTH
Row = dict[str, Any]


@dataclass(frozen=True)
class Entrant:
    """A contender. calls: what is timed, by pass; without any, `state` and `reason` say why. check: verdicts on such a call."""
    name: str
    calls: Mapping[str, Call] = field(default_factory=dict)
    check: Callable[[], Sequence[Verdict]] = list
    state: str = "absent"
    reason: str = ""


def race(entrants: Sequence[Entrant], device: torch.device, modes: Sequence[str], *, seconds: float,
         rates: Callable[[str, float], Row] = lambda mode, seconds: {}) -> dict[str, Row]:
    """By mode {"contenders": ..., "times_faster": than each other, of the first}.

    The backward is the difference of both passes together and the forward alone, within a round. seconds: for all together.
    rates: more of a contender's entry, from mode and seconds.
    """
    states = {e.name: admit(e, device) for e in entrants}
    right = [e for e in entrants if states[e.name]["state"] == "timed"]
    timed = compare({(e.name, mode): call for e in right for mode, call in e.calls.items()}, device, seconds=seconds)
    for e in right:
        if BACKWARD in modes:
            timed[e.name, BACKWARD] = minus(timed[e.name, BOTH], timed[e.name, FORWARD])
    found = {}
    for mode in modes:
        of_mode = {e.name: timed[e.name, mode] for e in right}
        contenders = {name: dict(state) for name, state in states.items()}
        for name, timing in of_mode.items():
            contenders[name] |= timing.summary() | rates(mode, timing.median)
        first = entrants[0].name
        ratios = {name: ratio(of_mode[first], timing) for name, timing in of_mode.items() if first in of_mode and name != first}
        found[mode] = {"contenders": contenders, "times_faster": ratios}
    return found


def admit(entrant: Entrant, device: torch.device) -> Row:
    """The contender's state before timing, with the errors found."""
    if not entrant.calls:
        return {"state": entrant.state, "reason": entrant.reason}
    try:
        verdicts = entrant.check()
    except Exception as error:  # whatever a library raises on what it does not take, such as memory
        if not alive(device):
            raise SystemExit(f"{entrant.name}: {record.words(error)}; the device no longer answers") from None
        return {"state": "refused", "reason": record.words(error)}
    words = "; ".join(f"{v.name}: {v.note or f'error {v.error:.1e}, allowed {v.allowed:.1e}'}" for v in verdicts if not v.ok)
    return {"state": "wrong" if words else "timed", "reason": words, "errors": {v.name: [v.error, v.allowed] for v in verdicts}}


def ratio(ours: Timing, other: Timing) -> Row:
    """How many times faster `ours` is: median and quartiles over rounds, where both have the same rounds."""
    if len(ours.rounds) != len(other.rounds):
        ours, other = Timing([ours.median], []), Timing([other.median], [])
    found = [b / a for a, b in zip(ours.rounds, other.rounds, strict=True)]
    return {"median": Timing(found, found).median, "quartiles": Timing(found, found).quartiles}


def short_of(needed: float, device: torch.device, what: str) -> str:
    """Why there is no room for so many bytes; nothing, if there is."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{what} need {needed / 2**30:.1f} GiB, free {free / 2**30:.1f} GiB" if needed > free else ""
