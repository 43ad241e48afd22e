"""The file that every benchmark writes: what stands in it, where, when and on which code it was measured.

A result holds rows, a row one case and its contenders, ours first; `Row.case` names it for good: by it an unfinished file is
continued and two files are compared. Times are seconds, rates per second, memory bytes.
"""
from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import torch

from tilewise.doctor import machine

State = Literal["timed", "right", "wrong", "refused", "absent"]       # right: judged, and not to be timed
ASKED = "benchmark", "device", "quick"
HARDWARE = "CPU", "GPU"                 # facts of the machine: on another the same case is not the same measurement
PASSING = "CPU kernels"                 # one that the next call may change


class Judged(TypedDict):
    """reason: why there is no time. errors: by tensor, the error and what is allowed."""
    state: State
    reason: str


class Entry(Judged, total=False):
    """A contender. seconds: the median over rounds; host_seconds: until the caller went on. tflops: 10^12 FLOP per second, as
    the field counts. bytes: beyond inputs and results at the peak. share: of the roofline, 0 to 1. count: exact; spread: of
    two counts. rms: by tensor, of the errors and of the truth."""
    seconds: float
    quartiles: Sequence[float]
    host_seconds: float
    rounds: int
    tflops: float
    gb_per_s: float
    bytes: int
    share: float
    count: int
    spread: int
    errors: dict[str, list[float]]
    rms: dict[str, list[float]]
    bar: float                          # seconds that ours is promised to take at most
    yardstick: bool                     # what the machine can do, no other implementation


class Faster(TypedDict, total=False):
    """How many times faster ours is, of pairs within a round. bar: what is promised at least."""
    median: float
    quartiles: Sequence[float]
    bar: float


class Row(TypedDict, total=False):
    """setting: plain facts, among them the mode that is timed. times_faster: by the other's name. published: by who and where,
    what a paper says of this case: seconds, tflops or bytes, and its hardware."""
    part: str
    case: str
    setting: dict[str, Any]
    contenders: dict[str, Entry]
    times_faster: dict[str, Faster]
    published: dict[str, dict[str, Any]]


class Result(TypedDict):
    """lines: a table for a terminal. complete: whether every case has its row."""
    benchmark: str
    device: str
    quick: bool
    complete: bool
    machine: dict[str, str]
    clocks: dict[str, str]
    environment: dict[str, str]
    commit: str | None
    date: str
    rows: list[Row]
    lines: list[str]


def new(benchmark: str, device: str, quick: bool) -> Result:
    """A result without rows."""
    head: Any = stamp() | {"benchmark": benchmark, "device": device, "quick": quick}
    return head | {"complete": False, "rows": [], "lines": []}


def load(path: str | Path) -> Result:
    """Reads a result. Raises ValueError where the file holds something else, OSError where it cannot be read."""
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected the JSON of a benchmark: {error}") from None
    keys = set(found) if isinstance(found, dict) else set()
    if missing := [name for name in Result.__annotations__ if name not in keys]:
        raise ValueError(f"{path}: expected a result of `tilewise bench`, this has no {', '.join(missing)}")
    return found


class Difference(NamedTuple):
    """A fact about a result that is another in a later one."""
    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.old}, now {self.new}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """What is other about two results beside their rows: what was asked for, hardware, versions, commit."""
    names = [name for name in dict.fromkeys((*HARDWARE, *old["machine"], *new["machine"])) if name != PASSING]
    facts = [Difference(name, old[name], new[name]) for name in ASKED]
    facts += [Difference(name, old["machine"].get(name), new["machine"].get(name)) for name in names]
    return [fact for fact in (*facts, Difference("commit", old["commit"], new["commit"])) if fact.old != fact.new]


def stamp() -> dict[str, Any]:
    """Machine, clocks, environment, commit (None outside a repository, "+" at its end: with changes) and date (UTC)."""
    versions = {"cudnn": str(torch.backends.cudnn.version())} if torch.cuda.is_available() else {}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"machine": machine() | versions, "clocks": clocks(), "environment": environment(), "commit": commit(), "date": date}


def clocks() -> dict[str, str]:
    """Clock rates as the drivers tell them: of GPUs now and at most, with the power limit; of the CPU its governor."""
    found = {}
    fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    if torch.cuda.is_available() and (words := _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")):
        found[f"GPU {fields}"] = "; ".join(words.splitlines())
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    for name in ("scaling_governor", "scaling_max_freq"):
        if (folder / name).exists():
            found[f"CPU {name}"] = (folder / name).read_text().strip()
    return found


def environment() -> dict[str, str]:
    """Threads, and the variables that change how fast things run."""
    kinds = ("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "CUDA_", "CUBLAS_", "NVIDIA_TF32", "PYTORCH_", "TORCH_", "TRITON_",
             "MALLOC_", "CXX")
    return {"threads": str(torch.get_num_threads())} | {k: v for k, v in sorted(os.environ.items()) if k.startswith(kinds)}


def commit() -> str | None:
    """The commit of the repository that this file is part of."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    head = _said("git", "-C", str(root), "rev-parse", "HEAD")
    return head and head + ("+" if _said("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no") else "")


def _said(*command: str) -> str | None:
    """What a program prints; None where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write(path: str | Path | None, result: Any) -> None:
    """Writes JSON, whole or not at all; None: nowhere."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, path)


def words(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
