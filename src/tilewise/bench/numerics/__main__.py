"""python -m tilewise.bench.numerics [--quick] [--out FILE]"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from tilewise.bench.__main__ import say
from tilewise.bench.suite import Wanted, run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.numerics", description="Errors against fp64.")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="short sequences")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    result = run("numerics", Wanted(torch.device(options.device), options.quick), out=options.out, progress=say)
    print("\n".join(result["lines"]))


if __name__ == "__main__":
    main()
