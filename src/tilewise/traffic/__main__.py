"""DRAM's traffic of a forward and backward pass on this GPU, where only torch is installed: python -m tilewise.traffic

The shape is FlashAttention's figure 2 with a quarter of its batch: N 1024, 16 heads of 64, batch 16. Otherwise:
`tilewise traffic measure`.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from tilewise.bench import record
from tilewise.traffic.commands import measured
from tilewise.traffic.result import result
from tilewise.traffic.shapes import Shape


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.traffic", description="DRAM traffic by Nsight Compute.")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    try:
        found = measured(Shape(1024, batch=16, heads=16), backward=True)
    except RuntimeError as error:
        found = result([], [f"not measured: {error}"], device="cuda")
    record.write(options.out, found)
    print("\n".join(found["lines"]))


if __name__ == "__main__":
    main()
