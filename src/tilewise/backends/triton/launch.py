"""From a problem to kernel launches: what is allocated, what each kernel is told, on which grid."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs
from tilewise.backends.gpu_math.arguments import arguments, blocks, in_all, numbers, padded, strides, tensors, visits, work
from tilewise.backends.gpu_math.entry import entry, flatten
from tilewise.backends.gpu_math.launches import Launch, start
from tilewise.backends.gpu_math.preprocess import preprocess
from tilewise.backends.gpu_math.splits import few_queries, folds, hide_unused, new_parts, planned
from tilewise.backends.triton import backward_kernels as bwd
from tilewise.backends.triton.configs import (
    Config,
    architecture,
    choose,
    forward_row,
    parts,
    precision,
    span_of,
)
from tilewise.backends.triton.forward_kernel import forward as forward_kernel
from tilewise.backends.triton.forward_kernel import merge as merge_kernel
from tilewise.backends.triton.key_mass_kernel import key_mass
from tilewise.problem import Operands, Problem
from tilewise.sequences import all_lengths
from tilewise.state import sink_gradient
from tilewise.statistics import Statistics, merge_rows
from tilewise.trace.evaluate import leaf_values, slot_values
from tilewise.trace.learned import Learned, contiguous_tables, from_offset_tiles, gather, sums_shape

NONE = Statistics()
Programs = Callable[[Config], tuple[int, ...]]
Run = Callable[[Any, Problem, Programs, Mapping[str, Any]], None]
Hold = Callable[[Any, Problem, Programs, Mapping[str, Any]], Callable[[dict[str, Any]], None]]


def run(kernel: Any, problem: Problem, programs: Programs, values: Mapping[str, Any]) -> None:
    """Launches `kernel` in the configuration chosen for this device on a grid of programs(configuration).

    values: the kernel's arguments by name, except the sizes that problem and configuration give.
    """
    run_in(choose(config_name(kernel, values), problem, architecture(problem.device)), kernel, problem, programs, values)


def run_in(config: Config, kernel: Any, problem: Problem, programs: Programs, values: Mapping[str, Any]) -> None:
    """The same in a configuration of the caller's."""
    grid = programs(config)
    if 0 in grid:
        return
    flat = flatten(kernel, problem.program, {**values, **settled(problem, values, config)})
    start(entry(kernel, problem.program, values.get("LOOKUP")), grid, flat, problem.device, **options(config, values))


def at_once(run: Run) -> Hold:
    """Launches whose tensors come later, each made anew."""
    return lambda kernel, problem, programs, values: lambda tensors: run(kernel, problem, programs, {**values, **tensors})


class Held:
    """A launch whose tensors come later, which is made again: all but the tensors is settled when it is first made.

    Where sequences are packed, or tiles come in lists, `work` and `visits` come with the tensors, and say anew which they are.
    A cache's table of pages comes with the length of its rows, which grow with the cache.
    """
    __slots__ = ("config", "kernel", "launches", "problem", "programs", "values")

    def __init__(self, kernel: Any, problem: Problem, programs: Programs, values: Mapping[str, Any]):
        self.kernel, self.problem, self.programs, self.values = kernel, problem, programs, values
        self.config = choose(config_name(kernel, values), problem, architecture(problem.device))
        self.launches: dict[int, Callable[[dict[str, Any]], None]] = {}     # by pages_row

    def __call__(self, tensors: dict[str, Any]) -> None:
        pages_row = tensors.get("pages_row", 0)
        launch = self.launches.get(pages_row)
        if launch is None:
            launch = self.launches[pages_row] = self.settle({**self.values, **tensors})
        for name in ("visits", "work"):
            if name in tensors:
                tensors |= tensors[name](self.config)
        launch(tensors)

    def settle(self, values: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
        grid, problem = self.programs(self.config), self.problem
        if 0 in grid:
            return lambda tensors: None
        return Launch(self.kernel, problem.program, grid, {**values, **settled(problem, values, self.config)}, problem.device,
                      **options(self.config, values))


def options(config: Config, values: Mapping[str, Any]) -> dict[str, int]:
    """Of Triton's compiler. Rows are judged with a bias as wide as the inputs."""
    bias = values.get("BIAS")
    wide = bias is not None and bias.itemsize > values["Q"].itemsize
    return dict(num_warps=config.num_warps, num_stages=1 if wide else config.num_stages)


def settled(problem: Problem, values: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The arguments of a kernel that follow from the configuration."""
    found = constants(problem, config)
    for name in ("visits", "work"):
        found |= values[name](config) if name in values else {}
    if values.get("SHARED"):
        found["BLOCK_D"] = padded(problem.head_dim - problem.head_dim_v)
    return found


def config_name(kernel: Any, values: Mapping[str, Any]) -> str:
    """What the table of configurations calls a kernel."""
    return values.get("ROW", kernel.fn.__name__) + values.get("PART", "")


class Forward:
    """The launches of a forward pass of operands and results that lie in memory like these."""

    def __init__(self, problem: Problem, x: Operands, out: Tensor, hold: Hold = Held):
        row, self.fold = forward_row(problem), folds(problem)
        self.problem, self.moves, self.merge = problem, moves(problem), None
        self.splits = splits_of(problem, choose(row, problem, architecture(problem.device)))
        per_block = per_query_block(problem, self.fold)
        values = numbers(problem, x) | dict(
            out_strides=strides(out), HAS_SINKS=problem.has_sinks, ROW=row, FOLD=self.fold, SHARED=problem.shared,
            CACHED=problem.cached, page_size=problem.page_size or 1,
            splits=self.splits, out_split=0, lse_split=0, SPLIT=False, ASCENDING=int(problem.batch_invariant))
        if not self.moves:
            values |= self.walk(x)
        if self.splits == 1:
            self.attend = hold(forward_kernel, problem, per_block, values)
            return
        parts = new_parts(problem, self.splits, torch.device("meta"))
        shares = dict(splits=self.splits, out_split=parts.out.stride(0), lse_split=parts.lse.stride(0))
        self.attend = hold(forward_kernel, problem, lambda c: (*per_block(c), self.splits), values | shares | dict(
            out_strides=strides(parts.out[0]), HAS_SINKS=False, SPLIT=True))
        slots, rows = problem.rows_q
        self.merge = hold(merge_kernel, problem, lambda c: (blocks(rows, c.BLOCK_M) * slots * problem.heads,), shares | dict(
            out_strides=strides(out), heads=problem.heads, nq=rows, HAS_SINKS=problem.has_sinks, NATURAL=values["NATURAL"]))

    def walk(self, x: Operands) -> dict[str, Any]:
        """Which tiles are visited, which blocks worked on."""
        problem = self.problem
        return dict(visits=visits(problem, x, ascending=problem.batch_invariant),
                    work=work(problem, x, "BLOCK_M", problem.group if self.fold else 1))

    def __call__(self, x: Operands, out: Tensor, lse: Tensor | None = None, found: Statistics = NONE) -> None:
        """out and lse, and max_score and entropy into `found`."""
        problem = self.problem
        lse = problem.new_lse() if lse is None else lse
        given = tensors(x) | dict(OUT=out, LSE=lse, MAX_SCORE=found.max_score, ENTROPY=found.entropy, SINKS=x.sinks,
                                  PAGES=x.pages, pages_row=0 if x.pages is None else x.pages.stride(0), K_SCALE=x.k_scale,
                                  V_SCALE=x.v_scale)
        if self.moves:
            given |= self.walk(x)
        if self.merge is None:
            self.attend(given)
            return
        parts, of_parts = new_parts(problem, self.splits, problem.device), found
        if found is not NONE:
            of_parts = Statistics(*(t if t is None else t.expand(self.splits, *t.shape).clone() for t in found[:2]))
        self.attend(given | dict(OUT=parts.out, LSE=parts.lse, MAX_SCORE=of_parts.max_score, ENTROPY=of_parts.entropy,
                                 SINKS=None))
        if found is not NONE:
            merge_rows(of_parts, parts.lse, into=found)
        self.merge(dict(PARTS=parts.out, PART_LSE=parts.lse, SINKS=x.sinks, OUT=out, LSE=lse))
        hide_unused(problem, x, lse)


def moves(problem: Problem) -> bool:
    """Whether tensors tell what is visited and worked on: those may be others, or hold something else, in a call like it."""
    return problem.graphs.listed or problem.packed_q is not None or problem.packed_k is not None


def forward(problem: Problem, x: Operands, run: Run = run, found: Statistics = NONE) -> tuple[Tensor, Tensor]:
    """out and lse; max_score and entropy go into `found`."""
    out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
    prepared(problem, x, out, at_once(run))(x, out=out, lse=lse, found=found)
    return out, lse


def prepared(problem: Problem, x: Operands, out: Tensor, hold: Hold = Held) -> Callable[..., None]:
    """The forward of operands and results that lie in memory like these: of operands, and of results by name."""
    return Forward(problem, x, out, hold) if problem.seqlen_q else lambda x, **results: None


def forward_with_statistics(problem: Problem, x: Operands, run: Run = run) -> tuple[Tensor, Tensor, Statistics]:
    found = problem.new_statistics()
    out, lse = forward(problem, x, run, found)
    if found.key_mass is not None:
        run(key_mass, problem, per_key_block(problem), arguments(problem, x) | dict(
            LSE=lse, MASS=found.key_mass, mass_rows=found.key_mass.shape[2], PAGES=x.pages, K_SCALE=x.k_scale,
            SHARED=problem.shared, CACHED=problem.cached, page_size=problem.page_size or 1,
            pages_row=0 if x.pages is None else x.pages.stride(0), visits=visits(problem, x, transposed=True),
            work=work(problem, x, "BLOCK_N", keys=True)))
    return out, lse, found


def splits_of(problem: Problem, config: Config) -> int:
    """How many shares the keys are cut into."""
    span = span_of(problem, config)
    if span:
        few = few_queries(problem)
        return blocks(problem.seqlen_k, span * config.BLOCK_N) if few else 1
    return planned(problem, config)


class Backward:
    """The launches of a backward pass of operands and results that lie in memory like these.

    gradients: dq, dk, dv and, computed in `mode` (`bias_mode`), dbias.
    """

    def __init__(self, problem: Problem, x: Operands, out: Tensor, dout: Tensor,
                 gradients: tuple[Tensor, Tensor, Tensor, Tensor | None], hold: Hold = Held, mode: str | None = None):
        dq, dk, dv, dbias = gradients
        self.problem, self.moves = problem, moves(problem)
        self.numbers = numbers(problem, x) | dict(
            do_strides=strides(dout), dbias_strides=(0, 0, 0) if dbias is None else strides(dbias))
        per_query = per_query_block(problem)
        walks = [{}, {}, {}] if self.moves else self.walks(x)
        of_delta = dict(out_strides=strides(out), do_strides=strides(dout), heads=problem.heads, nq=problem.seqlen_q,
                        lse_rows=problem.rows_q[1]) | walks[0]
        self.delta = {given: hold(preprocess, problem, per_query, of_delta | dict(HAS_DLSE=given)) for given in (False, True)}
        self.of_keys = [hold(bwd.key_gradients, problem, per_key_block(problem), self.numbers | walks[1] | dict(
            dk_strides=strides(dk), dv_strides=strides(dv), PART=part,
            DBIAS_MODE=mode if mode == "over_rows" and part != " dv" else None)) for part in parts(problem)]
        self.of_queries = hold(bwd.query_gradients, problem, per_query, self.numbers | walks[2] | dict(
            dq_strides=strides(dq), DBIAS_MODE=mode if mode in ("direct", "over_cols") else None))

    def walks(self, x: Operands) -> list[dict[str, Any]]:
        """What is visited and worked on: of delta, of keys, of queries."""
        problem = self.problem
        of_queries = work(problem, x, "BLOCK_M")
        return [dict(work=of_queries), dict(visits=visits(problem, x, transposed=True), work=work(
            problem, x, "BLOCK_N", keys=True)), dict(visits=visits(problem, x), work=of_queries)]

    def __call__(self, x: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor,
                 **gradients: Tensor | None) -> dict[str, Any]:
        """delta and gradients, dq, dk, dv and dbias, are written; the tensors that kernels were told of."""
        walks = self.walks(x) if self.moves else [{}, {}, {}]
        self.delta[dlse is not None](dict(OUT=out, DO=dout, DLSE=dlse, DELTA=delta, Q_ROWS=x.q_rows) | walks[0])
        given = tensors(x) | dict(DO=dout, LSE=lse, DELTA=delta, DQ=gradients["dq"], DK=gradients["dk"], DV_=gradients["dv"],
                                  DBIAS=gradients.get("dbias"))
        for launch in self.of_keys:
            launch(given | walks[1])
        self.of_queries(given | walks[2])
        return given


def prepared_backward(problem: Problem, x: Operands, out: Tensor, dout: Tensor) -> Callable[..., Any] | None:
    """The backward of operands and results that lie in memory like these, where it adds nothing up beside dq, dk and dv."""
    if problem.graphs.learned or problem.seqlen_q == 0:
        return None
    dq, dk, dv, _ = like(problem)
    return Backward(problem, x, out, dout, (dq, dk, dv, None))


def backward(problem: Problem, x: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
             needs: Needs, run: Run = run) -> Gradients:
    dq, dk, dv = problem.new_q(problem.head_dim), problem.new_k(problem.head_dim), problem.new_k(problem.head_dim_v)
    if problem.unequal and problem.seqlen_q == 0:
        dbias, dsinks, *captured = (t if t is None else torch.zeros_like(t) for t in (x.bias, x.sinks, *x.captured))
        return Gradients(dq, dk, dv, dbias, dsinks, captured)
    if dout.stride(3) != 1 and dout.shape[3] > 1:  # such as the expanded gradient of a sum
        dout = dout.contiguous()
    tables, ints = contiguous_tables(problem.graphs.learned, x.captured, x.ints)
    x = x._replace(captured=tables, ints=ints)
    delta, mode = torch.empty_like(lse), bias_mode(problem, needs)
    dbias = allocate_dbias(problem, x, mode)
    dlse = None if dlse is None else dlse.contiguous()
    launches = Backward(problem, x, out, dout, (dq, dk, dv, dbias), at_once(run), mode)
    given = launches(x, out=out, lse=lse, dout=dout, dlse=dlse, delta=delta, dq=dq, dk=dk, dv=dv, dbias=dbias)
    common = launches.numbers | given
    if mode == "summed" and x.bias is not None:
        summed(problem, x, common, "direct", x.bias.shape[:2], dbias, None, run)
    if dbias is not None and x.bias is not None:
        dbias = dbias.sum_to_size(x.bias.shape).to(x.bias.dtype)
    dsinks = sink_gradient(x.sinks, lse, delta) if needs.sinks and x.sinks is not None else None
    return Gradients(dq, dk, dv, dbias, dsinks, captured_gradients(problem, x, common, needs, run))


def like(problem: Problem) -> tuple[Tensor, ...]:
    """How dq, dk, dv and out lie in memory; without memory."""
    of = replace(problem, device=torch.device("meta"))
    return of.new_q(of.head_dim), of.new_k(of.head_dim), of.new_k(of.head_dim_v), of.new_q(of.head_dim_v)


def summed(problem: Problem, x: Operands, common: Mapping[str, Any], pattern: str, leading: Sequence[int], sums: Tensor | None,
           lookup: int | None, run: Run, scale: Tensor | None = None) -> None:
    """Launches `summed_gradient`. leading: sequences and heads that have sums of their own; all others share them."""
    batch, heads = leading

    def programs(c: Config) -> tuple[int, ...]:
        m, n = blocks(problem.seqlen_q, c.BLOCK_M), blocks(problem.seqlen_k, c.BLOCK_N)
        per_head = {"direct": m * n, "cols": n, "diagonal": tile_offsets(problem, c)}.get(pattern, m)
        return (batch * heads * per_head,)

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
    values = leaf_values(slot_values(x.captured, x.ints, x.floats), batch, heads, *all_lengths(problem, x), device)
    pattern = lookup.pattern
    if pattern == "any":
        largest = torch.zeros((batch, heads, nq), device=device)
        summed(problem, x, common, "largest", everyone, largest, number, run)
        scale = fixed_point_scale(largest, batch * heads * nq * nk)
        entries = torch.zeros(table.shape, dtype=torch.int64, device=device)
        summed(problem, x, common, "any", everyone, entries, number, run, scale)
        return (entries.double() / scale.double()).float()
    if pattern == "diagonal":
        config = choose("summed_gradient", problem, architecture(device))
        sums = torch.zeros((batch, heads, tile_offsets(problem, config), config.BLOCK_M, config.BLOCK_N), device=device)
        summed(problem, x, common, pattern, everyone, sums, number, run)
        return gather(lookup, from_offset_tiles(sums, nq, nk), values, table, nk).float()
    shape = sums_shape(lookup, table, batch, heads, nq, nk)
    sums = torch.zeros(shape, device=device)
    summed(problem, x, common, pattern, shape[:2], sums, number, run)
    return gather(lookup, sums, values, table, nk).float()


def fixed_point_scale(largest: Tensor, terms: int) -> Tensor:
    """The power of two by which so many terms up to the largest can be multiplied so that their sum fits into 62 bits."""
    most = (largest.amax().double() * terms).clamp(min=2.0**-60)
    return torch.exp2((61 - most.log2().ceil()).clamp(-120, 120)).float()


def tile_offsets(problem: Problem, config: Config) -> int:
    """How many distances from the diagonal tiles have (`backward_kernels.offsets`)."""
    m, n = blocks(problem.seqlen_q, config.BLOCK_M), blocks(problem.seqlen_k, config.BLOCK_N)
    unit = min(config.BLOCK_M, config.BLOCK_N)
    return (m - 1) * (config.BLOCK_M // unit) + (n - 1) * (config.BLOCK_N // unit) + 1


def per_query_block(problem: Problem, fold: bool = False) -> Callable[[Config], tuple[int, ...]]:
    heads, group = (problem.kv_heads, problem.group) if fold else (problem.heads, 1)
    return lambda c: (in_all(problem.packed_q, problem.seqlen_q, problem.batch, group, c.BLOCK_M) * heads,)


def per_key_block(problem: Problem) -> Callable[[Config], tuple[int, ...]]:
    return lambda c: (in_all(problem.packed_k, problem.seqlen_k, problem.batch, 1, c.BLOCK_N) * problem.kv_heads,)


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


def allocate_dbias(problem: Problem, x: Operands, mode: str | None) -> Tensor | None:
    device = problem.device
    new = torch.zeros if problem.unequal else torch.empty  # no one writes behind a sequence
    if x.bias is None:
        return None
    if mode == "over_rows":
        return new((problem.batch, problem.heads, 1, problem.seqlen_k), dtype=torch.float32, device=device)
    if mode == "over_cols":
        return new((problem.batch, problem.heads, problem.seqlen_q, 1), dtype=torch.float32, device=device)
    if mode == "direct":  # tiles that no query sees are never stored
        return torch.zeros(x.bias.shape, dtype=x.bias.dtype, device=device)
    return torch.empty(x.bias.shape, dtype=x.bias.dtype, device=device) if mode == "summed" else None


def constants(problem: Problem, config: Config) -> dict[str, Any]:
    return dict(SPAN=span_of(problem, config),
                D=problem.head_dim, DV=problem.head_dim_v, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
                BLOCK_D=padded(problem.head_dim), BLOCK_DV=padded(problem.head_dim_v), PRECISION=precision(problem))
