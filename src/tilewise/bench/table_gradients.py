"""What the gradient of a table costs that a score function reads."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tilewise.bench.contest import BOTH, Entrant, Outcome, race
from tilewise.bench.peers import NO_GRADIENTS, flex_attend
from tilewise.bench.work import Work, draw

WITHOUT = "without its gradient"
BARS = {(BOTH, WITHOUT): 1 / 1.3}       # the gradient of a captured table costs at most so much


@dataclass(frozen=True)
class Setting:
    """seconds: for one table."""
    seqlen: int = 2048
    heads: int = 4
    head_dim: int = 64
    repeats: int = 5
    seconds: float = 7.0


class Table(NamedTuple):
    """A score function that reads a table."""
    shape: tuple[int, ...]
    score: Callable[[Any], Callable]


def tables(length: int, heads: int) -> dict[str, Table]:
    return {
        "relative position": Table((heads, 2 * length - 1),
                                   lambda t: lambda s, b, h, q, k: s + t[h, q - k + (length - 1)]),
        "pair bias": Table((heads, length, length), lambda t: lambda s, b, h, q, k: s + t[h, q, k]),
        "scalar per head": Table((heads,), lambda t: lambda s, b, h, q, k: s + t[h] * s),
    }


def measure(name: str, setting: Setting, device: torch.device) -> dict[str, Outcome]:
    """Forward and backward with the gradient of a captured table, and without, in turns."""
    inputs, dout = draw(setting.seqlen, setting.heads, setting.head_dim, device)
    shape, score = tables(setting.seqlen, setting.heads)[name]
    fixed = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device)
    table = fixed.clone().requires_grad_()
    entrants = [Work(inputs | {"table": table}, dout, score=score).entrant("tilewise", (BOTH,)),
                Work(inputs | {"table": fixed}, dout, score=score).entrant(WITHOUT, (BOTH,))]
    if device.type == "cuda":
        flex = Work(inputs | {"table": table}, dout, score=score,
                    attend=lambda q, k, v, table: flex_attend(device, score=score(table))(q, k, v))
        entrants.append(flex.entrant("flex", (BOTH,)))
    else:
        entrants.append(Entrant("flex", reason=NO_GRADIENTS))
    return race(entrants, device, (BOTH,), seconds=setting.seconds, least=setting.repeats + 1)
