"""Forward, backward and both of all methods on one setting.

The forward pass keeps what the backward needs; the backward's time is that of both less the forward's, within each round.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tilewise.bench.paper.inputs import Inputs, Setting
from tilewise.bench.paper.methods import BLOCK, Attend, Method, butterfly
from tilewise.bench.paper.race import BACKWARD, BOTH, FORWARD, PASSES, Entrant, Row, race, short_of
from tilewise.bench.tolerance import Verdict

WORK = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}     # in forward passes
TENSORS = 14            # like q that are alive at once: two sets of inputs, out and gradients, and someone's copies
TWICE = 2.0             # between 1/2 and 2: of what dropout changes, measured over expected


def measure(setting: Setting, methods: Sequence[Method], device: torch.device) -> dict[str, Row]:
    """By pass: contenders, and how many times faster than others the first method is."""
    words = short_of(TENSORS * setting.tensor_bytes, device, "q, k, v, out and gradients")
    if device.type == "cuda":
        torch.compiler.reset()      # settings are compiled apart, and torch.compile gives up after a few
    sets = [] if words else [Inputs(setting, device, seed) for seed in (0, 1)]
    field = [Entrant(method.name, state="refused", reason=words) if words else entrant(method, sets) for method in methods]
    found = race(field, device, PASSES, seconds=setting.seconds)
    for mode, row in found.items():
        for method in methods:
            entry = row["contenders"][method.name]
            if method.sparse:       # a share of the work, which the papers' formula does not know
                entry["density"] = butterfly(setting.seqlen).float().mean().item()
            elif "seconds" in entry:
                entry["tflops"] = WORK[mode] * setting.flops() / entry["seconds"] / 1e12
    return found


def entrant(method: Method, sets: Sequence[Inputs]) -> Entrant:
    """A method on some sets of inputs, if it can and there is room."""
    x = sets[0]
    if words := short_of(method.matrices * x.setting.matrix_bytes, x.device, "matrices of scores"):
        return Entrant(method.name, state="refused", reason=words)
    try:
        attends = [method.prepare(one) for one in sets]
    except NotImplementedError as error:
        return Entrant(method.name, reason=str(error))
    calls = {FORWARD: partial(forward, sets, attends), BOTH: partial(both, sets, attends)}
    return Entrant(method.name, calls, partial(check, method, x, attends[0]))


def forward(sets: Sequence[Inputs], attends: Sequence[Attend], turn: int) -> Tensor:
    i = turn % len(sets)
    return attends[i](*sets[i].leaves)


def both(sets: Sequence[Inputs], attends: Sequence[Attend], turn: int) -> tuple[Tensor, ...]:
    x = sets[turn % len(sets)]
    return torch.autograd.grad(forward(sets, attends, turn), x.leaves, x.dout)


def check(method: Method, x: Inputs, attend: Attend) -> list[Verdict]:
    """Random bits of others cannot be foreseen: held to the rule without dropout, then to what dropout changes on average."""
    if method.own_dropout and x.setting.dropout:
        plain = x.without_dropout()
        return [*plain.verdicts(plain.sampled(method.prepare(plain))), change(x, x.sampled(attend)["out"])]
    if not method.sparse:
        return x.verdicts(x.sampled(attend))
    layout, cols = butterfly(x.setting.seqlen).to(x.device), torch.arange(x.setting.seqlen, device=x.device)
    return x.verdicts(x.sampled(attend), layout[x.rows[:, None] // BLOCK, cols // BLOCK])


def change(x: Inputs, out: Tensor) -> Verdict:
    """What dropout changes, squared, over its expectation: sum_j (P_ij v_jd)^2 p / (1 - p) for row i and column d of out."""
    q, k, v = (y[-1, :, -1].detach().double() for y in x.leaves)
    s = torch.where(x.visible(), (q[x.rows] @ k.mT) * x.setting.head_dim ** -0.5, -torch.inf)
    probabilities, p = torch.softmax(s, -1), x.setting.dropout
    expected = p / (1 - p) * (probabilities.square() @ v.square())
    found = ((out.double() - probabilities @ v).square().sum() / expected.sum()).item()
    ratio = max(found, 1 / found) if found else float("inf")
    return Verdict("dropout", ratio, TWICE, "" if ratio <= TWICE else f"changes out by {found:.2f} times what it should, squared")
