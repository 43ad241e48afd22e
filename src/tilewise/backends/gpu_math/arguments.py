"""What kernels are told about a problem, whichever GPU they are for."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from tilewise.backends.gpu_math.schedule import schedule
from tilewise.problem import Operands, Problem
from tilewise.sequences import all_rows
from tilewise.trace.tile_lists import Question, tile_list

# as Triton calls dtypes
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.bool: "i1", torch.uint8: "u8"}


class Tiles(Protocol):
    """A configuration: queries and keys of a tile."""

    @property
    def BLOCK_M(self) -> int: ...

    @property
    def BLOCK_N(self) -> int: ...


def arguments(problem: Problem, x: Operands) -> dict[str, Any]:
    """What all attention kernels are told about a problem."""
    return tensors(x) | numbers(problem, x)


def tensors(x: Operands) -> dict[str, Any]:
    """Of that the tensors."""
    k, v = (x.k, x.v) if x.k_scale is None else (x.k.view(torch.uint8), x.v.view(torch.uint8))
    return dict(Q=x.q, K=k, V=v, BIAS=x.bias, RNG=x.rng, Q_ROWS=x.q_rows, K_ROWS=x.k_rows, captured=x.captured)


def numbers(problem: Problem, x: Operands) -> dict[str, Any]:
    """And what follows from how they lie in memory."""
    natural = problem.dtype == torch.float32
    raw = not natural and problem.graphs.score is None and x.bias is None and 1e-30 < problem.scale < 1e30
    return dict(
        lse_rows=problem.rows_q[1], q_strides=strides(x.q), k_strides=strides(x.k), v_strides=strides(x.v),
        bias_strides=bias_strides(x.bias), scale=problem.scale, heads=problem.heads, group=problem.group, nq=problem.seqlen_q,
        nk=problem.seqlen_k, dropout=problem.dropout, ints=tuple(x.ints), floats=tuple(x.floats),
        BIAS_COLS=bias_cols(x.bias), DROPOUT=problem.dropout > 0, RAW=raw, NATURAL=natural)


def strides(x: Tensor) -> tuple[int, ...]:
    """(batch, head, row) strides; 0 where a dimension has one entry, whose stride means nothing."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))


def bias_cols(bias: Tensor | None) -> int | str | None:
    """The column stride where a kernel can be compiled for it, "any" otherwise, None without bias."""
    stride = bias_strides(bias)[3]
    return None if bias is None else stride if stride in (0, 1) else "any"


def blocks(n: int, block: int) -> int:
    return -(-n // block)


def visits(problem: Problem, x: Operands, transposed: bool = False, ascending: bool = False) -> Callable[[Any], dict]:
    """How blocks of queries, or of keys if `transposed`, find the tiles they visit (`masking.visits`)."""
    graphs = problem.graphs
    bands = graphs.queries if transposed else graphs.keys

    if graphs.mask is None or not graphs.listed:
        without = dict(VISIT=len(bands) // 4, LIST=None)
        return lambda config: without

    def of(config: Tiles) -> dict[str, Any]:
        listed = tile_list(Question(
            problem.program, graphs.mask, tuple(x.ints), tuple(x.floats), problem.batch, problem.heads,
            (problem.seqlen_q, problem.seqlen_k), (config.BLOCK_M, config.BLOCK_N), transposed, ascending, problem.device),
            x.captured, all_rows(problem, x) if problem.unequal else None)
        own = ("b" if listed.per_batch else "") + ("h" if listed.per_head else "")
        return dict(VISIT=f"list {own}".strip(), LIST=listed.tiles)

    return of


def work(problem: Problem, x: Operands, block: str, rows_per_row: int = 1, keys: bool = False) -> Callable[[Any], dict]:
    """The blocks of packed queries, or keys, in the order in which they are worked on; nothing for others."""
    rows, others, packed = (x.k_rows, x.q_rows, problem.packed_k) if keys else (x.q_rows, x.k_rows, problem.packed_q)
    if packed is None or rows is None or others is None:
        return lambda config: dict(WORK=None)
    return lambda config: dict(WORK=schedule(rows, others, packed, getattr(config, block), rows_per_row))


def in_all(packed: int | None, seqlen: int, batch: int, rows_per_row: int, block: int) -> int:
    """Blocks of all sequences; of packed ones as many as `schedule` has."""
    if packed is not None:
        return packed * rows_per_row // block + batch if batch else 0
    return blocks(seqlen * rows_per_row, block) * batch


@functools.cache
def padded(dim: int) -> int:
    """A head dim rounded up to a power of two, as tiles must be; at least 16, as tensor cores want."""
    return max(16, 1 << (dim - 1).bit_length())
