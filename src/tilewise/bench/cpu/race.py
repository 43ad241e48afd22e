"""Contenders of one measurement: held to the tolerance rule on the inputs that are timed, then timed in turns."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.bench.masks import Work, sample
from tilewise.bench.serving.contest import Found, Gate, Row, admit
from tilewise.bench.timing import Call, Timing, compare

CPU = torch.device("cpu")
PASSES = {"forward": "forward", "both": "fwd+bwd"}      # methods of Work that are timed
LEAST = 5               # rounds


class Entrant(NamedTuple):
    """call: what is timed; check: of one such call, what the gate looks at."""
    call: Call
    check: Callable[[], Found]
    gate: Gate


@dataclass(frozen=True, kw_only=True)
class Rival(Work):
    """The same work done by another function: attend(q, k, v), all [1, N, H, D]."""
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, turn: int = 0) -> Tensor:
        return self.attend(*(self.tensors[name] for name in "qkv"))


def entrant(work: Work, mode: str) -> Entrant:
    """A pass of `PASSES` over a work, checked for a sample of its queries. A forward pass keeps nothing for a backward."""
    rows = sample(work.tensors["q"])
    truth, standard = (work.standard(rows, dtype) for dtype in (torch.float64, work.dout.dtype))
    gate = Gate(truth, standard, (work.tensors["q"][:, rows], work.tensors["k"], work.tensors["v"]))
    if mode == "both":
        return Entrant(work.both, partial(work.sampled, rows), gate)
    forward = torch.no_grad()(work.forward)
    return Entrant(forward, lambda: {"out": forward()[:, rows]}, gate)


def race(field: Mapping[str, Entrant], beside: Mapping[str, Call], seconds: float) -> tuple[dict[str, Row], dict[str, Timing]]:
    """The state of all, and the times in turns of those that are right and of what else is timed beside them."""
    rows = {name: admit(one.check, one.gate, CPU) for name, one in field.items()}
    calls = {name: one.call for name, one in field.items() if rows[name]["state"] == "timed"}
    timed = compare({**calls, **beside}, CPU, seconds=seconds, least=LEAST)
    for name, timing in timed.items():
        rows.setdefault(name, {"state": "timed", "reason": ""}).update(timing.summary())
    return rows, timed
