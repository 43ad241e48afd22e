"""Which variants of the Hopper kernels are fastest on this GPU, beside cuDNN, FlashAttention-2 and FlexAttention.

    python -m tilewise.bench.hopper.tuning --head-dims 128 [--out FILE] [--seconds 120]

A variant must give what the table's own gives; peers are judged by `tilewise.bench attention`. The last lines
printed are rows for `backends/hopper/configs.tsv`.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.backends import Needs
from tilewise.backends.hopper import configs, launch
from tilewise.backends.hopper.configs import Config
from tilewise.bench import record
from tilewise.bench.attention import inputs_laid_bhsd, rates
from tilewise.bench.contest import BACKWARD, FORWARD, Entrant, race
from tilewise.bench.peers import Attend, discover
from tilewise.bench.record import Row
from tilewise.bench.shapes import Inputs, Shape
from tilewise.bench.timing import finish
from tilewise.bench.tolerance import Verdict
from tilewise.bench.tuning import CHANNELS, LENGTHS, TOKENS, best, deviation
from tilewise.fp8 import FP8
from tilewise.problem import Operands, Problem, make

Run = Callable[[int], Sequence[Tensor]]        # given the round's number
SECONDS = 1.5                           # for one kernel at one length, all variants and peers together
PEERS = ("sdpa cudnn", "sdpa flash", "flex")
CONSUMERS = {2: (240, 24), 3: (160, 32)}        # registers of a consumer's thread and of the producer's, by warpgroups


FORWARD_TILES = {                               # by the wider of D and D_v
    64: ((128, 128), (128, 64), (192, 128), (192, 64)), 128: ((128, 128), (128, 64), (192, 64)),
    192: ((128, 128), (128, 64)), 256: ((128, 64), (128, 32))}
FORWARDS = "forward", "forward fp8"


def candidates(kernel: str, head_dim: int) -> list[Config]:
    """The table's variant of the forward, or of a pass of the backward, then the others to try, for D = D_v. Those of the
    forward all wait early: without that nothing overlaps in the machine code."""
    shipped = configs.table()[kernel, head_dim, head_dim, "plain"]
    if kernel in FORWARDS:
        others = [Config(m, n, stages, ping, 1, *CONSUMERS[m // 64], persistent) for (m, n), stages, ping, persistent in
                  itertools.product(FORWARD_TILES[head_dim], (2, 3), (1, 0), (1, 0))]
    elif kernel == "dq":
        others = [shipped._replace(BLOCK_N=n, STAGES=stages, EARLY_WAIT=early)
                  for n, stages, early in itertools.product((shipped.BLOCK_N, 2 * shipped.BLOCK_N), (2, 3), (1, 0))]
    else:
        others = [shipped._replace(BLOCK_M=m, STAGES=stages, EARLY_WAIT=early)
                  for m, stages, early in itertools.product((shipped.BLOCK_M, 2 * shipped.BLOCK_M), (2, 3), (1, 0))]
    return [shipped, *(config for config in others if config != shipped)]


@contextlib.contextmanager
def configured(kernel: str, config: Config) -> Iterator[None]:
    """Launches of `kernel` take this variant."""
    table = launch.choose

    def chosen(name: str, problem: Any) -> Config:
        return config if name == kernel else table(name, problem)

    launch.choose = chosen      # type: ignore[assignment]
    try:
        yield
    finally:
        launch.choose = table


class Drawn(NamedTuple):
    """One of the sets of inputs that take turns, with the outputs that backward passes begin from, ours and of peers.

    laid: the inputs as peers want them, each head's rows in one piece of memory.
    """
    dout: Tensor
    laid: Inputs
    problem: Problem
    x: Operands
    of_fp8: tuple[Problem, Operands]
    out: Tensor
    lse: Tensor
    outs: dict[str, Tensor]

    @property
    def repeatable(self) -> Problem:
        return replace(self.problem, settings=self.problem.settings._replace(deterministic=True))


def drawn(shape: Shape, device: torch.device, seed: int, peers: Mapping[str, Attend]) -> Drawn:
    q, k, v, dout = shape.draw(device, seed)
    laid = inputs_laid_bhsd((q, k, v, dout))
    problem, x = make(*(t.detach() for t in (q, k, v)), causal=shape.causal)
    of_fp8 = make(*(t.detach().to(FP8) for t in (q, k, v)), causal=shape.causal)
    outs = {name: attend(*laid[:3], shape.causal) for name, attend in peers.items()}
    return Drawn(dout, laid, problem, x, of_fp8, *launch.forward(problem, x), outs)


def measure(shape: Shape, device: torch.device) -> Iterator[Row]:
    """A row for the forward kernel, one for that of fp8 inputs, beside peers in the shape's dtype, one for each pass of the
    backward, with dQ added in any order, then repeatable: the time of all of the forward or backward, by variant of this kernel
    and by peer."""
    peers = {c.name: c.attend for c in discover(device) if c.name in PEERS and c.attend is not None}
    sets = [drawn(shape, device, seed, peers) for seed in (0, 1)]

    def in_turns(run: Callable[[Drawn], Sequence[Tensor]]) -> Run:
        return lambda turn: run(sets[turn % len(sets)])

    def backward(s: Drawn, asked: Problem) -> Sequence[Tensor]:
        return launch.backward(asked, s.x, s.out, s.lse, s.dout.transpose(1, 2), None, Needs(False, False))[:3]

    def of_peer(name: str, mode: str) -> Run:
        if mode == FORWARD:
            return in_turns(lambda s: [peers[name](*s.laid[:3], shape.causal)])
        return in_turns(lambda s: torch.autograd.grad(s.outs[name], s.laid[:3], s.laid[3], retain_graph=True))

    runs = {"forward": in_turns(lambda s: launch.forward(s.problem, s.x)),
            "forward fp8": in_turns(lambda s: launch.forward(*s.of_fp8))}
    runs |= dict.fromkeys(configs.passes(sets[0].problem), in_turns(lambda s: backward(s, s.problem)))
    runs |= dict.fromkeys(configs.passes(sets[0].repeatable), in_turns(lambda s: backward(s, s.repeatable)))
    for kernel, run in runs.items():
        mode = FORWARD if kernel in FORWARDS else BACKWARD
        if (kernel, shape.head_dim, shape.head_dim, "plain") in configs.table():
            entrants = [*variants(kernel, shape.head_dim, mode, run, device),
                        *(Entrant(name, {mode: of_peer(name, mode)}, list) for name in peers)]
            found = race(entrants, device, (mode,), seconds=SECONDS, rates=partial(rates, shape, device))
            setting = asdict(shape) | {"mask": shape.mask, "mode": mode}
            yield {"part": kernel, "case": f"{kernel} {shape}", "setting": setting, **found[mode]}


def variants(kernel: str, head_dim: int, mode: str, run: Run, device: torch.device) -> list[Entrant]:
    """The table's variant first; the others must give its results."""
    reference: list[Tensor] = []

    def check(config: Config) -> Sequence[Verdict]:
        with configured(kernel, config):
            found = [t.clone() for t in run(0)]
        finish(device)
        reference.extend([] if reference else found)
        return [Verdict("results", max(map(deviation, found, reference)), 1.0)]

    return [Entrant(str(tuple(config)), {mode: in_variant(kernel, config, run)}, partial(check, config))
            for config in candidates(kernel, head_dim)]


def in_variant(kernel: str, config: Config, run: Run) -> Callable[[int], object]:
    def call(turn: int) -> None:
        with configured(kernel, config):
            run(turn)

    return call


def lines(rows: Sequence[Row]) -> list[str]:
    """For each shape the best variant beside the peers; then the table's rows that are best on the whole."""
    found = []
    for row in rows:
        rates = {name: x["tflops"] for name, x in row["contenders"].items() if "tflops" in x}
        ours = {name: rate for name, rate in rates.items() if name.startswith("(")}
        if ours:
            name, shipped = max(ours, key=lambda name: ours[name]), next(iter(row["contenders"]))
            peers = ", ".join(f"{peer} {rates[peer]:.0f}" for peer in PEERS if peer in rates)
            found.append(f"{row['case']}: {ours[name]:.0f} TFLOP/s by {name}, the table's {ours.get(shipped, math.nan):.0f}; "
                         f"{peers}")
    return found + ["\t".join([kernel, str(head_dim), str(head_dim), "plain", *name.strip("()").split(", ")])
                    for kernel, head_dim, name, _, _ in best(rows) if name]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.hopper.tuning", description=__doc__.split("\n")[0])
    parser.add_argument("--head-dims", type=lambda text: [int(d) for d in text.split(",")], default=[64, 128, 256])
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--seconds", type=float, default=300, help="begin no further shape after so long")
    options = parser.parse_args(arguments)
    device, deadline = torch.device("cuda"), time.monotonic() + options.seconds
    result = record.new("hopper tuning", "cuda", False)
    for head_dim, seqlen, causal in itertools.product(options.head_dims, LENGTHS, (True, False)):
        if time.monotonic() > deadline:
            break
        heads = CHANNELS // head_dim
        shape = Shape(TOKENS // seqlen, seqlen, heads, heads, head_dim, causal, "bfloat16")
        for row in measure(shape, device):
            result["rows"].append(row)
            result["lines"] = lines(result["rows"])
            record.write(options.out, result)
    record.write(options.out, {**result, "complete": time.monotonic() <= deadline})
    print("\n".join(result["lines"]))


if __name__ == "__main__":
    main()
