"""The `cpu` backend held to what it promises: cases of the other benchmarks with their bars, and compilation.

Yardsticks are the machine's own: a product of fp32 matrices with as many FLOPs, a copy and a sum of as many bytes.
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import torch

from tilewise import doctor
from tilewise.bench import attention, compiling, decode, packed, sparse
from tilewise.bench.caches import Setting as Cached
from tilewise.bench.contest import BOTH, FORWARD, Entrant
from tilewise.bench.packed import Setting as Packed
from tilewise.bench.shapes import Shape
from tilewise.bench.sparse import Setting as Sparse
from tilewise.bench.suite import Trial, Wanted

SGEMM = 2048            # rows and columns of the product
RIVAL = "sdpa flash"
MATRIX = "sdpa, boolean mask"
CPU = torch.device("cpu")


def trials(wanted: Wanted) -> list[Trial]:
    """Raises RuntimeError where the backend does not serve, ValueError for another device."""
    if wanted.device.type != "cpu":
        raise ValueError(f"--device: expected cpu, got {str(wanted.device)!r}")
    if (check := doctor.check_backend("cpu", "cpu")).error is None:
        raise RuntimeError(f"backend cpu: {check.reason}")
    quick = wanted.quick
    return [*dense(wanted), *of_packed(wanted), *of_decoding(wanted), *of_blocks(wanted),
            *(compiling.trials(1, ("plain",)) if quick else compiling.trials(3)), *of_others(wanted)]


def dense(wanted: Wanted) -> list[Trial]:
    """Self-attention beside SDPA and the matrix product."""
    shrink, seconds = (16, 0.2) if wanted.quick else (1, 10.0)
    tiny, short, long = (n // shrink for n in (512, 2048, 8192))
    kinds, sizes, sixteen = (False, True), ((short, 8), (long, 4)), ("bfloat16", "float16")
    of_dtype = {(FORWARD, "bfloat16"): 1.5, (BOTH, "bfloat16"): 3.0}
    rows: list[tuple[str, int, int, int, bool, str, float | None]] = [
        (FORWARD, n, heads, dim, causal, "float32", 1.3 if causal else 1.1)
        for dim, (n, heads), causal in product((64, 128), sizes, kinds)]
    rows += [(FORWARD, tiny, 8, 64, causal, "float32", 1.5 if causal else 1.05) for causal in kinds]
    rows += [(BOTH, n, heads, 64, causal, "float32", 1.5) for (n, heads), causal in product(sizes, kinds)]
    rows += [(mode, short, 8, 64, causal, dtype, of_dtype.get((mode, dtype)))
             for dtype, mode, causal in product(sixteen, (FORWARD, BOTH), kinds)]
    found = []
    for mode, n, heads, dim, causal, dtype, bar in rows:
        shape = Shape(1, n, heads, heads, dim, causal, dtype)
        with_product = mode == FORWARD and dtype == "float32" and not causal and n != tiny
        bars = ({(mode, RIVAL): bar} if bar else {}) | ({(mode, "sgemm"): 0.85} if with_product else {})
        found.append(attention.trial(shape, wanted, modes=(mode,), only=(RIVAL,), bars=bars, seconds=seconds,
                                     beside=partial(sgemm, shape) if with_product else list))
    return found


def sgemm(shape: Shape) -> list[Entrant]:
    """A product of fp32 matrices."""
    a, b, c = (torch.ones(SGEMM, SGEMM) for _ in range(3))
    return [Entrant("sgemm", {FORWARD: lambda turn: torch.mm(a, b, out=c)}, factor=shape.flops() / (2 * SGEMM**3))]


def of_packed(wanted: Wanted) -> list[Trial]:
    """29 sequences, 16,547 tokens, 29 to 3,469 each."""
    setting = (Packed(4, False, 2, longest=256, dtype="float32", seconds=0.2) if wanted.quick else
               Packed(29, False, 8, dtype="float32", seconds=40.0))
    return [packed.trial(setting, CPU, modes=(FORWARD,), only=("sdpa padded", "sdpa in a loop"),
                         bars={(FORWARD, "sdpa padded"): 2.0})]


def of_decoding(wanted: Wanted) -> list[Trial]:
    """One query and a long cache. Shorter caches may stay in the CPU's own, and are left there."""
    shrink, seconds = (16, 0.2) if wanted.quick else (1, 8.0)
    bars = {(decode.ATTEND, "sdpa"): 3.0, (decode.ATTEND, "copy"): 0.7}
    return [decode.trial(Cached(1, context // shrink, *decode.LLAMA_8B, dtype, seconds), CPU, modes=(decode.ATTEND,),
                         only=("sdpa", "sdpa contiguous"), bars=bars if context == 32768 else {})
            for context in (32768, 2048, 512) for dtype in ("float32", "bfloat16")]


def of_blocks(wanted: Wanted) -> list[Trial]:
    shrink, seconds = (16, 0.2) if wanted.quick else (1, 20.0)
    window = Sparse("window", 8192 // shrink, 4, 64, "float32", 512 // shrink, seconds)
    butterfly = Sparse("butterfly", 16384 // shrink, 2, 64, "float32", 128, seconds)
    return [sparse.trial(window, CPU, modes=(BOTH,), others=(MATRIX,), bars={(BOTH, MATRIX): 8.0}),
            sparse.trial(butterfly, CPU, modes=(FORWARD, BOTH), bars=sparse.BARS)]


def of_others(wanted: Wanted) -> list[Trial]:
    """Standard attention, our own `tiled`, JAX, FlexAttention compiled; forward only."""
    shape = Shape(1, 128 if wanted.quick else 2048, 8, 8, 64, True, "float32")
    return [attention.trial(shape, replace(wanted, also=("tiled",)), part="others", modes=(FORWARD,),
                            only=("tilewise tiled", "standard", "jax", "flex"), seconds=0.2 if wanted.quick else 20.0)]
