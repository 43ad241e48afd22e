"""Forward, backward and both of all methods on one setting.

The forward pass keeps what the backward needs; the backward's time is that of both less the forward's, within each round.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tilewise.bench.contest import BOTH, FORWARD, PASSES, Entrant, Outcome, free_bytes, gib, race
from tilewise.bench.paper.inputs import Attend, Inputs, Setting
from tilewise.bench.paper.methods import BLOCK, Method, butterfly, methods
from tilewise.bench.suite import Wanted
from tilewise.bench.timing import Call
from tilewise.bench.tolerance import Verdict

TENSORS = 20            # like q that are alive at once: two sets of inputs in two layouts, out and gradients
TWICE = 2.0             # between 1/2 and 2: of what dropout changes, measured over expected


def measure(setting: Setting, wanted: Wanted, seconds: float) -> dict[str, Outcome]:
    """By pass: states and times of all methods, and how many times faster than each other ours is."""
    return race(entrants(setting, wanted), wanted.device, PASSES, seconds=seconds)


def entrants(setting: Setting, wanted: Wanted, seeds: Sequence[int] = (0, 1)) -> list[Entrant]:
    """All methods on a setting, on as many sets of inputs as there are seeds, each as it wants them in memory."""
    if words := lack(TENSORS * setting.tensor_bytes, wanted.device, "inputs and results"):
        return [Entrant(method.name, state="refused", reason=words) for method in methods(setting, wanted)]
    sets = [Inputs(setting, wanted.device, seed) for seed in seeds]
    relaid = [x.like(relaid=True) for x in sets]
    return [entrant(method, relaid if method.wants_bhsd else sets) for method in methods(setting, wanted)]


def entrant(method: Method, sets: Sequence[Inputs]) -> Entrant:
    """A method on some sets of inputs, if it can and there is room."""
    x = sets[0]
    if words := lack(method.matrices * x.setting.matrix_bytes, x.device, "matrices of scores"):
        return Entrant(method.name, state="refused", reason=words)
    try:
        attends = [method.prepare(one) for one in sets]
    except NotImplementedError as error:
        return Entrant(method.name, reason=str(error))
    calls: dict[str, Call] = {FORWARD: partial(forward, sets, attends), BOTH: partial(both, sets, attends)}
    return Entrant(method.name, calls, partial(check, method, x, attends[0]))


def lack(needed: float, device: torch.device, what: str) -> str:
    """Why there is no room for so many bytes; nothing, if there is."""
    free = free_bytes(device) if needed else 0
    return f"{what} need {gib(needed)}, free {gib(free)}" if needed > free else ""


def forward(sets: Sequence[Inputs], attends: Sequence[Attend], turn: int) -> Tensor:
    i = turn % len(sets)
    return attends[i](*sets[i].leaves)


def both(sets: Sequence[Inputs], attends: Sequence[Attend], turn: int) -> tuple[Tensor, ...]:
    x = sets[turn % len(sets)]
    return torch.autograd.grad(forward(sets, attends, turn), x.leaves, x.dout)


def check(method: Method, x: Inputs, attend: Attend) -> list[Verdict]:
    """Random bits of others cannot be foreseen: held to the rule without dropout, then to what dropout changes on average."""
    if method.own_dropout and x.setting.dropout:
        plain = x.like(replace(x.setting, dropout=0.0))
        return [*plain.expected().verdicts(plain.sampled(method.prepare(plain))), change(x, x.sampled(attend)["out"])]
    if not method.sparse:
        return x.expected().verdicts(x.sampled(attend))
    layout, cols = butterfly(x.setting.seqlen).to(x.device), torch.arange(x.setting.seqlen, device=x.device)
    return x.expected(layout[x.rows[:, None] // BLOCK, cols // BLOCK]).verdicts(x.sampled(attend))


def change(x: Inputs, out: Tensor) -> Verdict:
    """What dropout changes, squared, over its expectation: sum_j (P_ij v_jd)^2 p / (1 - p) for row i and column d of out."""
    q, k, v = (y[-1, :, -1].detach().double() for y in x.leaves)
    s = torch.where(x.visible(), (q[x.rows] @ k.mT) * x.setting.head_dim ** -0.5, -torch.inf)
    probabilities, p = torch.softmax(s, -1), x.setting.dropout
    expected = p / (1 - p) * (probabilities.square() @ v.square())
    found = ((out.double() - probabilities @ v).square().sum() / expected.sum()).item()
    ratio = max(found, 1 / max(found, 1e-9))
    return Verdict("dropout", ratio, TWICE, "" if ratio <= TWICE else f"it changes out by {found:.2f} times its variance")
