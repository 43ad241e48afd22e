"""What `tilewise bench` does, where only torch is installed: python -m tilewise.bench BENCHMARK [--out FILE]"""
from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tilewise.bench import record
from tilewise.bench.suite import BENCHMARKS, Wanted, run
from tilewise.bench.workers import part, run_slices


def main(arguments: Sequence[str] | None = None) -> None:
    asked = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(asked)
    begin = time.monotonic()
    tuned = [tuple(getattr(options, name, ())) for name in ("head_dims", "lengths", "also")]
    wanted = Wanted(torch.device(options.device), options.quick, *tuned)
    if options.slice:
        compile_slice(options.benchmark, wanted, options.slice)
        return
    if options.jobs:
        run_slices("tilewise.bench", asked, options.jobs, options.seconds / 2)
    left = options.seconds - (time.monotonic() - begin)
    result = run(options.benchmark, wanted, out=options.out, seconds=left, resume=options.resume, progress=say)
    print("\n".join(result["lines"]))


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, help="write the result as JSON")
    common.add_argument("--quick", action="store_true", help="small shapes")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--seconds", type=float, default=1e9, help="begin no further case after so long")
    common.add_argument("--resume", action="store_true", help="continue the file of --out")
    common.add_argument("--jobs", type=int, default=0, help="processes that compile ahead (default none)")
    common.add_argument("--slice", help=argparse.SUPPRESS)
    found = argparse.ArgumentParser(prog="python -m tilewise.bench", description="Benchmarks of attention.")
    names = found.add_subparsers(dest="benchmark", required=True, metavar=",".join(BENCHMARKS))
    for name in BENCHMARKS:
        command = names.add_parser(name, parents=[common])
        if name == "attention":
            command.add_argument("--head-dims", type=numbers, default=(), help="such as 64,128")
            command.add_argument("--lengths", type=numbers, default=(), help="such as 1024,4096")
            command.add_argument("--also", action="append", default=[], metavar="BACKEND",
                                 help="of ours that do not volunteer, such as hopper")
    return found


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def say(part: str, done: int, total: int, words: str) -> None:
    """Progress as plain lines."""
    if words:
        print(f"{part} {done + 1}/{total}: {words}", file=sys.stderr, flush=True)


def compile_slice(name: str, wanted: Wanted, text: str) -> None:
    """Compiles one slice of what a benchmark needs, by running it; errors are left to the measurement."""
    module = importlib.import_module(f"tilewise.bench.{name}")
    for call in part(module.compilations(wanted), text):
        try:
            call()
        except Exception as error:  # it will come up again, and be reported
            print(record.words(error))


if __name__ == "__main__":
    main()
