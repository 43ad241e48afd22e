"""From a problem to kernel launches: descriptors, what is allocated, on which grid."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise.backends import Gradients, Needs
from tilewise.backends.gpu_math.arguments import arguments, in_all, padded, strides, visits, work
from tilewise.backends.gpu_math.entry import OPTIONS, entry, flatten
from tilewise.backends.hopper.backward_kernel import backward as backward_kernel
from tilewise.backends.hopper.configs import Config, choose
from tilewise.backends.hopper.forward_kernel import ROWS
from tilewise.backends.hopper.forward_kernel import forward as forward_kernel
from tilewise.backends.hopper.preprocess import preprocess
from tilewise.problem import Operands, Problem, aligned
from tilewise.state import sink_gradient

Start = Callable[[Any, Problem, int, Mapping[str, Any], int], None]
WARPS = 4                               # of the first partition; the others say how many they have


def start(kernel: Any, problem: Problem, programs: int, values: Mapping[str, Any], warps: int) -> None:
    """Launches a kernel on the device of the problem, whichever is current."""
    with torch.cuda.device(problem.device):
        flat = flatten(kernel, problem.program, values)
        entry(kernel, problem.program)[(programs,)](**flat, num_warps=warps, **OPTIONS)


def forward(problem: Problem, x: Operands, start: Start = start) -> tuple[Tensor, Tensor]:
    out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
    c = choose("forward", problem)
    told = arguments(problem, x)
    wide, wide_v = width(problem.head_dim), width(problem.head_dim_v)
    query_blocks = in_all(problem.packed_q, problem.seqlen_q, problem.batch, 1, c.BLOCK_M) * problem.heads
    start(forward_kernel, problem, query_blocks, dict(
        q_desc=descriptor(x.q, ROWS.value, wide), k_desc=descriptor(x.k, c.BLOCK_N, wide),
        v_desc=descriptor(x.v, c.BLOCK_N, wide_v), o_desc=descriptor(out, ROWS.value, wide_v), OUT=out, LSE=lse, SINKS=x.sinks,
        out_strides=strides(out), together=heads_together(problem), HAS_SINKS=problem.has_sinks,
        HIDES=problem.packed_k is not None or bool(x.captured), DV=problem.head_dim_v, BLOCK_D=wide, BLOCK_DV=wide_v,
        PINGPONG=bool(c.PINGPONG), EARLY_K_WAIT=bool(c.EARLY_WAIT), CONSUMER_REGISTERS=c.CONSUMER_REGISTERS, **common(told, c),
        **work(problem, x, "BLOCK_M")(c), **visits(problem, x)(c),
        **{name: told[name] for name in ("Q_ROWS", "K_ROWS", "RAW")}), WARPS)
    return out, lse


def backward(problem: Problem, x: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needs: Needs,
             start: Start = start) -> Gradients:
    if not aligned(dout):               # such as the expanded gradient of a sum
        dout = dout.contiguous()
    c = choose("backward", problem)
    told, subtrahend, delta = arguments(problem, x), torch.empty_like(lse), torch.empty_like(lse)
    query_blocks = in_all(problem.packed_q, problem.seqlen_q, problem.batch, 1, c.BLOCK_M) * problem.heads
    start(preprocess, problem, query_blocks, dict(
        OUT=out, DO=dout, DLSE=None if dlse is None else dlse.contiguous(), LSE=lse, SUBTRAHEND=subtrahend, DELTA=delta,
        Q_ROWS=x.q_rows, out_strides=strides(out), do_strides=strides(dout), heads=problem.heads, nq=problem.seqlen_q,
        lse_rows=problem.rows_q[1], HAS_DLSE=dlse is not None, DV=problem.head_dim_v, BLOCK_M=c.BLOCK_M,
        BLOCK_DV=padded(problem.head_dim_v), **work(problem, x, "BLOCK_M")(c)), 4)
    dq, dk, dv = problem.new_q(problem.head_dim), problem.new_k(problem.head_dim), problem.new_k(problem.head_dim_v)
    sums = torch.zeros(x.q.shape, dtype=torch.float32, device=problem.device)
    wide, wide_v = width(problem.head_dim), width(problem.head_dim_v)
    key_blocks = in_all(problem.packed_k, problem.seqlen_k, problem.batch, 1, c.BLOCK_N) * problem.kv_heads
    values = dict(
        q_desc=descriptor(x.q, c.BLOCK_M, wide), k_desc=descriptor(x.k, c.BLOCK_N, wide),
        v_desc=descriptor(x.v, c.BLOCK_N, wide_v), do_desc=descriptor(dout, c.BLOCK_M, wide_v),
        lse_desc=vector(subtrahend, c.BLOCK_M), delta_desc=vector(delta, c.BLOCK_M),
        dq_desc=descriptor(sums, c.BLOCK_M, wide), dk_desc=descriptor(dk, c.BLOCK_N, wide, 64),
        dv_desc=descriptor(dv, c.BLOCK_N, wide_v, 64), DK=dk, DV_=dv, dk_strides=strides(dk),
        dv_strides=strides(dv), D=problem.head_dim, DV=problem.head_dim_v, BLOCK_D=wide, BLOCK_DV=wide_v,
        EARLY_Q_WAIT=bool(c.EARLY_WAIT), **common(told, c), **work(problem, x, "BLOCK_N", keys=True)(c),
        **visits(problem, x, transposed=True)(c), **{name: told[name] for name in ("Q_ROWS", "K_ROWS", "RAW")})
    for part in PARTS[c.PARTS]:
        start(backward_kernel, problem, key_blocks, values | dict(PART=part), 8)
    torch.mul(sums, problem.scale, out=dq)
    dsinks = sink_gradient(x.sinks, lse, delta) if needs.sinks and x.sinks is not None else None
    return Gradients(dq, dk, dv, None, dsinks, [None] * len(x.captured))


PARTS = {1: ("",), 2: (" dk", " dv")}
NAMES = "scale", "heads", "group", "nq", "nk", "lse_rows", "captured", "ints", "floats"


def common(told: Mapping[str, Any], c: Config) -> dict[str, Any]:
    """What both kernels are told about a problem and a configuration."""
    return {name: told[name] for name in NAMES} | dict(
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, STAGES=c.STAGES, PRODUCER_REGISTERS=c.PRODUCER_REGISTERS)


def width(dim: int) -> int:
    """Columns of a tile: TMA fills those beyond `dim` with 0."""
    return max(64, padded(dim))


def descriptor(x: Tensor, rows: int, columns: int, swizzle: int = 128) -> TensorDescriptor:
    """Blocks of rows of one head of x [slots, heads, rows, dim]. Raises ValueError where TMA cannot read from its address."""
    if x.data_ptr() % 16:
        raise ValueError(f"q, k, v: expected memory that begins at a multiple of 16 bytes, as TMA needs, got "
                         f'{x.data_ptr():#x}: pass .clone(), or backend="triton"')
    bits = 8 * x.itemsize
    least = 128 // bits                 # any that TMA accepts, where a dimension has one entry, whose stride means nothing
    steps = [least if size == 1 else step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*steps, 1], [1, 1, rows, columns], gl.NVMMASharedLayout(swizzle, bits, rank=4))


def vector(x: Tensor, length: int) -> TensorDescriptor:
    """Blocks of the elements of x, in the order in which they lie in memory."""
    return TensorDescriptor(x, [x.numel()], [1], [length], gl.NVMMASharedLayout(0, 8 * x.itemsize, rank=1))


L2 = 24 * 2**20                         # bytes for keys and values, half of an H100's L2 cache


def heads_together(problem: Problem) -> int:
    """Query heads whose blocks are worked on together: so many that their keys and values stay in the L2 cache; a divisor of
    all of them."""
    heads = problem.batch * problem.heads
    each = 2 * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    most = max(1, L2 // max(1, each)) * problem.group
    return next(n for n in range(min(most, heads), 0, -1) if heads % n == 0)
