"""python -m tilewise.bench.paper [--quick] [--out FILE [--resume]] [--plot FILE]"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from tilewise.bench.__main__ import say
from tilewise.bench.paper import figure
from tilewise.bench.suite import Wanted, run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.paper", description="The papers' own benchmarks.")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--plot", type=Path, help="draw FlashAttention's figure 3, such as figure3.svg (extra `plots`)")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--resume", action="store_true", help="continue the file of --out")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after so long")
    parser.add_argument("--also", action="append", default=[], metavar="BACKEND", help="of ours that do not volunteer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    wanted = Wanted(torch.device(options.device), options.quick, also=tuple(options.also))
    result = run("paper", wanted, out=options.out, seconds=options.seconds, resume=options.resume, progress=say)
    if options.plot:
        figure.save(result["rows"], options.plot, result["machine"]["GPU" if result["device"] == "cuda" else "CPU"])
    print("\n".join(result["lines"]))


if __name__ == "__main__":
    main()
