"""Seconds to build kernels into an empty cache, and milliseconds to load them from it, in processes of their own."""
from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import tilewise as tw
from tilewise.backends.cpu import compiler
from tilewise.bench.cases import Call, Case, Maker, Options, draw
from tilewise.bench.cpu.figures import BUILD, LOAD, Quantity, figure
from tilewise.bench.cpu.race import CPU
from tilewise.bench.serving.contest import Found, Gate, Row, admit
from tilewise.bench.timing import Timing
from tilewise.bench.tolerance import run

TITLE = "compilation"
PROGRAMS: dict[str, Callable[[Maker], Options]] = {
    "plain": lambda make: {},
    "causal": lambda make: {"causal": True},
    "softcap and alibi": lambda make: {"score_mod": [tw.softcap(20.0), tw.alibi(make.uniform(2))]}}
BARS = {BUILD: 3.0, LOAD: 50.0}


@dataclass(frozen=True)
class Setting:
    """program: a key of PROGRAMS. repeats: empty caches, and loads from one of them."""
    program: str
    kernels: tuple[str, ...] = ("forward", "decode", "backward")
    repeats: int = 3

    def __str__(self) -> str:
        return self.program


def settings(quick: bool = False) -> list[Setting]:
    return [Setting("plain", repeats=1)] if quick else [Setting(program) for program in PROGRAMS]


def measure(setting: Setting) -> Row:
    """Every kernel is held to the tolerance rule once, then built, then loaded."""
    states = {kernel: admit(partial(found, setting.program, kernel), gate_of(setting.program, kernel), CPU)
              for kernel in setting.kernels}
    right = [kernel for kernel, row in states.items() if row["state"] == "timed"]
    built, loaded = [], []
    for _ in range(setting.repeats):
        with tempfile.TemporaryDirectory() as cache:
            built.append(in_new_process(setting.program, right, cache))
            loaded.append(in_new_process(setting.program, right, cache))
    figures = [summary(quantity, kernel, [factor * seconds[kernel] for seconds in rounds])
               for quantity, rounds, factor in ((BUILD, built, 1), (LOAD, loaded, 1000)) for kernel in right]
    return {"contenders": states, "figures": figures}


def summary(quantity: Quantity, kernel: str, values: list[float]) -> Row:
    of = Timing(values, values)
    return figure(quantity, kernel, of.median, of.quartiles, BARS[quantity])


def call(program: str, kernel: str) -> Call:
    """A small problem that the kernel computes; decoding is attention of one query."""
    case = Case(program, options=PROGRAMS[program])
    return draw(replace(case, seqlen_q=1) if kernel == "decode" else case, torch.float32)


def found(program: str, kernel: str) -> Found:
    return run(call(program, kernel), "cpu").tensors


def gate_of(program: str, kernel: str) -> Gate:
    problem = call(program, kernel)
    truth, standard = (run(problem, "reference", dtype).tensors for dtype in (torch.float64, torch.float32))
    return Gate(truth, standard, (problem.q, problem.k, problem.v))


def in_new_process(program: str, kernels: Sequence[str], cache: str) -> dict[str, float]:
    """Seconds by kernel, with a folder as the user's cache. Raises RuntimeError with the last words of a process that fails."""
    code = f"from tilewise.bench.cpu import compiling; compiling.print_seconds({program!r}, {list(kernels)})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"XDG_CACHE_HOME": cache}, capture_output=True,
                          text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or ["it was killed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def print_seconds(program: str, kernels: Sequence[str]) -> None:
    """Seconds that calls wait for each kernel's library the first time, each as if it was this process's first."""
    library, seconds = compiler.library, dict[str, float]()

    def timed(kernel: str, *arguments: Any) -> ctypes.CDLL:
        for known in (library, compiler.sources, compiler.identity):
            known.cache_clear()
        begin = time.perf_counter()
        made = library(kernel, *arguments)
        seconds.setdefault(kernel, time.perf_counter() - begin)
        return made

    compiler.library = timed        # type: ignore[assignment]
    for kernel in kernels:
        problem = call(program, kernel)
        if kernel == "backward":
            run(problem, "cpu")
        else:
            problem.run(problem.differentiable, "cpu")
    print(json.dumps(seconds))
