"""The gate matrix: every shipped kernel compiled for every GPU and judged, one row each, kept in a file.

Incremental: a case is compiled again only when its key changes. One row per line, so that a commit shows what changed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tilewise.inspect.build import KernelCase, build, reason
from tilewise.inspect.report import Report, examine, failures

Cases = Callable[[], Iterable[KernelCase]]  # a module-level function, so that worker processes can call it too
Row = dict[str, Any]


def run(shipped: Cases, store: Path, jobs: int = 2, progress: bool = True, only: str = "",
        arch: str | None = None) -> dict[str, Row]:
    """Compile the cases that have no row at their current key; return all rows. only, arch: none but those whose name
    contains it, for that GPU.

    `store` is rewritten after every result; rows of cases that no longer exist are dropped. A kernel that does not
    compile, or that crashes the compiler, gets a row that says so. Raises RuntimeError when TRITON_INTERPRET is set.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: unset it to compile kernels")
    cases = by_name(shipped())
    rows = {name: row for name, row in load(store).items() if name in cases}
    todo = [name for name, case in cases.items()
            if rows.get(name, {}).get("key") != case.key and only in name and arch in (None, case.arch)]
    save(store, rows)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("compiling kernels", total=len(todo))
        for name, outcome in _measure_all(shipped, todo, jobs):
            case = cases[name]
            rows[name] = {"arch": case.arch, "direction": case.direction, "key": case.key, **outcome}
            save(store, rows)
            for failure in outcome["failures"]:
                bar.console.print(f"[red]{name}: {failure}", highlight=False)
            bar.update(task, advance=1, description=name)
    return rows


def missing(cases: Iterable[KernelCase], store: Path) -> list[str]:
    """Names of the cases without a row at their current key."""
    rows = load(store)
    return [name for name, case in by_name(cases).items() if rows.get(name, {}).get("key") != case.key]


def failing(cases: Iterable[KernelCase], store: Path) -> dict[str, list[str]]:
    """Name -> failed gates, for the cases whose row has any."""
    rows = load(store)
    return {name: rows[name]["failures"] for name in by_name(cases) if rows.get(name, {}).get("failures")}


def by_name(cases: Iterable[KernelCase]) -> dict[str, KernelCase]:
    """"forward d128 bf16 causal @ sm_90" -> case. Raises ValueError when two cases share a name."""
    named: dict[str, KernelCase] = {}
    for case in cases:
        name = f"{case.name} @ {case.arch}"
        if name in named:
            raise ValueError(f"two kernel cases are called {name!r}")
        named[name] = case
    return named


def load(store: Path) -> dict[str, Row]:
    """All rows; none when the file does not exist."""
    return json.loads(store.read_text()) if store.exists() else {}


def save(store: Path, rows: Mapping[str, Row]) -> None:
    """Write one row per line, sorted, replacing the file at once."""
    lines = [f"{json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in sorted(rows.items())]
    store.parent.mkdir(parents=True, exist_ok=True)
    draft = store.with_suffix(".tmp")
    draft.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(draft, store)


def table(rows: Mapping[str, Row]) -> Table:
    """The rows for reading. hot loop: instructions in the longest hot loop. overlap: see `Loop.overlap`."""
    result = Table("kernel", "warps", "registers", "spills", "shared", "tensor instructions", "hot loop", "overlap", "failures",
                   box=None, header_style="bold", pad_edge=False)
    result.columns[0].no_wrap = True
    for column in result.columns[1:5]:
        column.justify = "right"
    for name, row in sorted(rows.items()):
        tensor = ", ".join(f"{count} {kind}" for kind, count in row.get("tensor", {}).items())
        numbers = [str(row.get(field, "")) for field in ("warps", "registers", "spills", "shared")]
        overlap = " of ".join(map(str, row.get("overlap", [])))
        result.add_row(name, *numbers, tensor, str(row.get("hot_loop", "")), overlap, "; ".join(row["failures"]),
                       style="red" if row["failures"] else "")
    return result


def measure(case: KernelCase) -> Row:
    """Compile and judge one case in this process; never raises for a kernel that does not compile."""
    try:
        report = examine(build(case), case)
    except Exception as error:  # the matrix must go on, whatever the compiler throws
        return {"failures": [f"does not compile: {reason(error)}"]}
    return {**_numbers(report), "failures": failures(report, case)}


def _numbers(report: Report) -> Row:
    numbers: Row = {
        "warps": report.warps,
        "registers": report.registers,
        "spills": report.spills,
        "shared": report.shared_memory,
        "tensor": report.tensor_instructions,
        "warnings": list(report.warnings),
    }
    if loop := report.hot_loop:
        numbers |= {"hot_loop": len(loop.body), "hot_units": dict(sorted(loop.units.items()))}
    if report.overlap:
        numbers["overlap"] = list(report.overlap)
    if report.setmaxnreg:
        numbers["setmaxnreg"] = True
    return numbers


def _measure_all(shipped: Cases, names: list[str], jobs: int) -> Iterator[tuple[str, Row]]:
    """(name, row) as they come. A thread per job, each with a process of its own: a crash names its culprit."""
    workers = [_Worker(shipped) for _ in range(jobs)]
    waiting = iter(names)
    with ThreadPoolExecutor(jobs) as threads:
        running: dict[Future[Row], tuple[str, _Worker]] = {}

        def feed(worker: _Worker) -> None:
            if (name := next(waiting, None)) is not None:
                running[threads.submit(worker.measure, name)] = name, worker

        try:
            for worker in workers:
                feed(worker)
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, worker = running.pop(future)
                    feed(worker)
                    yield name, future.result()
        finally:
            for worker in workers:
                worker.close()


class _Worker:
    """One spawned process that measures one case at a time and is replaced when it dies."""

    def __init__(self, shipped: Cases) -> None:
        self.shipped = shipped
        self._start()

    def _start(self) -> None:
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def measure(self, name: str) -> Row:
        try:
            return self.process.submit(_measure_named, self.shipped, name).result()
        except BrokenProcessPool:
            self._start()
            return {"failures": ["does not compile: the compiler crashed"]}

    def close(self) -> None:
        self.process.shutdown(cancel_futures=True)


def _measure_named(shipped: Cases, name: str) -> Row:
    """Kernels cannot be pickled: the worker makes the cases itself."""
    return measure(_cases(shipped)[name])


@lru_cache(maxsize=1)
def _cases(shipped: Cases) -> dict[str, KernelCase]:
    return by_name(shipped())
