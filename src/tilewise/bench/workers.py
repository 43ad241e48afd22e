"""Work divided among processes, mostly compilation: each fills the compilers' caches on disk, for all."""
from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence


def run_slices(module: str, arguments: Sequence[str], count: int, seconds: float) -> list[str]:
    """Runs `python -m module arguments --slice i/count` for every i, together; returns the lines they print.

    Those still running after `seconds` are ended; of these, and of those that crash, the lines printed until then count.
    """
    deadline = time.monotonic() + seconds
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for i in range(count):
            with open(f"{folder}/{i}", "w") as out:
                command = [sys.executable, "-u", "-m", module, *arguments, "--slice", f"{i}/{count}"]
                workers.append(subprocess.Popen(command, stdout=out, stdin=subprocess.DEVNULL))
        for i, worker in enumerate(workers):
            try:
                worker.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            with open(f"{folder}/{i}") as out:
                lines += out.read().splitlines()
    return lines


def part(items: Sequence, text: str | None) -> Sequence:
    """The items of slice "i/count"; all of them for None."""
    if text is None:
        return items
    first, count = map(int, text.split("/"))
    return items[first::count]
