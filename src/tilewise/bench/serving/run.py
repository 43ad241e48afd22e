"""Decoding, packed batches, prompts in chunks: all measurements of this room, written as each is done.

    python -m tilewise.bench.serving [--quick] [--out FILE] [--parts decode,packed,chunks]

Each call is held to the tolerance rule before it is timed.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise.bench import record
from tilewise.bench.serving import chunks, decode, packed
from tilewise.bench.serving.contest import Row
from tilewise.bench.timing import alive
from tilewise.bench.workers import run_slices

PARTS = {"decode": decode, "packed": packed, "chunks": chunks}
PATIENCE = 400.0        # seconds after which no further measurement begins


def benchmark(device: torch.device, *, quick: bool = False, parts: Sequence[str] = tuple(PARTS), seconds: float = PATIENCE,
              out: Path | None = None, progress: Callable[[str], None] = lambda words: None) -> Row:
    """One setting after another; one's failure does not cost the others. None begins after `seconds`."""
    deadline = time.monotonic() + seconds
    result: Row = record.stamp() | {"lines": [], "not_reached": [], "failed": {}} | {name: [] for name in parts}
    for name in parts:
        for setting in PARTS[name].settings(device, quick):
            title = f"{name}: {setting}"
            if time.monotonic() > deadline:
                result["not_reached"].append(title)
            else:
                progress(title)
                attempt(name, setting, title, device, result)
            result["lines"] = lines(result, parts)
            record.write(out, result)
    return result


def attempt(name: str, setting: Any, title: str, device: torch.device, result: Row) -> None:
    """One setting's row, or its failure, into the result."""
    try:
        result[name].append(PARTS[name].measure(setting, device))
    except Exception as error:  # such as memory
        result["failed"][title] = record.words(error)
        if not alive(device):
            raise SystemExit(f"{title}: {record.words(error)}; the device no longer answers") from None


def lines(result: Row, parts: Sequence[str]) -> list[str]:
    """The tables of all parts, what failed, and how much was not reached."""
    found: list[str] = []
    for name in parts:
        try:
            found += PARTS[name].lines(result[name]) if result[name] else []
        except Exception as error:  # the table's failure is not the measurement's
            found.append(f"no lines of {name}: {record.words(error)}")
    found += [f"{title}: {words}"[:126] for title, words in result["failed"].items()]
    return found + [f"{len(result['not_reached'])} more not reached: there was no time left"] * bool(result["not_reached"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.serving", description="Decoding, packed batches, chunks.")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", type=_names, default=list(PARTS), help=f"of {','.join(PARTS)} (default all)")
    parser.add_argument("--seconds", type=float, default=PATIENCE, help=f"begin nothing after so long ({PATIENCE:.0f})")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile ahead (default none)")
    parser.add_argument("--slice", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    begin, device = time.monotonic(), torch.device(options.device)
    if options.slice:
        decode.warm(decode.settings(device, options.quick), device, options.slice)
        return
    if options.jobs and "decode" in options.parts:
        run_slices("tilewise.bench.serving", ["--device", options.device, *["--quick"] * options.quick], options.jobs,
                   options.seconds / 2)
    left = options.seconds - (time.monotonic() - begin)
    result = benchmark(device, quick=options.quick, parts=options.parts, seconds=left, out=options.out,
                       progress=lambda words: print(words, file=sys.stderr, flush=True))
    print("\n".join(result["lines"]))


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, got {','.join(sorted(unknown))}")
    return names
