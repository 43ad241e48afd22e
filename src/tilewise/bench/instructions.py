"""Instructions of calls and of CPU kernels, counted: exact where time is noise.

A call's count is that of 2 n calls less that of n, divided by n, so that what comes before cancels; a second count of n tells
the spread. Counted by `perf stat` where the processor lends its counters, otherwise by valgrind's callgrind, which knows no
AVX-512: kernels are then compiled without, and PyTorch takes its own code for such a processor. One thread, hashes and garbage
collection fixed.
"""
from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tilewise.backends import Needs, load
from tilewise.bench import overhead
from tilewise.bench.contest import Outcome
from tilewise.bench.record import Row
from tilewise.bench.suite import Trial, Wanted
from tilewise.problem import Operands, Problem, make

OURS, THEIRS = overhead.OURS, overhead.THEIRS
CALLS = 10                              # n, of tiny calls; of kernels 1
WARM = 20
DIM = 64                                # of kernels
LIMIT = 1500                            # seconds that all may take
MODULE = "tilewise.bench.instructions"
Counted = dict[str, tuple[int, int]]    # of each job: instructions of a call, spread
MARKS = """#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void mark(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
void end(void) { CALLGRIND_STOP_INSTRUMENTATION; }
"""


class Job(NamedTuple):
    """What is counted: one call of `run`. elements: scores of a kernel, 0 for a call from Python."""
    part: str
    case: str
    contender: str
    run: Callable[[], Any]
    setting: dict[str, Any]
    elements: int = 0
    recorded: bool = False

    @property
    def name(self) -> str:
        return f"{self.part}, {self.case}, {self.contender}"

    @property
    def times(self) -> int:
        return 1 if self.elements else CALLS


def jobs(quick: bool) -> list[Job]:
    found = []
    for case in overhead.cases()[:1 if quick else None]:
        for contender, run in ((OURS, case.ours), (THEIRS, case.theirs)):
            found.append(Job("call", case.name, contender, run, case.setting, recorded=case.recorded))
    found += [Job("stage", name, OURS, run, dict(mode="forward")) for name, run in overhead.stages().items()]
    return found + kernels()


def kernels() -> list[Job]:
    """CPU kernels alone: many queries, their backward, and one query of a decoding step."""
    torch.manual_seed(0)
    found = []
    for case, rows, keys, heads in (("forward", 128, 128, 1), ("backward", 128, 128, 1), ("decode", 1, 1024, 2)):
        q, k = torch.randn(1, rows, heads, DIM), torch.randn(1, keys, heads, DIM)
        problem, x = make(q, k, k)
        run = backward_of(problem, x) if case == "backward" else forward_of(problem, x)
        setting = dict(mode=case, batch=1, seqlen_q=rows, seqlen_k=keys, heads=heads, head_dim=DIM, dtype="float32")
        found.append(Job("kernel", case, OURS, run, setting, heads * rows * keys))
    return found


def forward_of(problem: Problem, x: Operands) -> Callable[[], Any]:
    out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
    run = load("cpu").prepared(problem, x, out)
    return lambda: run(x, out=out, lse=lse)


def backward_of(problem: Problem, x: Operands) -> Callable[[], Any]:
    out, lse = load("cpu").forward(problem, x)
    dout = torch.randn_like(out)
    return lambda: load("cpu").backward(problem, x, out, lse, dout, None, Needs(False, False))


# ---- in the process that is counted -----------------------------------------------------------------------------------

def work(names: list[str], times: int | None, marks: str | None) -> None:
    """Runs jobs: `times` calls of one, or of all of them n, n and 2 n calls between marks."""
    torch.set_num_threads(1)
    every = {job.name: job for job in jobs(quick=False)}
    chosen = [every[name] for name in names]
    for job in chosen:
        with torch.set_grad_enabled(job.recorded):
            for _ in range(2 if job.elements else WARM):
                job.run()
    gc.collect()
    gc.disable()
    if times is not None:
        with torch.set_grad_enabled(chosen[0].recorded):
            for _ in range(times):
                chosen[0].run()
        return
    assert marks is not None
    library = ctypes.CDLL(marks)
    for job in chosen:
        with torch.set_grad_enabled(job.recorded):
            library.begin()
            job.run()
            library.mark(b"begun")
            for count in (job.times, job.times, 2 * job.times):
                for _ in range(count):
                    job.run()
                library.mark(job.name.encode())
            library.end()


# ---- the counters -----------------------------------------------------------------------------------------------------

def counter() -> Callable[[list[Job]], Counted]:
    """Counts with what is here. Raises RuntimeError that says what is missing."""
    perf = shutil.which("perf")
    if perf is not None:
        tried = subprocess.run([perf, "stat", "-x,", "-e", "instructions:u", "true"], capture_output=True, text=True)
        if tried.returncode == 0 and re.match(r"\d+,", tried.stderr):
            return by_perf
    if shutil.which("valgrind") is None or shutil.which("cc") is None:
        raise RuntimeError("instructions: expected perf with permission to count (kernel.perf_event_paranoid <= 2, and a "
                           "processor that shows its counters), or valgrind and a C compiler (cc); found neither")
    return by_callgrind


def environment() -> dict[str, str]:
    return os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONHASHSEED="0",
                             PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))


def by_perf(counted: list[Job]) -> Counted:
    """A process for each number of calls."""
    def process(job: Job, times: int) -> int:
        command = [sys.executable, "-m", MODULE, "--work", job.name, "--times", str(times)]
        done = subprocess.run(["perf", "stat", "-x,", "-e", "instructions:u", *command], capture_output=True, text=True,
                              env=environment(), timeout=LIMIT)
        found = re.search(r"^(\d+),", done.stderr, re.M)
        if done.returncode or found is None:
            raise RuntimeError(f"perf: {job.name}: {done.stderr[-500:]}")
        return int(found[1])

    result = {}
    for job in counted:
        many = 100 * job.times          # start-up differs a little from one process to the next
        first, again, more = process(job, many), process(job, many), process(job, 2 * many)
        result[job.name] = (more - again) // many, abs(again - first) // many
    return result


def by_callgrind(counted: list[Job]) -> Counted:
    """One process for all, its instructions written out at marks."""
    with tempfile.TemporaryDirectory() as directory:
        marks, out = Path(directory) / "marks.so", Path(directory) / "out"
        built = subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(marks)], input=MARKS, capture_output=True,
                               text=True)
        if built.returncode:
            raise RuntimeError(f"instructions: cc could not compile what uses valgrind/callgrind.h:\n{built.stderr[-1000:]}")
        names = [argument for job in counted for argument in ("--work", job.name)]
        compiler = os.environ.get("CXX", "c++") + " -mno-avx512f -mprefer-vector-width=256"
        command = [sys.executable, "-m", MODULE, *names, "--marks", str(marks)]
        done = subprocess.run(["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", *command],
                              capture_output=True, text=True, env=environment() | dict(CXX=compiler), timeout=LIMIT)
        if done.returncode:
            raise RuntimeError(f"valgrind: {done.stdout[-500:]}{done.stderr[-1500:]}")
        found: dict[str, list[int]] = {}
        for path in sorted(Path(directory).glob("out.*"), key=lambda path: int(path.suffix[1:])):
            text = path.read_text()
            name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M)
            total = re.search(r"^totals: (\d+)", text, re.M)
            if name and total:
                found.setdefault(name[1], []).append(int(total[1]))
    result = {}
    for job in counted:
        first, again, more = found[job.name]
        result[job.name] = (more - again) // job.times, abs(again - first) // job.times
    return result


# ---- the result -------------------------------------------------------------------------------------------------------

def trials(wanted: Wanted) -> list[Trial]:
    """A row for each kernel, call and stage; all are counted together, when the first is asked for."""
    rows: dict[tuple[str, str], list[Job]] = {}
    for job in jobs(wanted.quick):
        rows.setdefault((job.part, job.case), []).append(job)
    numbers = functools.cache(lambda: counter()([job for group in rows.values() for job in group]))
    return [trial(group, numbers) for group in rows.values()]


def trial(group: list[Job], numbers: Callable[[], Counted]) -> Trial:
    job, mode = group[0], group[0].setting["mode"]

    def measure() -> dict[str, Outcome]:
        counts = {one.contender: numbers()[one.name] for one in group}
        contenders: Any = {name: {"state": "timed", "reason": "", "count": total, "spread": spread}
                           for name, (total, spread) in counts.items()}
        ratios = {name: total / counts[OURS][0] for name, (total, _) in counts.items() if name != OURS}
        faster: Any = {name: {"median": ratio, "quartiles": [ratio, ratio]} for name, ratio in ratios.items()}
        return {mode: Outcome(contenders=contenders, times_faster=faster)}

    setting = job.setting | ({"elements": job.elements} if job.elements else {})
    bars = {(mode, THEIRS): 1 / overhead.BAR} if len(group) > 1 else {}
    return Trial(job.part, f"{job.part} {job.case}", setting, (mode,), measure, bars)


def lines(rows: Sequence[Row], wanted: Wanted) -> list[str]:
    """A table for a terminal."""
    found = [f"{'':40} {OURS:>12} {THEIRS:>12} {'times':>8} {'spread':>8}"]
    for row in rows:
        ours, theirs = (row["contenders"].get(name) for name in (OURS, THEIRS))
        if ours is None or "count" not in ours:
            found.append(f"{row['case']:40} {ours['reason'] if ours else ''}")
            continue
        other = f"{theirs['count']:>12,} {ours['count'] / theirs['count']:>8.2f}" if theirs else (
            f"{ours['count'] / row['setting']['elements']:>11.2f} per score" if "elements" in row["setting"] else " " * 21)
        found.append(f"{row['case']:40} {ours['count']:>12,} {other} {ours['spread']:>8,}")
    return found


def main() -> None:
    """In the process that is counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", action="append", required=True)
    parser.add_argument("--times")
    parser.add_argument("--marks")
    arguments = parser.parse_args()
    work(arguments.work, None if arguments.times is None else int(arguments.times), arguments.marks)


if __name__ == "__main__":
    main()
