"""Which tile sizes are fastest on this GPU: candidates for each Triton kernel, checked, timed, and printed as table rows.

    python -m tilewise.bench.tuning --head-dims 128 [--out FILE] [--jobs 12]

A candidate must compile, run, and give what the table's own configuration gives. Processes compile ahead, so that one that
crashes the compiler or the device is only missing.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.backends import Needs
from tilewise.backends.triton import launch
from tilewise.backends.triton.configs import Config
from tilewise.bench import record
from tilewise.bench.contest import FORWARD, Entrant, Outcome, race
from tilewise.bench.record import Row
from tilewise.bench.timing import alive, finish
from tilewise.bench.tolerance import Verdict
from tilewise.bench.workers import part, run_slices
from tilewise.problem import make

OUTPUTS = {"forward": ("OUT", "LSE"), "key_gradients": ("DK", "DV_"), "key_gradients dk": ("DK",),
           "key_gradients dv": ("DV_",), "query_gradients": ("DQ",)}
TOKENS, CHANNELS, LENGTHS = 16384, 2048, (4096, 16384)
SECONDS = 0.8                           # for one kernel at one length, all candidates together

# (BLOCK_M queries, BLOCK_N keys, warps, stages) by kernel and head dim
CANDIDATES: dict[tuple[str, int], tuple[tuple[int, int, int, int], ...]] = {
    ("forward", 64): ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 4, 3),
                      (64, 64, 4, 3), (256, 64, 8, 3)),
    ("forward", 128): ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3),
                       (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 4)),
    ("forward", 256): ((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3),
                       (128, 64, 8, 1)),
    ("key_gradients", 64): ((64, 128, 8, 2), (64, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2),
                            (32, 128, 4, 3), (64, 64, 4, 2)),
    ("key_gradients", 128): ((64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (32, 128, 8, 3), (32, 128, 4, 2),
                             (64, 64, 8, 2), (128, 64, 8, 2), (32, 64, 4, 3)),
    ("key_gradients", 256): ((64, 64, 8, 1), (64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 2), (32, 128, 8, 1),
                             (32, 32, 4, 2)),
    ("query_gradients", 64): ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2),
                              (128, 32, 4, 3), (64, 128, 4, 2)),
    ("query_gradients", 128): ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3), (128, 32, 4, 2),
                               (64, 64, 8, 2), (128, 128, 8, 1), (64, 32, 4, 3)),
    ("query_gradients", 256): ((64, 64, 8, 1), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (128, 32, 8, 1),
                               (128, 64, 8, 1)),
}


class Launch(NamedTuple):
    """One recorded kernel launch; `launch.run` takes it as it is."""
    kernel: Any
    problem: Any
    programs: Callable[[Config], tuple[int, ...]]
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As the table of configurations calls the kernel."""
        return launch.config_name(self.kernel, self.values)

    def results(self) -> list[Tensor]:
        return [self.values[name] for name in OUTPUTS[self.name]]


@contextlib.contextmanager
def configured(config: Config | None) -> Iterator[None]:
    """Every launch inside takes this configuration; None: the table's."""
    table = launch.choose
    if config is not None:
        launch.choose = lambda *_: config
    try:
        yield
    finally:
        launch.choose = table


def candidates(recorded: Launch) -> list[Config]:
    """The table's configuration, then the others to try."""
    shipped = launch.choose(recorded.name, recorded.problem, launch.architecture(recorded.problem.device))
    listed = CANDIDATES.get((recorded.kernel.fn.__name__, recorded.problem.head_dim), ())
    others = [shipped._replace(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages) for m, n, warps, stages in listed]
    return [shipped, *(config for config in others if config != shipped)]


def launches(head_dim: int, seqlen: int, causal: bool, device: torch.device, tokens: int = TOKENS,
             execute: Callable[[Launch], object] | None = None) -> dict[str, Launch]:
    """The launches of one forward and backward pass in bf16, by kernel, each given to `execute` (default: `run_first`)."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (tokens // seqlen, seqlen, CHANNELS // head_dim, head_dim)
    q, k, v, dout = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4))
    problem, operands = make(q, k, v, causal=causal)
    recorded = {}

    def run(*arguments: Any) -> None:
        one = Launch(*arguments)
        recorded[one.name] = one
        (execute or run_first)(one)

    out, lse = launch.forward(problem, operands, run=run)
    launch.backward(problem, operands, out, lse, dout.transpose(1, 2), None, Needs(False, False), run=run)
    return recorded


def run_first(one: Launch) -> Config:
    """Runs a launch in the first candidate configuration that can, and says which."""
    errors = []
    for config in candidates(one):
        try:
            with configured(config):
                launch.run(*one)
            return config
        except Exception as error:  # does not compile or fit: the next one may
            errors.append(record.words(error))
    raise RuntimeError(f"{one.name}: no configuration runs: {errors[0]}")


def try_slice(head_dims: Sequence[int], device: torch.device, text: str) -> None:
    """Compiles and runs one slice of all candidates on a short problem, whatever its memory holds.

    Prints one JSON line each: a list for those that ran, an object for those that did not. (Compilers print as well.)
    """
    found = [(d, causal, one) for d in head_dims for causal in (True, False)
             for name, one in launches(d, 512, causal, device, 512, execute=lambda one: None).items() if name in OUTPUTS]
    every = [(d, causal, one, config) for d, causal, one in found for config in candidates(one)]
    for head_dim, causal, one, config in part(every, text):
        try:
            with configured(config):
                launch.run(*one)
            finish(device)
        except Exception as error:  # not compiled: left out
            print(json.dumps({"kernel": one.name, "head_dim": head_dim, "causal": causal, "config": list(config),
                              "error": record.words(error)}), flush=True)
            if not alive(device):
                return
        else:
            print(json.dumps([one.name, head_dim, causal, list(config)]), flush=True)


def parsed(line: str) -> Any:
    """What `try_slice` printed; None for what compilers did."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def tune(one: Launch, runnable: Sequence[Config], case: str, setting: dict[str, Any], device: torch.device) -> Row:
    """A row whose contenders are the configurations: those that give the first one's results are timed."""
    kept: list[Tensor] = []

    def check(config: Config) -> Sequence[Verdict]:
        for x in one.results():
            x.fill_(torch.nan)
        with configured(config):
            launch.run(*one)
        finish(device)
        kept.extend([] if kept else [x.clone() for x in one.results()])
        return [Verdict("results", max(map(deviation, one.results(), kept)), 1.0)]

    entrants = [Entrant(str(tuple(config)), {FORWARD: _run_in(one, config)}, partial(check, config)) for config in runnable]
    none = Outcome(contenders={}, times_faster={})
    found = race(entrants, device, (FORWARD,), seconds=SECONDS)[FORWARD] if entrants else none
    for x, own in zip(one.results(), kept, strict=False):
        x.copy_(own)        # the kernels that come after this one read them
    return {"part": one.name, "case": f"{one.name} {case}", "setting": setting, **found}


def _run_in(one: Launch, config: Config) -> Callable[[int], object]:
    def run(turn: int) -> None:
        with configured(config):
            launch.run(*one)

    return run


def deviation(x: Tensor, reference: Tensor) -> float:
    """How far x is from reference, 1 being 8 roundings to bf16 of the largest entry; NaN counts as infinite."""
    allowed = 8 * torch.finfo(torch.bfloat16).eps * reference.abs().max().item()
    off = (x.double() - reference.double()).abs().max().item()
    return math.inf if math.isnan(off) else off / max(allowed, 1e-30)


def best(rows: Sequence[Row]) -> Iterator[tuple[str, int, str, list[float], list[Row]]]:
    """For each kernel and head dim the configuration that is fastest on the whole, how many times faster than the table's it is
    in each of the rows, and these; "" where none runs everywhere."""
    for kernel, head_dim in dict.fromkeys((row["part"], row["setting"]["head_dim"]) for row in rows):
        group = [row for row in rows if (row["part"], row["setting"]["head_dim"]) == (kernel, head_dim)]
        seconds = [{name: x["seconds"] for name, x in row["contenders"].items() if name.startswith("(") and "seconds" in x}
                   for row in group]
        common = [name for name in seconds[0] if all(name in of for of in seconds)]
        if not common:
            yield kernel, head_dim, "", [], group
            continue
        name = min(common, key=lambda name: math.prod(of[name] for of in seconds))
        shipped = [next(iter(row["contenders"])) for row in group]
        yield kernel, head_dim, name, [of.get(first, math.nan) / of[name]
                                       for of, first in zip(seconds, shipped, strict=True)], group


def lines(rows: Sequence[Row]) -> list[str]:
    """The best configurations as rows for the table."""
    found = []
    for kernel, head_dim, name, gains, group in best(rows):
        where = ", ".join(f"{row['setting']['mask']} {row['setting']['seqlen'] // 1024}k {gain:.2f}"
                          for row, gain in zip(group, gains, strict=False))
        found.append(f"({kernel!r}, {head_dim}): Config{name},  # {geometric_mean(gains):.2f}x "
                     f"{next(iter(group[0]['contenders']))}: {where}" if name else
                     f"({kernel!r}, {head_dim}): no configuration runs everywhere")
    return found


def geometric_mean(values: Sequence[float]) -> float:
    return math.prod(values) ** (1 / len(values))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.tuning", description="Tile sizes for this GPU.")
    parser.add_argument("--head-dims", type=lambda text: [int(d) for d in text.split(",")], default=[64, 128, 256])
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--seconds", type=float, default=300, help="begin no further measurement after so long")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile ahead")
    parser.add_argument("--slice", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device, deadline = torch.device("cuda"), time.monotonic() + options.seconds
    if options.slice:
        try_slice(options.head_dims, device, options.slice)
        return
    dims = ",".join(map(str, options.head_dims))
    printed = run_slices("tilewise.bench.tuning", ["--head-dims", dims], options.jobs, 0.6 * options.seconds)
    found = [entry for entry in map(parsed, printed) if entry is not None]
    ran = [tuple(entry) for entry in found if isinstance(entry, list)]
    result: dict[str, Any] = {**record.new("tuning", "cuda", False),
                              "not_run": [entry for entry in found if isinstance(entry, dict)]}
    for row in tune_all(options.head_dims, ran, device, deadline):
        result["rows"].append(row)
        result["lines"] = lines(result["rows"])
        record.write(options.out, result)
    record.write(options.out, result | {"complete": time.monotonic() <= deadline})
    print("\n".join(result["lines"]))


def tune_all(head_dims: Sequence[int], ran: Sequence[tuple], device: torch.device, deadline: float) -> Iterator[Row]:
    """A row for each kernel, head dim, mask and length, as `ran` by `try_slice` allows; none begins after the deadline."""
    for head_dim, causal, seqlen in itertools.product(head_dims, (True, False), LENGTHS):
        if time.monotonic() > deadline:
            return
        mask = "causal" if causal else "full"
        setting = {"mode": "kernel", "head_dim": head_dim, "seqlen": seqlen, "mask": mask, "dtype": "bfloat16"}
        for one in launches(head_dim, seqlen, causal, device).values():
            if one.name in OUTPUTS:
                runnable = [config for config in candidates(one) if (one.name, head_dim, causal, list(config)) in ran]
                yield tune(one, runnable, f"D {head_dim} N {seqlen} {mask}", setting, device)


if __name__ == "__main__":
    main()
