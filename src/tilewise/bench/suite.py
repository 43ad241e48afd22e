"""Runs a benchmark: case after case, written as each is done, continued where it was left.

A benchmark is a module with `trials(wanted)`, and with `lines(rows, wanted)` if it has a table of its own.
"""
from __future__ import annotations

import importlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tilewise.bench import record, table
from tilewise.bench.contest import Outcome
from tilewise.bench.record import Result, Row
from tilewise.bench.timing import alive

BENCHMARKS = ("attention", "decode", "sparse", "masks", "memory", "cpu", "serving", "paper", "numerics", "overhead",
              "instructions")
TOO_SMALL = "quick: shapes this small say that it works, little about speed"
Bars = Mapping[tuple[str, str], float]
Progress = Callable[[str, int, int, str], None]         # part, cases done, cases of the part, what is measured now


@dataclass(frozen=True)
class Wanted:
    """What is asked of a benchmark. The last three are for `attention`; also: backends of ours beside the one that serves."""
    device: torch.device
    quick: bool = False
    head_dims: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """What is measured together: a row for each mode.

    bars: what is promised, by mode and name: to be so many times faster than another, or of ours the seconds at most.
    """
    part: str
    case: str
    setting: dict[str, Any]
    modes: tuple[str, ...]
    measure: Callable[[], dict[str, Outcome]]
    bars: Bars = field(default_factory=dict)

    def named(self, mode: str) -> str:
        """The row's name, the same in every run."""
        return f"{self.case} {mode}"

    def rows(self, found: dict[str, Outcome], promised: bool = True) -> list[Row]:
        """promised: with the bars."""
        rows: dict[str, Row] = {mode: {"part": self.part, "case": self.named(mode), "setting": self.setting | {"mode": mode},
                                       **found[mode]} for mode in self.modes}
        for (mode, name), bar in self.bars.items() if promised else ():
            if name in rows[mode]["times_faster"]:
                rows[mode]["times_faster"][name]["bar"] = bar
            elif name == next(iter(rows[mode]["contenders"])):
                rows[mode]["contenders"][name]["bar"] = bar
        return list(rows.values())


def trials(name: str, wanted: Wanted) -> list[Trial]:
    """The cases of a benchmark."""
    return importlib.import_module(f"tilewise.bench.{name}").trials(wanted)


def table_of(name: str, wanted: Wanted) -> Callable[[Sequence[Row]], list[str]]:
    """What makes a benchmark's text table from rows."""
    own = getattr(importlib.import_module(f"tilewise.bench.{name}"), "lines", None)
    return table.lines if own is None else lambda rows: own(rows, wanted)


def run(name: str, wanted: Wanted, *, out: Path | None = None, seconds: float = math.inf, resume: bool = False,
        progress: Progress = lambda part, done, total, words: None) -> Result:
    """Measures what is wanted; after each case the result so far is written to `out`. No case begins after `seconds`.

    One case's failure does not cost the others. resume: rows that `out` holds are kept.

    Raises ValueError where these were measured on other code or another machine.
    """
    deadline = time.monotonic() + seconds
    result = record.new(name, wanted.device.type, wanted.quick)
    every, lines = trials(name, wanted), table_of(name, wanted)
    rows = {row["case"]: row for row in kept(out, result)} if resume and out is not None and out.exists() else {}
    done, totals = Counter[str](), Counter(trial.part for trial in every)
    for trial in every:
        if any(trial.named(mode) not in rows for mode in trial.modes):
            if time.monotonic() > deadline:
                continue
            progress(trial.part, done[trial.part], totals[trial.part], trial.case)
            rows |= {row["case"]: row for row in attempt(trial, wanted)}
            publish(result, every, rows, out, lines)
        done[trial.part] += 1
        progress(trial.part, done[trial.part], totals[trial.part], "")
    publish(result, every, rows, out, lines)
    return result


def kept(path: Path, result: Result) -> list[Row]:
    """The rows of an earlier run of the same benchmark, but those in which nobody could be timed."""
    old = record.load(path)
    if found := record.differences(old, result):
        raise ValueError(f"--resume: {path} was measured under other conditions ({'; '.join(map(str, found))}); without "
                         "--resume it is replaced")
    return [row for row in old["rows"] if any(entry["state"] in ("timed", "right") for entry in row["contenders"].values())]


def attempt(trial: Trial, wanted: Wanted) -> list[Row]:
    """A trial's rows, with bars where shapes are large enough to tell; if it fails as a whole, they say so of ours."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()      # cases are compiled apart, and torch.compile gives up after a few
    try:
        return trial.rows(trial.measure(), promised=not wanted.quick)
    except Exception as error:  # such as memory
        if not alive(wanted.device):
            raise SystemExit(f"{trial.case}: {record.words(error)}; the device no longer answers") from None
        failed: Outcome = {"contenders": {"tilewise": {"state": "refused", "reason": record.words(error)}}, "times_faster": {}}
        return trial.rows(dict.fromkeys(trial.modes, failed), promised=False)


def publish(result: Result, every: Sequence[Trial], rows: dict[str, Row], out: Path | None,
            lines: Callable[[Sequence[Row]], list[str]]) -> None:
    """The result with all rows that there are, in the order of the trials."""
    names = [trial.named(mode) for trial in every for mode in trial.modes]
    result["rows"] = [rows[name] for name in names if name in rows]
    result["complete"] = len(result["rows"]) == len(names)
    left = len(names) - len(result["rows"])
    result["lines"] = (lines(result["rows"]) + [TOO_SMALL] * result["quick"]
                       + [f"{left} rows are not measured yet"] * bool(left))
    record.write(out, result)
