"""Work in processes of its own: divided among many, mostly compilation, or one function apart, for its memory."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any


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


def apart(module: str, function: str, *arguments: Any, environment: Mapping[str, str] | None = None,
          patience: float = 120.0) -> Any:
    """What a function of a module of this room returns in a new process, to which its arguments go as JSON.

    Raises RuntimeError with the last words of a process that fails or takes longer than `patience` seconds.
    """
    code = (f"import json; from tilewise.bench import {module}; "
            f"print(json.dumps({module}.{function}(*json.loads({json.dumps(arguments)!r}))))")
    try:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=os.environ | dict(environment or {}),
                              capture_output=True, text=True, timeout=patience, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"ended after {patience:.0f} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or ["it was killed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])
