"""Traffic measured on a GPU by Nsight Compute: what DRAM really moved, caches and all.

    ncu --metrics dram__bytes_read.sum,dram__bytes_write.sum --csv python -m tilewise.traffic.ncu SHAPE

The measured bytes lie between every tensor once and the counted bytes: what the counter counts, the L2 cache may serve.
Needs an NVIDIA GPU, `ncu` on the path, and leave to read performance counters. Not yet run on a GPU.
"""
from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import torch

import tilewise as tw
from tilewise.mask_text import read_mask
from tilewise.traffic.shapes import Shape

METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written"}
UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9, "Tbyte": 10**12}
RANGE = "tilewise"                      # kernels are looked at inside this NVTX range


def missing() -> str | None:
    """Why nothing can be measured here; None: it can."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "DRAM traffic is measured on an NVIDIA GPU, and torch sees none here"
    if shutil.which("ncu") is None:
        return "DRAM traffic is measured by Nsight Compute, and there is no `ncu` on the path: it comes with the CUDA toolkit"
    return None


def measure(shape: dict[str, Any], backward: bool) -> list[dict[str, Any]]:
    """Of each kernel of one call: {"name", "read", "written"}, bytes. Raises RuntimeError where that cannot be measured."""
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    command = ["ncu", "--metrics", ",".join(METRICS), "--csv", "--nvtx", "--nvtx-include", f"{RANGE}/", "--cache-control",
               "all", sys.executable, "-m", __name__, json.dumps(shape), str(int(backward))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeError(f"ncu ended with status {done.returncode}: {said[-1] if said else ''}")
    return parse(done.stdout.splitlines())


def parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The kernels in the CSV that ncu prints, one line for each metric, among other lines that begin with ==."""
    kernels: dict[str, dict[str, Any]] = {}
    table = [line for line in lines if line.startswith('"')]
    for row in csv.DictReader(table):
        name = METRICS.get(row["Metric Name"])
        if name is not None:
            kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"], "read": 0, "written": 0})
            kernel[name] = round(float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]])
    if not kernels:
        raise RuntimeError("ncu printed no metrics: it may lack leave to read performance counters (ERR_NVGPUCTRPERM)")
    return list(kernels.values())


def main() -> None:
    """The call that is looked at, after one that compiles and fills caches."""
    of, backward = Shape(**json.loads(sys.argv[1])), bool(int(sys.argv[2]))
    dtype = getattr(torch, of.dtype)

    def tensor(length: int, heads: int) -> torch.Tensor:
        return torch.randn(of.batch, length, heads, of.head_dim, device="cuda", dtype=dtype, requires_grad=backward)

    q = tensor(of.seqlen_q, of.heads)
    k, v = (tensor(of.seqlen_k or of.seqlen_q, of.kv_heads or of.heads) for _ in range(2))
    mask = read_mask(of.mask) if of.mask else None

    def call() -> None:
        out = tw.attention(q, k, v, causal=of.causal, mask=mask, backend="triton")
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    call()
    torch.cuda.synchronize()
    with torch.cuda.nvtx.range(RANGE):
        call()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
