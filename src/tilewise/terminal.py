"""What commands share: where they print, errors in one line, progress."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.progress import TaskID

console = Console(highlight=False)


@contextmanager
def plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are the user's to mend: one line, exit status 2, no traceback."""
    try:
        yield
    except kinds as error:
        Console(stderr=True, highlight=False).print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """Gives a function (stage, done, total, words) that keeps a progress bar with the remaining time for each stage; where
    there is no terminal, plain lines."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if not console.is_terminal:
        yield plain_lines()
        return
    columns = (TextColumn("{task.description:15}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[words]}"))
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, words="")
            bars.update(tasks[stage], completed=done, total=total, words=words)

        yield show


def plain_lines() -> Callable[[str, int, int, str], None]:
    """A line for each step that begins two seconds or more after the last line."""
    last = -math.inf

    def show(stage: str, done: int, total: int, words: str) -> None:
        nonlocal last
        if words and time.monotonic() >= last + 2:
            last = time.monotonic()
            console.print(f"{stage} {done + 1}/{total}: {words}", markup=False, soft_wrap=True)

    return show
