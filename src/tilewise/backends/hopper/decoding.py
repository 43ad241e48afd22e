"""From a problem with few queries to the launches of `decode_kernel.py`: which problems, how many shares, how large rings."""
from __future__ import annotations

import math

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise.backends.gpu_math.arguments import arguments, padded, strides, visits
from tilewise.backends.gpu_math.splits import hide_unused, new_parts, planned
from tilewise.backends.hopper.configs import Config, choose
from tilewise.backends.hopper.decode_kernel import ROWS, WIDE
from tilewise.backends.hopper.decode_kernel import decode as decode_kernel
from tilewise.backends.hopper.launch import WARPS, Start, descriptor, start, width
from tilewise.backends.hopper.merge_kernel import merge
from tilewise.problem import MAX_SPLITS, Operands, Problem

REGISTERS, SHARED, RESERVED = 65536, 233472, 1024       # of a multiprocessor; bytes that each program takes beside its own
THREADS = 256                           # of a program
MERGED = 8192                           # elements of parts that a program reads at once

NAMES = ("Q", "Q_ROWS", "K_ROWS", "q_strides", "scale", "heads", "group", "nq", "nk", "lse_rows", "captured", "ints", "floats",
         "RAW")


def chosen(problem: Problem) -> Config:
    """The configuration for a problem."""
    return choose("decode" if problem.stored is None else "decode fp8", problem)


def splits(problem: Problem) -> int:
    """Shares of the keys."""
    config = chosen(problem)
    return planned(problem, config, together(problem, config))


def together(problem: Problem, config: Config) -> int:
    """Programs that a multiprocessor runs at a time."""
    of_registers = REGISTERS // (THREADS * registers(config))
    return max(1, min(of_registers, SHARED // (shared_bytes(problem, config) + RESERVED)))


def registers(config: Config) -> int:
    """Of a thread when a program starts: then the warpgroup of the consumer takes some from that of the producer."""
    return (config.CONSUMER_REGISTERS + config.PRODUCER_REGISTERS) // 2


def shared_bytes(problem: Problem, config: Config) -> int:
    """Of the tiles of a program."""
    wide, wide_v = width(problem.head_dim), width(problem.head_dim_v)
    tiles = config.BLOCK_N * (wide + wide_v)
    rings = 2 * config.STAGES * tiles if problem.stored is None else (config.STAGES + 2 * WIDE.value) * tiles
    return 2 * ROWS.value * wide + rings


def rows_together(problem: Problem, config: Config) -> int:
    """Rows of a tile of keys that lie together in memory."""
    return config.BLOCK_N if problem.page_size is None else math.gcd(problem.page_size, config.BLOCK_N)


def forward(problem: Problem, x: Operands, start: Start = start) -> tuple[Tensor, Tensor]:
    out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
    c, shares = chosen(problem), splits(problem)
    told = arguments(problem, x)
    values = {name: told[name] for name in NAMES} | visits(problem, x)(c) | dict(
        k_desc=panels(told["K"], rows_together(problem, c)), v_desc=panels(told["V"], rows_together(problem, c)), OUT=out,
        LSE=lse, SINKS=x.sinks, PAGES=x.pages, K_SCALE=x.k_scale, V_SCALE=x.v_scale, out_strides=strides(out),
        page_size=problem.page_size or 1, pages_row=0 if x.pages is None else x.pages.stride(0), splits=shares, out_split=0,
        lse_split=0, HAS_SINKS=problem.has_sinks, HIDES=problem.unequal or bool(x.captured), D=problem.head_dim,
        DV=problem.head_dim_v, BLOCK_N=c.BLOCK_N, BLOCK_D=width(problem.head_dim), BLOCK_DV=width(problem.head_dim_v),
        STAGES=c.STAGES, PRODUCER_REGISTERS=c.PRODUCER_REGISTERS, maxnreg=registers(c))
    programs = shares * problem.batch * problem.kv_heads
    if shares == 1:
        start(decode_kernel, problem, programs, values, WARPS)
        return out, lse
    parts = new_parts(problem, shares, problem.device)
    of_parts = dict(out_split=parts.out.stride(0), lse_split=parts.lse.stride(0))
    start(decode_kernel, problem, programs, values | of_parts | dict(
        OUT=parts.out, LSE=parts.lse, out_strides=strides(parts.out[0]), SINKS=None, HAS_SINKS=False), WARPS)
    slots, rows = problem.rows_q
    wide = padded(problem.head_dim_v)
    start(merge, problem, slots * problem.heads * rows, of_parts | dict(
        PARTS=parts.out, PART_LSE=parts.lse, SINKS=x.sinks, OUT=out, LSE=lse, out_strides=strides(out), heads=problem.heads,
        nq=rows, splits=shares, HAS_SINKS=problem.has_sinks, DV=problem.head_dim_v, BLOCK_DV=wide,
        ALL=MAX_SPLITS, BLOCK=MERGED // wide), WARPS)
    hide_unused(problem, x, lse)
    return out, lse


def panels(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor whose blocks are a panel of shared memory wide: what a swizzle spans, at most 128 bytes."""
    columns = min(width(x.shape[3]), 128 // x.itemsize)
    return descriptor(x, rows, columns, columns * x.itemsize)
