"""Self-attention, forward and backward, beside every other implementation that this machine has.

The forward pass keeps what the backward needs; backward is the difference of both together and the forward alone. Two sets of
inputs take turns, and everyone finds them as it wants them in memory.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from tilewise import backends, costs, devices
from tilewise.bench.contest import BACKWARD, BOTH, FORWARD, PASSES, Entrant, Outcome, free_bytes, gib, race
from tilewise.bench.gate import Gate
from tilewise.bench.peers import Attend, Contender, discover, ours
from tilewise.bench.shapes import WORK, Inputs, Shape, laid_bhsd, of_the_paper
from tilewise.bench.suite import Bars, Trial, Wanted
from tilewise.problem import fp32_products, make

SECONDS = {"cuda": 2.0, "cpu": 8.0}     # for one shape, all contenders together
SLOW_TO_COMPILE = "left out of quick runs: on a CPU it compiles for half a minute"


def trials(wanted: Wanted) -> list[Trial]:
    seconds = SECONDS[wanted.device.type] / (4 if wanted.quick else 1)
    return [trial(shape, wanted, seconds=seconds)
            for shape in of_the_paper(wanted.device, wanted.quick, wanted.head_dims, wanted.lengths)]


def trial(shape: Shape, wanted: Wanted, *, part: str = "attention", modes: tuple[str, ...] = PASSES, seconds: float,
          only: Sequence[str] | None = None, beside: Callable[[], Sequence[Entrant]] = list, bars: Bars | None = None) -> Trial:
    """only: those that take part beside ours. beside: yardsticks."""
    def run() -> dict[str, Outcome]:
        field = [c for c in contenders(shape, wanted) if only is None or c.name in ("tilewise", *only)]
        return measure(shape, field, wanted.device, modes=modes, seconds=seconds, beside=beside())

    case = str(shape) if part == "attention" else f"{shape}, {part}"
    return Trial(part, case, asdict(shape) | {"mask": shape.mask}, modes, run, bars or {})


def contenders(shape: Shape, wanted: Wanted) -> list[Contender]:
    """Ours, on the backend that backend="auto" takes; the other backends that volunteer or are asked for; then the peers."""
    q, k, v, _ = Shape(1, 16, shape.heads, shape.kv_heads, shape.head_dim, shape.causal, shape.dtype).draw(wanted.device, 0)
    problem, _ = make(q, k, v, causal=shape.causal)
    serving, *more = [name for name in backends.AUTO if backends.load(name).volunteers(problem) is None]
    more = [name for name in more if name != "tiled"]
    more += [name for name in wanted.also if name not in (serving, *more) and backends.load(name).supports(problem) is None]
    peers = discover(wanted.device)
    if wanted.quick and wanted.device.type == "cpu":
        peers = [Contender("flex", None, SLOW_TO_COMPILE) if peer.name == "flex" else peer for peer in peers]
    return [ours(serving)._replace(name="tilewise"), *(ours(name)._replace(name=f"tilewise {name}") for name in more), *peers]


def measure(shape: Shape, field: Sequence[Contender], device: torch.device, *, modes: Sequence[str] = PASSES, seconds: float,
            beside: Sequence[Entrant] = ()) -> dict[str, Outcome]:
    """The rows of one shape. With the forward mode alone, it keeps nothing for a backward."""
    sets = [shape.draw(device, seed) for seed in (0, 1)]
    relaid: list[Inputs] = []
    gate, alone, entrants = Gate(*sets[0], shape.causal), tuple(modes) == (FORWARD,), []
    for contender in field:
        if contender.wants_bhsd and not relaid:
            relaid = [inputs_laid_bhsd(inputs) for inputs in sets]
        entrants.append(entrant(contender, shape, relaid if contender.wants_bhsd else sets, gate, alone, device))
    return race([*entrants, *beside], device, modes, seconds=seconds, rates=partial(rates, shape, device))


def rates(shape: Shape, device: torch.device, mode: str, seconds: float) -> dict[str, float]:
    """What a time on a shape amounts to: FLOPs per second, and the share of what the device can do at most, if it is known."""
    found, at_most = {"tflops": WORK[mode] * shape.flops() / seconds / 1e12}, devices.serving(device)
    width = devices.width_of(getattr(torch, shape.dtype), fp32_products())
    if at_most is not None and width in at_most.products:
        passes = (mode != BACKWARD) + (mode != FORWARD)
        exponentials, sizes = passes * shape.flops() / (4 * shape.head_dim), shape.sizes()
        moved = (mode != BACKWARD) * costs.least_forward(sizes) + (mode != FORWARD) * costs.least_backward(sizes)
        found["share"] = max(at_most.seconds(width, WORK[mode] * shape.flops(), exponentials, 0, moved).values()) / seconds
    return found


def entrant(contender: Contender, shape: Shape, sets: Sequence[Inputs], gate: Gate, alone: bool,
            device: torch.device) -> Entrant:
    """A contender on a shape's inputs. alone: the forward pass without gradients."""
    attend, free = contender.attend, free_bytes(device) // 2 if contender.dense else 0
    if attend is None:
        return Entrant(contender.name, reason=contender.reason)
    if contender.dense and shape.matrix_bytes > free:
        return Entrant(contender.name, state="refused", reason=f"needs about {gib(shape.matrix_bytes)}, more than {gib(free)}")

    def forward(turn: int) -> Tensor:
        q, k, v, _ = sets[turn % len(sets)]
        return attend(q, k, v, shape.causal)

    def both(turn: int) -> tuple[Tensor, ...]:
        q, k, v, dout = sets[turn % len(sets)]
        return torch.autograd.grad(attend(q, k, v, shape.causal), (q, k, v), dout)

    gradients = not alone and not contender.no_gradients
    check = partial(gate.verdicts, given_bhsd(attend) if contender.wants_bhsd else attend, gradients)
    if alone:
        return Entrant(contender.name, {FORWARD: torch.no_grad()(forward)}, check)
    if contender.no_gradients:
        return Entrant(contender.name, {FORWARD: forward}, check, "refused", contender.no_gradients)
    return Entrant(contender.name, {FORWARD: forward, BOTH: both}, check)


def given_bhsd(attend: Attend) -> Attend:
    """The same function, which is given its inputs as it wants them."""
    return lambda q, k, v, causal: attend(laid_bhsd(q), laid_bhsd(k), laid_bhsd(v), causal)


def inputs_laid_bhsd(inputs: Inputs) -> Inputs:
    q, k, v, dout = (laid_bhsd(x.detach()) for x in inputs)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def compilations(wanted: Wanted) -> list[Callable[[], object]]:
    """Calls that make the compilers' caches hold what `trials` needs."""
    def compile_for(shape: Shape, attend: Attend) -> None:
        torch.compiler.reset()
        q, k, v, dout = shape.draw(wanted.device, 0)
        torch.autograd.grad(attend(q, k, v, shape.causal), (q, k, v), dout)

    return [partial(compile_for, shape, c.attend)
            for shape in of_the_paper(wanted.device, wanted.quick, wanted.head_dims, wanted.lengths)
            for c in contenders(shape, wanted) if c.compiles and c.attend is not None]
