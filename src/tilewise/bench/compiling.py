"""Seconds to build the `cpu` backend's kernels into an empty cache, and to load them from it, in processes of their own."""
from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

import tilewise as tw
from tilewise.backends.cpu import compiler
from tilewise.bench.cases import Call, Case, Maker, Options, draw
from tilewise.bench.contest import Entrant, Outcome, admit, outcome
from tilewise.bench.suite import Trial
from tilewise.bench.timing import Timing
from tilewise.bench.tolerance import check, run
from tilewise.bench.workers import apart

BUILD, LOAD = "build", "load"
BARS = {(BUILD, "tilewise"): 3.0, (LOAD, "tilewise"): 0.05}     # seconds
KERNELS = "forward", "decode", "backward"
PROGRAMS: dict[str, Callable[[Maker], Options]] = {
    "plain": lambda make: {},
    "causal": lambda make: {"causal": True},
    "softcap and alibi": lambda make: {"score_mod": [tw.softcap(20.0), tw.alibi(make.uniform(2))]}}


def trials(repeats: int, programs: Sequence[str] = tuple(PROGRAMS), kernels: Sequence[str] = KERNELS) -> list[Trial]:
    facts = {"dtype": "float32"}
    return [Trial("compiling", f"{program}, {kernel}", facts | {"program": program, "kernel": kernel}, (BUILD, LOAD),
                  partial(measure, program, kernel, repeats), BARS) for program, kernel in product(programs, kernels)]


def measure(program: str, kernel: str, repeats: int) -> dict[str, Outcome]:
    """The kernel is held to the tolerance rule once, then built into so many empty caches, and loaded from each."""
    state = admit(Entrant("tilewise", {BUILD: print}, lambda: check(call(program, kernel), "cpu")), torch.device("cpu"))
    if state["state"] != "timed":
        return dict.fromkeys((BUILD, LOAD), Outcome(contenders={"tilewise": state}, times_faster={}))
    seconds: dict[str, list[float]] = {BUILD: [], LOAD: []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for of_mode in seconds.values():
                of_mode.append(apart("compiling", "seconds_to_have", program, kernel, environment={"XDG_CACHE_HOME": cache}))
    return {mode: outcome({"tilewise": Timing(of, of)}) for mode, of in seconds.items()}


def call(program: str, kernel: str) -> Call:
    """A small problem that the kernel computes; decoding is attention of one query."""
    case = Case(program, options=PROGRAMS[program])
    return draw(replace(case, seqlen_q=1) if kernel == "decode" else case, torch.float32)


def seconds_to_have(program: str, kernel: str) -> float:
    """That a call waits for the kernel's library the first time in this process."""
    library, seconds = compiler.library, dict[str, float]()

    def timed(name: str, *arguments: Any) -> ctypes.CDLL:
        for known in (library, compiler.sources, compiler.identity):
            known.cache_clear()
        begin = time.perf_counter()
        made = library(name, *arguments)
        seconds.setdefault(name, time.perf_counter() - begin)
        return made

    compiler.library = timed        # type: ignore[assignment]
    problem = call(program, kernel)
    if kernel == "backward":
        run(problem, "cpu")
    else:
        problem.run(problem.differentiable, "cpu")
    return seconds[kernel]
