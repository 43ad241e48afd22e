"""Memory that attention needs beside inputs, outputs and gradients, as the sequence grows; on a GPU.

    python -m tilewise.bench.memory [--out FILE]
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tilewise.bench import record
from tilewise.bench.peers import Contender, discover
from tilewise.bench.run import Shape, contenders
from tilewise.bench.timing import alive, workspace

LENGTHS = (16384, 32768, 65536, 131072)


def measure(shape: Shape, contender: Contender, device: torch.device) -> dict[str, Any]:
    """Bytes beside inputs and results, forward (which keeps what the backward needs) and forward with backward."""
    q, k, v, dout = shape.draw(device, 0)
    attend = contender.attend
    assert attend is not None

    def forward() -> tuple[torch.Tensor, ...]:
        return (attend(q, k, v, shape.causal),)

    def both() -> tuple[torch.Tensor, ...]:
        out, = forward()
        return (out, *torch.autograd.grad(out, (q, k, v), dout))

    both()      # what libraries allocate once and keep is not counted
    return {"forward": workspace(forward, device), "forward+backward": workspace(both, device)}


def line(row: dict[str, Any]) -> str:
    """One length; per contender MiB forward / with backward."""
    cells = [f"{name} " + (entry["error"] if "error" in entry else
                           f"{entry['forward'] / 2**20:.1f} / {entry['forward+backward'] / 2**20:.1f}")
             for name, entry in row["contenders"].items()]
    return f"S {row['shape']['seqlen'] // 1024:>4}k  " + "   ".join(cells) + f"   one score matrix {row['matrix'] / 2**20:,.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.memory", description="Memory of attention.")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--seconds", type=float, default=60, help="begin no length after so long (default 60)")
    options = parser.parse_args(arguments)
    deadline, device = time.monotonic() + options.seconds, torch.device("cuda")
    result: dict[str, Any] = record.stamp() | {
        "rows": [], "lines": ["MiB beside inputs, outputs and gradients, forward / with backward (bf16, H 16, D 128, causal)"]}
    for seqlen in LENGTHS:
        if time.monotonic() > deadline:
            break
        shape = Shape(1, seqlen, 16, 16, 128, True, "bfloat16")
        row: dict[str, Any] = {"shape": asdict(shape), "contenders": {}, "matrix": 2 * shape.heads * seqlen**2}
        field = [c for c in (contenders(shape, device)[0], *discover(device)[:2]) if c.attend]
        for contender in field:
            try:
                row["contenders"][contender.name] = measure(shape, contender, device)
            except Exception as error:  # as in tilewise.bench.run: one contender's failure is a result
                row["contenders"][contender.name] = {"error": record.words(error)}
        result["rows"].append(row)
        result["lines"].append(line(row))
        record.write(options.out, result)
        if not alive(device):
            raise SystemExit("the device no longer answers")
    print("\n".join(result["lines"]))


if __name__ == "__main__":
    main()
