"""Result files, read and checked: a file is input, and one that does not hold what it should is refused in one line.

The format is that of `tilewise.bench`: machine, commit and date; benchmark, device, quick, complete; rows of contenders.
"""
from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

STATES = ("timed", "right", "wrong", "refused", "absent")       # right: its errors are measured, not its time
DONE = ("timed", "right")
QUANTITIES = ("seconds", "host_seconds", "tflops", "bytes", "gb_per_s", "share", "count", "bar")
TAKEN = {"machine", "commit", "date", "benchmark", "device", "quick", "complete", "rows", "lines"}


class Ratio(NamedTuple):
    """How many times faster ours is than another: the median over rounds, and quartiles if there were rounds to pair. bar: what
    is promised at least."""
    median: float
    quartiles: tuple[float, float] | None = None
    bar: float | None = None


class Promise(NamedTuple):
    """A number that is held to a bar: `against` a contender at least so many times faster, without one at most so many
    seconds."""
    against: str
    found: Ratio
    bar: float

    @property
    def met(self) -> bool:
        return self.found.median >= self.bar if self.against else self.found.median <= self.bar


@dataclass(frozen=True)
class Entry:
    """One contender in one row. Seconds are medians; tflops in 10^12 FLOP/s; bytes beside inputs and outputs, at the peak;
    share of the roofline, 0 to 1; errors by tensor [error, allowed]; rms by tensor, of the errors and of the truth; count: an
    exact number, such as bytes of traffic; bar: seconds that are promised at most; yardstick: what the machine can do, no other
    implementation."""
    name: str
    state: str
    reason: str = ""
    seconds: float | None = None
    host_seconds: float | None = None
    tflops: float | None = None
    bytes: float | None = None
    gb_per_s: float | None = None
    share: float | None = None
    count: float | None = None
    bar: float | None = None
    yardstick: bool = False
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rms: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """What a paper or vendor printed for the same case, on other hardware."""
    who: str
    hardware: str
    seconds: float | None = None
    tflops: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Row:
    """One case: its setting, and its contenders, ours first."""
    part: str
    case: str
    setting: Mapping[str, Any]
    entries: Mapping[str, Entry]
    times_faster: Mapping[str, Ratio] = field(default_factory=dict)
    published: Sequence[Published] = ()
    error: str = ""

    @property
    def ours(self) -> Entry | None:
        return next(iter(self.entries.values()), None)

    def timed(self, *names: str) -> dict[str, Entry]:
        """Contenders with a time, all or those of `names`."""
        return {name: e for name, e in self.entries.items() if e.seconds is not None and (not names or name in names)}

    def faster(self, name: str) -> Ratio | None:
        """How many times faster ours is than `name`: as measured within rounds, else the ratio of the medians."""
        if name in self.times_faster:
            return self.times_faster[name]
        ours, other = self.ours, self.entries.get(name)
        if ours is None or other is None or ours is other or ours.seconds is None or other.seconds is None:
            return None
        return Ratio(other.seconds / ours.seconds)

    def promises(self) -> list[Promise]:
        """Everything promised of this case."""
        found = [Promise(name, ratio, ratio.bar) for name, ratio in self.times_faster.items() if ratio.bar is not None]
        ours = self.ours
        if ours is not None and ours.bar is not None and ours.seconds is not None:
            found.append(Promise("", Ratio(ours.seconds), ours.bar))
        return found

    def whole(self, name: str, otherwise: int = 1) -> int:
        """A whole number of the setting."""
        value = self.setting.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


@dataclass(frozen=True)
class File:
    """One result file. facts: of the machine; others: what else stands at its top, such as the environment."""
    name: str
    benchmark: str
    device: str
    quick: bool
    complete: bool
    facts: Mapping[str, str]
    commit: str | None
    date: str
    rows: Sequence[Row]
    others: Mapping[str, Any]

    @property
    def machine(self) -> str:
        """What it ran on, in a few words."""
        gpus = [gpu for gpu in self.facts.get("GPU", "none").split("; ") if gpu != "none"] if self.device == "cuda" else []
        if gpus:
            return (f"{len(gpus)} x " if len(gpus) > 1 else "") + gpus[0].split(",")[0]
        return self.facts.get("CPU", "an unknown machine")


class Problem(ValueError):
    """What is wrong with a file, in one line that names it."""


def read(paths: Sequence[Path]) -> list[File]:
    """All files, in order. Raises Problem (a ValueError) or OSError."""
    if not paths:
        raise Problem("no result files: expected at least one, such as bench-report/*.json")
    found = [path.resolve() for path in paths]
    if len(set(found)) < len(found):
        twice = next(path for path in paths if found.count(path.resolve()) > 1)
        raise Problem(f"{twice}: expected each file once, got it twice")
    files = [read_one(path) for path in paths]
    seen: dict[tuple[str, ...], str] = {}
    for file in files:
        for row in file.rows:
            key = (file.benchmark, file.machine, row.case, str(sorted(row.setting.items())))
            if seen.setdefault(key, file.name) != file.name:
                raise Problem(f"{file.name}: {seen[key]} holds case {row.case!r} of benchmark {file.benchmark} on "
                              f"{file.machine} too: expected one measurement of each case, give one of the two files")
    return files


def read_one(path: Path) -> File:
    """One file, checked."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise Problem(f"{path}: expected a JSON file of `tilewise bench --out`, got bytes that are no text") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise Problem(f"{path}: expected a JSON file of `tilewise bench --out`, got no JSON: {error}") from None
    reader = Reader(str(path))
    with_keys = reader.mapping(data, "the file")
    for name in ("benchmark", "rows", "machine"):
        if name not in with_keys:
            raise Problem(f"{path}: expected a result of `tilewise bench --out`, with benchmark, machine and rows, "
                          f"got no {name}")
    if not reader.sequence(data["rows"], "rows"):
        raise Problem(f"{path}: expected rows, got none: nothing has been measured yet")
    rows = [reader.row(row, f"rows[{i}]") for i, row in enumerate(data["rows"])]
    cases = [row.case for row in rows]
    if len(set(cases)) < len(cases):
        raise Problem(f"{path}: expected each case once, got {next(c for c in cases if cases.count(c) > 1)!r} twice")
    facts = {str(k): str(v) for k, v in reader.mapping(data["machine"], "machine").items()}
    device = reader.text(data.get("device", "cpu"), "device")
    if device not in ("cpu", "cuda"):
        raise Problem(f"{path}: device: expected cpu or cuda, got {device!r}")
    return File(path.name, reader.text(data["benchmark"], "benchmark"), device, bool(data.get("quick", False)),
                bool(data.get("complete", True)), facts, data.get("commit") and str(data["commit"]), str(data.get("date", "")),
                rows, {k: v for k, v in data.items() if k not in TAKEN})


class Reader:
    """Takes the parts of a file's JSON; what is not as expected is a Problem that says where."""

    def __init__(self, path: str):
        self.path = path

    def refuse(self, where: str, expected: str, got: Any) -> Problem:
        return Problem(f"{self.path}: {where}: expected {expected}, got {str(got)[:80]!r}" if isinstance(got, str) else
                       f"{self.path}: {where}: expected {expected}, got {str(got)[:80]}")

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(where, "an object", value)
        return value

    def sequence(self, value: Any, where: str) -> Sequence[Any]:
        if not isinstance(value, list):
            raise self.refuse(where, "a list", value)
        return value

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise self.refuse(where, "text", value)
        return value

    def number(self, value: Any, where: str, *, finite: bool = True) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (finite and not math.isfinite(value)):
            raise self.refuse(where, "a finite number" if finite else "a number", value)
        return value

    def positive(self, value: Any, where: str) -> float:
        if self.number(value, where) <= 0:
            raise self.refuse(where, "a number above 0", value)
        return value

    def pair(self, value: Any, where: str, *, finite: bool = True) -> tuple[float, float]:
        if not isinstance(value, list) or len(value) != 2:
            raise self.refuse(where, "two numbers", value)
        first, second = (self.number(x, where, finite=finite) for x in value)
        return first, second

    def row(self, value: Any, where: str) -> Row:
        data = self.mapping(value, where)
        if "case" not in data:
            raise self.refuse(where, "a case", "no case")
        case = self.text(data["case"], f"{where}.case")
        where = f"{where} ({case[:60]})"
        entries = {name: self.entry(name, entry, f"{where}: {name}")
                   for name, entry in self.mapping(data.get("contenders") or {}, f"{where}: contenders").items()}
        faster = {name: self.ratio(found, f"{where}: times_faster: {name}")
                  for name, found in self.mapping(data.get("times_faster") or {}, f"{where}: times_faster").items()}
        bar = data.get("bar")
        if bar is not None and faster:          # of the row: what is promised against the first
            first = next(iter(faster))
            faster[first] = faster[first]._replace(bar=self.number(bar, f"{where}: bar"))
        published = [self.published(who, one, f"{where}: published: {who}")
                     for who, one in self.mapping(data.get("published") or {}, f"{where}: published").items()]
        setting = self.mapping(data.get("setting") or {}, f"{where}: setting")
        return Row(str(data.get("part", "")), case, setting, entries, faster, published, str(data.get("error") or ""))

    def entry(self, name: str, value: Any, where: str) -> Entry:
        data = self.mapping(value, where)
        state = data.get("state")
        if state not in STATES:
            raise self.refuse(f"{where}: state", f"one of {', '.join(STATES)}", state)
        quantities = {key: self.positive(data[key], f"{where}: {key}") if key in ("seconds", "tflops")
                      else self.number(data[key], f"{where}: {key}")
                      for key in QUANTITIES if key in data and (data[key] is not None or key == "seconds")} \
            if state in DONE else {}
        errors, rms = ({tensor: self.pair(pair, f"{where}: {key}: {tensor}", finite=False)
                        for tensor, pair in self.mapping(data.get(key) or {}, f"{where}: {key}").items()}
                       for key in ("errors", "rms"))
        if state == "timed" and not quantities and not errors:
            raise self.refuse(where, f"seconds or another of {', '.join(QUANTITIES[1:])}, errors", "none of them")
        return Entry(name, state, str(data.get("reason") or ""), yardstick=bool(data.get("yardstick")), errors=errors, rms=rms,
                     **quantities)

    def ratio(self, value: Any, where: str) -> Ratio:
        data = self.mapping(value, where)
        quartiles, bar = data.get("quartiles"), data.get("bar")
        return Ratio(self.positive(data.get("median"), f"{where}: median"),
                     None if quartiles is None else self.pair(quartiles, f"{where}: quartiles"),
                     None if bar is None else self.number(bar, f"{where}: bar"))

    def published(self, who: str, value: Any, where: str) -> Published:
        data = self.mapping(value, where)
        numbers = {key: self.positive(data[key], f"{where}: {key}") for key in ("seconds", "tflops", "bytes")
                   if data.get(key) is not None}
        return Published(who, str(data.get("hardware") or "other hardware"), **numbers)


def pairs(files: Sequence[File], *benchmarks: str) -> Iterator[tuple[File, Row]]:
    """Every row of these benchmarks (all without) with its file."""
    return ((file, row) for file in files if not benchmarks or file.benchmark in benchmarks for row in file.rows)


def only(files: Sequence[File], parts: Sequence[str]) -> list[File]:
    """The files with their rows of these parts alone, and without those that have none."""
    there = {row.part for file in files for row in file.rows}
    for part in parts:
        if part not in there:
            raise Problem(f"--part: expected one of {', '.join(sorted(there))}, got {part!r}")
    return [replace(file, rows=rows) for file in files if (rows := [row for row in file.rows if row.part in parts])]
