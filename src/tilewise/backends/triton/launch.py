"""From a problem to kernel launches: what is allocated, what each kernel is told, on which grid."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs
from tilewise.backends.triton import backward_kernels as bwd
from tilewise.backends.triton.configs import Config, architecture, choose, parts, precision
from tilewise.backends.triton.entry import entry, flatten
from tilewise.backends.triton.forward_kernel import forward as forward_kernel
from tilewise.problem import Operands, Problem
from tilewise.state import sink_gradient
from tilewise.trace.evaluate import leaf_values, slot_values
from tilewise.trace.learned import Learned, from_offset_tiles, gather, sums_shape
from tilewise.trace.tile_lists import Question, tile_list

Run = Callable[[Any, Problem, Callable[[Config], int], Mapping[str, Any]], None]


def run(kernel: Any, problem: Problem, programs: Callable[[Config], int], values: Mapping[str, Any]) -> None:
    """Launches `kernel` in the configuration chosen for this device on a grid of programs(configuration).

    values: the kernel's arguments by name, except the sizes that problem and configuration give.
    """
    config = choose(config_name(kernel, values), problem, architecture(problem.device))
    grid = programs(config)
    if grid == 0:
        return
    bias = values.get("BIAS")
    if bias is not None and bias.itemsize > values["Q"].itemsize:  # rows are judged with a bias as wide as the inputs
        config = config._replace(num_stages=1)
    flat = flatten(kernel, problem.program, {**values, **settled(problem, values, config)})
    # Triton launches on the current device, whatever device the tensors are on
    with torch.cuda.device(problem.device) if problem.device.type == "cuda" else contextlib.nullcontext():
        entry(kernel, problem.program, values.get("LOOKUP"))[(grid,)](
            **flat, num_warps=config.num_warps, num_stages=config.num_stages)


def settled(problem: Problem, values: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The arguments of a kernel that follow from the configuration."""
    return constants(problem, config) | (values["visits"](config) if "visits" in values else {})


def visits(problem: Problem, x: Operands, transposed: bool = False, ascending: bool = False) -> Callable[[Config], dict]:
    """How blocks of queries, or of keys if `transposed`, find the tiles they visit (`masking.visits`)."""
    graphs = problem.graphs
    bands = graphs.queries if transposed else graphs.keys

    def of(config: Config) -> dict[str, Any]:
        if graphs.mask is None or not graphs.listed:
            return dict(VISIT=len(bands) // 4, LIST=None)
        listed = tile_list(Question(
            problem.program, graphs.mask, tuple(x.ints), tuple(x.floats), problem.batch, problem.heads,
            (problem.seqlen_q, problem.seqlen_k), (config.BLOCK_M, config.BLOCK_N), transposed, ascending, problem.device),
            x.captured)
        own = ("b" if listed.per_batch else "") + ("h" if listed.per_head else "")
        return dict(VISIT=f"list {own}".strip(), LIST=listed.tiles)

    return of


def config_name(kernel: Any, values: Mapping[str, Any]) -> str:
    """What the table of configurations calls a kernel."""
    return kernel.fn.__name__ + values.get("PART", "")


def forward(problem: Problem, x: Operands, run: Run = run) -> tuple[Tensor, Tensor]:
    out = problem.empty(problem.heads, problem.seqlen_q, problem.head_dim_v)
    lse = problem.empty_lse()
    run(forward_kernel, problem, per_query_block(problem), arguments(problem, x) | dict(
        OUT=out, LSE=lse, SINKS=x.sinks, out_strides=strides(out), HAS_SINKS=problem.has_sinks,
        ASCENDING=int(problem.batch_invariant), visits=visits(problem, x, ascending=problem.batch_invariant)))
    return out, lse


def backward(problem: Problem, x: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
             needs: Needs, run: Run = run) -> Gradients:
    if dout.stride(3) != 1 and dout.shape[3] > 1:  # such as the expanded gradient of a sum
        dout = dout.contiguous()
    delta = problem.empty_lse()
    run(bwd.preprocess, problem, per_query_block(problem), dict(
        OUT=out, DO=dout, DLSE=None if dlse is None else dlse.contiguous(), DELTA=delta, out_strides=strides(out),
        do_strides=strides(dout), heads=problem.heads, nq=problem.seqlen_q, HAS_DLSE=dlse is not None))
    dq = problem.empty(problem.heads, problem.seqlen_q, problem.head_dim)
    dk = problem.empty(problem.kv_heads, problem.seqlen_k, problem.head_dim)
    dv = problem.empty(problem.kv_heads, problem.seqlen_k, problem.head_dim_v)
    mode = bias_mode(problem, needs)
    dbias = _allocate_dbias(problem, x, mode)
    common = arguments(problem, x) | dict(DO=dout, LSE=lse, DELTA=delta, do_strides=strides(dout), DBIAS=dbias,
                                          dbias_strides=(0, 0, 0) if dbias is None else strides(dbias))
    for part in parts(problem):
        run(bwd.key_gradients, problem, per_key_block(problem), common | dict(
            DK=dk, DV_=dv, dk_strides=strides(dk), dv_strides=strides(dv), PART=part,
            visits=visits(problem, x, transposed=True),
            DBIAS_MODE=mode if mode == "over_rows" and part != " dv" else None))
    run(bwd.query_gradients, problem, per_query_block(problem), common | dict(
        DQ=dq, dq_strides=strides(dq), DBIAS_MODE=mode if mode in ("direct", "over_cols") else None,
        visits=visits(problem, x)))
    if mode == "summed" and x.bias is not None:
        summed(problem, x, common, "direct", x.bias.shape[:2], dbias, None, run)
    if dbias is not None and x.bias is not None:
        dbias = dbias.sum_to_size(x.bias.shape).to(x.bias.dtype)
    dsinks = sink_gradient(x.sinks, lse, delta) if needs.sinks and x.sinks is not None else None
    return Gradients(dq, dk, dv, dbias, dsinks, captured_gradients(problem, x, common, needs, run))


def summed(problem: Problem, x: Operands, common: Mapping[str, Any], pattern: str, leading: Sequence[int], sums: Tensor | None,
           lookup: int | None, run: Run, scale: Tensor | None = None) -> None:
    """Launches `summed_gradient`. leading: sequences and heads that have sums of their own; all others share them."""
    batch, heads = leading

    def programs(c: Config) -> int:
        m, n = blocks(problem.seqlen_q, c.BLOCK_M), blocks(problem.seqlen_k, c.BLOCK_N)
        per_head = {"direct": m * n, "cols": n, "diagonal": tile_offsets(problem, c)}.get(pattern, m)
        return batch * heads * per_head

    run(bwd.summed_gradient, problem, programs, dict(
        common, PATTERN=pattern, LOOKUP=lookup, SUMS=sums, SCALE=scale, VISIT=len(problem.graphs.keys) // 4,
        sums_bias_strides=(0, 0, 0) if sums is None or sums.dim() < 4 else strides(sums),
        sum_batch=problem.batch // max(1, batch), sum_heads=problem.heads // heads))


def captured_gradients(problem: Problem, x: Operands, common: Mapping[str, Any], needs: Needs, run: Run) -> list[Tensor | None]:
    """The gradient of each captured tensor that needs one."""
    found: list[Tensor | None] = [None] * len(x.captured)
    for number, lookup in enumerate(problem.graphs.learned):
        if lookup.slot < len(needs.captured) and needs.captured[lookup.slot]:
            table = x.captured[lookup.slot]
            grad = lookup_gradient(problem, x, common, number, lookup, table, run).to(table.dtype)
            before = found[lookup.slot]
            found[lookup.slot] = grad if before is None else before + grad
    return found


def lookup_gradient(problem: Problem, x: Operands, common: Mapping[str, Any], number: int, lookup: Learned, table: Tensor,
                    run: Run) -> Tensor:
    """The gradient of a table by one of its lookups, fp32."""
    batch, heads, nq, nk = problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k
    everyone, device = (batch, heads), problem.device
    values = leaf_values(slot_values(x.captured, x.ints, x.floats), batch, heads, nq, nk, device)
    pattern = lookup.pattern
    if pattern == "any":
        largest = torch.zeros((batch, heads, nq), device=device)
        summed(problem, x, common, "largest", everyone, largest, number, run)
        scale = fixed_point_scale(largest, batch * heads * nq * nk)
        total = torch.zeros(table.untyped_storage().nbytes() // table.itemsize, dtype=torch.int64, device=device)
        entries = total.as_strided(table.shape, table.stride())
        summed(problem, x, common, "any", everyone, entries, number, run, scale)
        return (entries.double() / scale.double()).float()
    if pattern == "diagonal":
        config = choose("summed_gradient", problem, architecture(device))
        sums = torch.zeros((batch, heads, tile_offsets(problem, config), config.BLOCK_M, config.BLOCK_N), device=device)
        summed(problem, x, common, pattern, everyone, sums, number, run)
        return gather(lookup, from_offset_tiles(sums, nq, nk), values, table).float()
    shape = sums_shape(lookup, table, batch, heads, nq, nk)
    sums = torch.zeros(shape, device=device)
    summed(problem, x, common, pattern, shape[:2], sums, number, run)
    return gather(lookup, sums, values, table).float()


def fixed_point_scale(largest: Tensor, terms: int) -> Tensor:
    """The power of two by which so many terms up to the largest can be multiplied so that their sum fits into 62 bits."""
    most = (largest.amax().double() * terms).clamp(min=2.0**-60)
    return torch.exp2((61 - most.log2().ceil()).clamp(-120, 120)).float()


def tile_offsets(problem: Problem, config: Config) -> int:
    """How many distances from the diagonal tiles have (`backward_kernels.offsets`)."""
    m, n = blocks(problem.seqlen_q, config.BLOCK_M), blocks(problem.seqlen_k, config.BLOCK_N)
    unit = min(config.BLOCK_M, config.BLOCK_N)
    return (m - 1) * (config.BLOCK_M // unit) + (n - 1) * (config.BLOCK_N // unit) + 1


def per_query_block(problem: Problem) -> Callable[[Config], int]:
    return lambda c: blocks(problem.seqlen_q, c.BLOCK_M) * problem.batch * problem.heads


def per_key_block(problem: Problem) -> Callable[[Config], int]:
    return lambda c: blocks(problem.seqlen_k, c.BLOCK_N) * problem.batch * problem.kv_heads


def bias_mode(problem: Problem, needs: Needs) -> str | None:
    """How dbias is computed; None: not needed.

    direct     bias has all four dimensions: the dQ kernel stores each tile
    over_rows  bias is the same for all queries: column sums in the dK, dV kernel
    over_cols  bias is the same for all keys: row sums in the dQ kernel
    summed     bias is shared by sequences or heads: a kernel of its own adds them up
    """
    if not needs.bias or problem.bias_shape is None:
        return None
    batch, heads, rows, cols = problem.bias_shape
    if rows == 1:
        return "over_rows"
    if cols == 1:
        return "over_cols"
    return "direct" if (batch, heads) == (problem.batch, problem.heads) else "summed"


def _allocate_dbias(problem: Problem, x: Operands, mode: str | None) -> Tensor | None:
    device = problem.device
    if x.bias is None:
        return None
    if mode == "over_rows":
        return torch.empty((problem.batch, problem.heads, 1, problem.seqlen_k), dtype=torch.float32, device=device)
    if mode == "over_cols":
        return torch.empty((problem.batch, problem.heads, problem.seqlen_q, 1), dtype=torch.float32, device=device)
    if mode == "direct":  # tiles that no query sees are never stored
        return torch.zeros(x.bias.shape, dtype=x.bias.dtype, device=device)
    return torch.empty(x.bias.shape, dtype=x.bias.dtype, device=device) if mode == "summed" else None


def arguments(problem: Problem, x: Operands) -> dict[str, Any]:
    """What all attention kernels are told about a problem."""
    natural = problem.dtype == torch.float32
    raw = not natural and problem.graphs.score is None and x.bias is None and 1e-30 < problem.scale < 1e30
    return dict(
        Q=x.q, K=x.k, V=x.v, BIAS=x.bias, RNG=x.rng, q_strides=strides(x.q), k_strides=strides(x.k),
        v_strides=strides(x.v), bias_strides=bias_strides(x.bias), scale=problem.scale, heads=problem.heads,
        group=problem.group, nq=problem.seqlen_q, nk=problem.seqlen_k, dropout=problem.dropout,
        captured=tuple(x.captured), ints=tuple(x.ints), floats=tuple(x.floats),
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


def constants(problem: Problem, config: Config) -> dict[str, Any]:
    return dict(D=problem.head_dim, DV=problem.head_dim_v, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
                BLOCK_D=padded(problem.head_dim), BLOCK_DV=padded(problem.head_dim_v), PRECISION=precision(problem))


@functools.cache
def padded(dim: int) -> int:
    """A head dim rounded up to a power of two, as tiles must be; at least 16, as tensor cores want."""
    return max(16, 1 << (dim - 1).bit_length())
