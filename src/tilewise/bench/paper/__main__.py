"""python -m tilewise.bench.paper [--quick] [--out FILE] [--resume] [--only PROTOCOL]"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tilewise.bench.paper.run import PROTOCOLS, benchmark


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.paper", description="The papers' own benchmarks.")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--resume", action="store_true", help="go on where --out was left")
    parser.add_argument("--only", action="append", choices=list(PROTOCOLS), help="may be given again (default all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    result = benchmark(torch.device(options.device), quick=options.quick, out=options.out, only=options.only or tuple(PROTOCOLS),
                       resume=options.resume, progress=lambda part, done, total, words: print(
                           f"{part} {done + 1}/{total}: {words}", file=sys.stderr, flush=True))
    print("\n".join(result["lines"]))


if __name__ == "__main__":
    main()
