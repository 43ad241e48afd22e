"""Who may be timed, and by how much the first is faster than each other."""
from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tilewise.bench import record
from tilewise.bench.cases import Call, Case
from tilewise.bench.timing import Timing, alive
from tilewise.bench.tolerance import Results, judge

Row = dict[str, Any]
Found = dict[str, Tensor]
K = TypeVar("K", bound=Hashable)

CHECKED = 4             # heads of a group whose results are looked at


@dataclass(frozen=True)
class Gate:
    """What is right: the results in fp64, and those of standard attention in the inputs' dtype. q, k, v: the inputs."""
    truth: Found
    standard: Found
    inputs: tuple[Tensor, Tensor, Tensor]

    def faults(self, found: Found) -> str:
        """What is wrong; nothing, if it may be timed."""
        call = Call(Case("timed"), *self.inputs, {})
        verdicts = judge(call, Results(found), Results(self.truth), Results(self.standard))
        return "; ".join(f"{v.name}: {v.note or f'error {v.error:.1e}, allowed {v.allowed:.1e}'}" for v in verdicts if not v.ok)


def admit(run: Callable[[], Found], gate: Gate, device: torch.device) -> Row:
    """A contender's state, "timed", "wrong" or "refused", and the reason."""
    try:
        words = gate.faults(run())
    except Exception as error:  # whatever a library raises on what it does not take, such as memory
        if not alive(device):
            raise SystemExit(f"{record.words(error)}; the device no longer answers") from None
        return {"state": "refused", "reason": record.words(error)}
    return {"state": "wrong" if words else "timed", "reason": words}


def ratio(ours: Timing, other: Timing) -> Row:
    """How many times faster `ours` is: median and quartiles over rounds, where both have the same rounds."""
    if len(ours.rounds) != len(other.rounds):
        ours, other = Timing([ours.median], []), Timing([other.median], [])
    found = [b / a for a, b in zip(ours.rounds, other.rounds, strict=True)]
    paired = Timing(found, found)
    return {"median": paired.median, "quartiles": paired.quartiles}


def summaries(timed: Mapping[K, Timing], first: K) -> dict[K, Row]:
    """The times of all, and how many times faster `first` is than each other."""
    return {name: timing.summary() | ({"times_faster": ratio(timed[first], timing)} if first in timed and name != first else {})
            for name, timing in timed.items()}


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses; a guess where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def why(entry: Row) -> str:
    return f"{entry['state']}: {entry['reason']}"[:120]
