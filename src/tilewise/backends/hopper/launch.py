"""From a problem to kernel launches: descriptors, what is allocated, on which grid."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise.backends import Gradients, Needs
from tilewise.backends.gpu_math.arguments import arguments, blocks, in_all, padded, strides, visits, work
from tilewise.backends.gpu_math.entry import entry, flatten
from tilewise.backends.gpu_math.launches import start as begin
from tilewise.backends.gpu_math.splits import multiprocessors
from tilewise.backends.hopper import configs
from tilewise.backends.hopper.backward_kernel import backward as backward_kernel
from tilewise.backends.hopper.configs import Config, choose, passes
from tilewise.backends.hopper.forward_kernel import forward as forward_kernel
from tilewise.backends.hopper.preprocess import preprocess
from tilewise.backends.hopper.products import ROWS
from tilewise.backends.hopper.query_gradients_kernel import query_gradients
from tilewise.backends.hopper.turned_values import turn_values
from tilewise.problem import Operands, Problem, aligned
from tilewise.state import sink_gradient

Start = Callable[[Any, Problem, int, Mapping[str, Any], int], None]
WARPS = 4                               # of the first partition; the others say how many they have


def start(kernel: Any, problem: Problem, programs: int, values: Mapping[str, Any], warps: int) -> None:
    """Launches a kernel on the device of the problem, whichever is current."""
    options = {name: values[name] for name in ("maxnreg",) if name in values}       # registers of a thread at first
    begin(entry(kernel, problem.program), (programs,), flatten(kernel, problem.program, values), problem.device,
          num_warps=warps, **options)


def forward(problem: Problem, x: Operands, start: Start = start) -> tuple[Tensor, Tensor]:
    out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
    c = choose(configs.forward(problem), problem)
    told = arguments(problem, x)
    values = turned(problem, x, c, start) if problem.quantized else x.v
    (pieces, columns), (pieces_v, columns_v) = pieces_of(problem.head_dim), pieces_of(problem.head_dim_v)
    items = query_blocks(problem, c)
    programs = min(items, multiprocessors(problem.device)) if c.PERSISTENT else items
    start(forward_kernel, problem, programs, dict(
        q_desc=descriptor(x.q, ROWS.value, columns), k_desc=descriptor(x.k, c.BLOCK_N, columns),
        v_desc=descriptor(values, *((columns_v, c.BLOCK_N) if problem.quantized else (c.BLOCK_N, columns_v))),
        o_desc=descriptor(out, ROWS.value, columns_v), OUT=out, LSE=lse, **scales(problem, x),
        SINKS=x.sinks, COUNTER=torch.zeros(1, dtype=torch.int32, device=problem.device) if c.PERSISTENT else None,
        out_strides=strides(out), together=heads_together(problem), items=items, HAS_SINKS=problem.has_sinks,
        HIDES=hides(problem, x), DV=problem.head_dim_v, BLOCK_D=columns, D_PIECES=pieces, BLOCK_DV=columns_v,
        DV_PIECES=pieces_v, PINGPONG=bool(c.PINGPONG), EARLY_K_WAIT=bool(c.EARLY_WAIT), PERSISTENT=bool(c.PERSISTENT),
        O_APART=output_apart(c, pieces * columns, pieces_v * columns_v, x.q.itemsize), CONSUMER_REGISTERS=c.CONSUMER_REGISTERS,
        **common(told, c), **work(problem, x, "BLOCK_M")(c), **visits(problem, x)(c)), WARPS)
    return out, lse


def scales(problem: Problem, x: Operands) -> dict[str, Tensor | None]:
    """Of fp8 inputs, [B, H_kv] each."""
    given = dict(Q_SCALE=x.q_scale, K_SCALE=x.k_scale, V_SCALE=x.v_scale)
    if not problem.quantized:
        return dict.fromkeys(given)
    ones = None if all(s is not None for s in given.values()) else torch.ones(
        problem.batch, problem.kv_heads, device=problem.device)
    return {name: ones if s is None else s.contiguous() for name, s in given.items()}


def turned_shape(problem: Problem, block: int) -> tuple[int, int, int, int]:
    """[slots, H_kv, D_v, columns]. Rows that TMA reads are multiples of 16 bytes; packed sequences begin at multiples of a tile
    of so many keys."""
    columns = blocks(problem.seqlen_k, 16) * 16 if problem.packed_k is None else (
        (problem.packed_k // block + problem.batch) * block)
    return problem.rows_k[0], problem.kv_heads, problem.head_dim_v, columns


def turned(problem: Problem, x: Operands, c: Config, start: Start) -> Tensor:
    """Values as `turned_values.py` says, for tiles of a configuration."""
    new = torch.empty(turned_shape(problem, c.BLOCK_N), dtype=x.v.dtype, device=problem.device)
    programs = in_all(problem.packed_k, problem.seqlen_k, problem.batch, 1, c.BLOCK_N) * problem.kv_heads
    start(turn_values, problem, programs, dict(
        V=x.v.view(torch.uint8), TURNED=new.view(torch.uint8), K_ROWS=x.k_rows, v_strides=strides(x.v),
        turned_strides=strides(new), heads=problem.kv_heads, nk=problem.seqlen_k, columns=new.shape[3], DV=problem.head_dim_v,
        BLOCK_N=c.BLOCK_N, BLOCK_DV=padded(problem.head_dim_v), **work(problem, x, "BLOCK_N", keys=True)(c)), 4)
    return new


def backward(problem: Problem, x: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needs: Needs,
             start: Start = start) -> Gradients:
    if not aligned(dout):               # such as the expanded gradient of a sum
        dout = dout.contiguous()
    told, subtrahend, delta = arguments(problem, x), torch.empty_like(lse), torch.empty_like(lse)
    parts = passes(problem)
    c = choose(parts[-1], problem)
    start(preprocess, problem, query_blocks(problem, c), dict(
        OUT=out, DO=dout, DLSE=None if dlse is None else dlse.contiguous(), LSE=lse, SUBTRAHEND=subtrahend, DELTA=delta,
        Q_ROWS=x.q_rows, out_strides=strides(out), do_strides=strides(dout), heads=problem.heads, nq=problem.seqlen_q,
        lse_rows=problem.rows_q[1], HAS_DLSE=dlse is not None, DV=problem.head_dim_v, BLOCK_M=c.BLOCK_M,
        BLOCK_DV=padded(problem.head_dim_v), **work(problem, x, "BLOCK_M")(c)), 4)
    dq, dk, dv = problem.new_q(problem.head_dim), problem.new_k(problem.head_dim), problem.new_k(problem.head_dim_v)
    sums = dq if "dq" in parts else torch.zeros(x.q.shape, dtype=torch.float32, device=problem.device)
    wide, wide_v = width(problem.head_dim), width(problem.head_dim_v)
    for part in parts:
        c = choose(part, problem)
        rows = ROWS.value if part == "dq" else c.BLOCK_M
        values = common(told, c) | dict(
            q_desc=descriptor(x.q, rows, wide), k_desc=descriptor(x.k, c.BLOCK_N, wide),
            v_desc=descriptor(x.v, c.BLOCK_N, wide_v), do_desc=descriptor(dout, rows, wide_v),
            dq_desc=descriptor(sums, rows, wide), D=problem.head_dim, BLOCK_D=wide, BLOCK_DV=wide_v)
        if part == "dq":
            start(query_gradients, problem, query_blocks(problem, c), values | dict(
                DQ=dq, LSE=subtrahend, DELTA=delta, dq_strides=strides(dq), together=heads_together(problem),
                HIDES=hides(problem, x), EARLY_K_WAIT=bool(c.EARLY_WAIT), CONSUMER_REGISTERS=c.CONSUMER_REGISTERS,
                **work(problem, x, "BLOCK_M")(c), **visits(problem, x)(c)), WARPS)
        else:
            key_blocks = in_all(problem.packed_k, problem.seqlen_k, problem.batch, 1, c.BLOCK_N) * problem.kv_heads
            start(backward_kernel, problem, key_blocks, values | dict(
                lse_desc=vector(subtrahend, c.BLOCK_M), delta_desc=vector(delta, c.BLOCK_M),
                dk_desc=descriptor(dk, c.BLOCK_N, wide, 64), dv_desc=descriptor(dv, c.BLOCK_N, wide_v, 64), DK=dk, DV_=dv,
                dk_strides=strides(dk), dv_strides=strides(dv), DV=problem.head_dim_v, PART=part,
                EARLY_Q_WAIT=bool(c.EARLY_WAIT), **work(problem, x, "BLOCK_N", keys=True)(c),
                **visits(problem, x, transposed=True)(c)), 8)
    if sums is not dq:
        torch.mul(sums, problem.scale, out=dq)
    dsinks = sink_gradient(x.sinks, lse, delta) if needs.sinks and x.sinks is not None else None
    return Gradients(dq, dk, dv, None, dsinks, [None] * len(x.captured))


NAMES = ("scale", "heads", "group", "nq", "nk", "lse_rows", "captured", "ints", "floats", "Q_ROWS", "K_ROWS", "RAW", "RNG",
         "dropout", "DROPOUT")


def common(told: Mapping[str, Any], c: Config) -> dict[str, Any]:
    """What all kernels are told about a problem and a configuration."""
    return {name: told[name] for name in NAMES} | dict(
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, STAGES=c.STAGES, PRODUCER_REGISTERS=c.PRODUCER_REGISTERS)


def query_blocks(problem: Problem, c: Config) -> int:
    return in_all(problem.packed_q, problem.seqlen_q, problem.batch, 1, c.BLOCK_M) * problem.heads


def hides(problem: Problem, x: Operands) -> bool:
    """Whether there may be keys, another sequence's or padding, whose values must not reach a sum even times 0."""
    between = problem.packed_k is not None and not problem.quantized    # `turned_values.py` leaves room, filled with 0
    return between or bool(x.captured)


def width(dim: int) -> int:
    """Columns of a tile: TMA fills those beyond `dim` with 0."""
    return max(64, padded(dim))


def pieces_of(dim: int) -> tuple[int, int]:
    """(number, columns) of the tiles that rows are cut into: powers of two, so few that none is empty."""
    blocks = -(-dim // 64)
    return (3, 64) if blocks == 3 else (1, width(dim))


SHARED_MEMORY = 232448 - 1024           # bytes, without what barriers and messages take


def output_apart(c: Config, columns: int, columns_v: int, itemsize: int) -> bool:
    """Whether the forward kernel's output, in 16 bits, has shared memory of its own: where Q's is too small for it, and where
    another item can use Q's meanwhile, if there is room. itemsize: bytes of an entry of q, k and v."""
    keys = c.STAGES * c.BLOCK_N * (columns + columns_v)
    fits = itemsize * (keys + c.BLOCK_M * columns) + 2 * c.BLOCK_M * columns_v <= SHARED_MEMORY
    return itemsize * columns < 2 * columns_v or bool(c.PERSISTENT and fits)


def descriptor(x: Tensor, rows: int, columns: int, widest: int = 128) -> TensorDescriptor:
    """Blocks of rows of one head of x [slots, heads, rows, dim]. Raises ValueError where TMA cannot read from its address."""
    if x.data_ptr() % 16:
        raise ValueError(f"q, k, v: expected memory that begins at a multiple of 16 bytes, as TMA needs, got "
                         f'{x.data_ptr():#x}: pass .clone(), or backend="triton"')
    bits = 8 * x.itemsize
    least = 128 // bits                 # any that TMA accepts, where a dimension has one entry, whose stride means nothing
    steps = [least if size == 1 else step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
    swizzle = min(widest, columns * x.itemsize)
    return TensorDescriptor(x, list(x.shape), [*steps, 1], [1, 1, rows, columns], gl.NVMMASharedLayout(swizzle, bits, rank=4))


def vector(x: Tensor, length: int) -> TensorDescriptor:
    """Blocks of the elements of x, in the order in which they lie in memory."""
    return TensorDescriptor(x, [x.numel()], [1], [length], gl.NVMMASharedLayout(0, 8 * x.itemsize, rank=1))


L2 = 24 * 2**20                         # bytes for keys and values, half of an H100's L2 cache


def heads_together(problem: Problem) -> int:
    """Query heads whose blocks are worked on together: so many that their keys and values stay in the L2 cache; a divisor of
    all of them."""
    heads = problem.batch * problem.heads
    each = (1 if problem.quantized else 2) * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    most = max(1, L2 // max(1, each)) * problem.group
    return next(n for n in range(min(most, heads), 0, -1) if heads % n == 0)
