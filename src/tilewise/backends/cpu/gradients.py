"""The backward kernel's call, and what sums become: gradients of bias and captured tensors."""
from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs
from tilewise.backends.cpu import launch, sizes, threads
from tilewise.backends.cpu.abi import KINDS, Compiled
from tilewise.problem import Operands, Problem
from tilewise.sequences import all_lengths
from tilewise.state import sink_gradient
from tilewise.trace.evaluate import leaf_values, slot_values
from tilewise.trace.learned import Learned, contiguous_tables, gather, sums_shape

BY_ENTRY, BY_KEY, BY_QUERY, DIAGONAL, ANY = range(5)    # terms.h: Pattern
PATTERNS = {"direct": BY_ENTRY, "cols": BY_KEY, "rows": BY_QUERY, "diagonal": DIAGONAL, "any": ANY}


def backward(problem: Problem, x: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
             needs: Needs) -> Gradients:
    dout = launch.with_rows(dout)
    tables, ints = contiguous_tables(problem.graphs.learned, x.captured, x.ints)
    x = x._replace(captured=tables, ints=ints)
    dq, dk, dv = problem.new_q(problem.head_dim), problem.new_k(problem.head_dim), problem.new_k(problem.head_dim_v)
    delta = torch.zeros_like(lse)
    of_bias = bias_sums(problem, x) if needs.bias and x.bias is not None else None
    wanted = [lookup if lookup.slot < len(needs.captured) and needs.captured[lookup.slot] else None
              for lookup in problem.graphs.learned]
    of_tables = [table_sums(problem, x, lookup) if lookup is not None else None for lookup in wanted]
    numbers = sizes.backward(problem, **kinds([of_bias, *of_tables])) | of_bias_numbers(of_bias)
    arrays = (ctypes.c_void_p * len(wanted))(*(None if sums is None else sums.tensor.data_ptr() for sums in of_tables)), \
        (ctypes.c_long * (4 * len(wanted)))(*(n for sums in of_tables for n in launch.in_elements(sums and sums.by_entry))), \
        (ctypes.c_long * len(wanted))(*(0 if sums is None else sums.tensor[0].numel() for sums in of_tables))
    if problem.batch and (problem.seqlen_q or problem.seqlen_k):
        launch.call("backward", problem, x, dict(
            out=out, lse=lse, dout=dout, dlse=None if dlse is None else dlse.contiguous(), delta=delta, dq=dq, dk=dk, dv=dv,
            dbias=None if of_bias is None else of_bias.tensor), dict(
            out_strides=out, dout_strides=dout, dq_strides=dq, dk_strides=dk, dv_strides=dv,
            dbias_strides=of_bias and of_bias.by_entry), numbers,
            dict(zip(("sums", "sums_strides", "sums_sizes"), arrays, strict=True)), Compiled(paired=launch.paired(x)))
    dsinks = sink_gradient(x.sinks, lse, delta) if needs.sinks and x.sinks is not None else None
    return Gradients(dq, dk, dv, bias_gradient(problem, x, of_bias), dsinks, captured_gradients(problem, x, wanted, of_tables))


def prepared(problem: Problem, x: Operands, out: Tensor, dout: Tensor) -> Callable[..., None] | None:
    """The backward of operands and results that lie in memory like these, where it adds nothing up beside dq, dk and dv."""
    if problem.graphs.learned or not (problem.batch and (problem.seqlen_q or problem.seqlen_k)):
        return None
    dq, dk, dv = problem.new_q(problem.head_dim), problem.new_k(problem.head_dim), problem.new_k(problem.head_dim_v)
    return launch.Launch("backward", problem, x, dict(
        out_strides=out, dout_strides=dout, dq_strides=dq, dk_strides=dk, dv_strides=dv),
        sizes.backward(problem, shared=False, listed=False), compiled=Compiled(paired=launch.paired(x)))


class Sums(NamedTuple):
    """Sums that the kernel adds to (terms.h).

    shared: entries that several units add to; listed: one for each list of jobs, the first dimension.
    """
    tensor: Tensor
    pattern: int
    shared: bool = False

    @property
    def listed(self) -> bool:
        return self.pattern in (BY_QUERY, DIAGONAL, ANY)

    @property
    def by_entry(self) -> Tensor | None:
        return self.tensor if self.pattern == BY_ENTRY else None

    def total(self, problem: Problem) -> Tensor:
        """The sums over all lists, without what stands for keys that are not there."""
        sums = self.tensor.sum(0) if self.listed else self.tensor
        if self.pattern == BY_KEY:
            return sums[:, :, None, :problem.seqlen_k]
        if self.pattern == DIAGONAL:
            return sums[:, :, padded(problem) - problem.seqlen_k:]
        return sums[..., None] if self.pattern == BY_QUERY else sums


def kinds(all_sums: Sequence[Sums | None]) -> dict[str, bool]:
    """What kinds there are among them."""
    return {kind: any(sums is not None and getattr(sums, kind) for sums in all_sums) for kind in ("shared", "listed")}


def padded(problem: Problem) -> int:
    return -(-problem.seqlen_k // sizes.PANEL) * sizes.PANEL


def bias_sums(problem: Problem, x: Operands) -> Sums:
    assert x.bias is not None
    batch, heads, rows, cols = x.bias.shape
    if (rows, cols) == (problem.seqlen_q, problem.seqlen_k) or (rows > 1 and cols > 1):
        own = (batch, heads) == (problem.batch, problem.heads)
        return Sums(torch.zeros(x.bias.shape, dtype=x.bias.dtype if own else torch.float32), BY_ENTRY, shared=not own)
    return new_sums(problem, BY_KEY if rows == 1 else BY_QUERY)


def of_bias_numbers(of_bias: Sums | None) -> dict[str, int]:
    """Fields of `abi.Problem`."""
    if of_bias is None:
        return {}
    return dict(bias_pattern=of_bias.pattern, dbias_kind=KINDS[of_bias.tensor.dtype] if of_bias.pattern == BY_ENTRY else 0)


def bias_gradient(problem: Problem, x: Operands, of_bias: Sums | None) -> Tensor | None:
    """In the shape and dtype of the bias."""
    return None if of_bias is None or x.bias is None else of_bias.total(problem).sum_to_size(x.bias.shape).to(x.bias.dtype)


def new_sums(problem: Problem, pattern: int) -> Sums:
    each = problem.batch, problem.heads
    if pattern == BY_KEY:
        return Sums(torch.zeros(*each, padded(problem)), pattern)
    last = problem.seqlen_q if pattern == BY_QUERY else problem.seqlen_q + padded(problem) - 1
    return Sums(torch.zeros(threads.count(), *each, last), pattern)


def table_sums(problem: Problem, x: Operands, lookup: Learned) -> Sums:
    pattern, table = PATTERNS[lookup.pattern], x.captured[lookup.slot]
    if pattern == ANY:
        return Sums(torch.zeros(threads.count(), *table.shape, dtype=torch.float64), pattern)
    if pattern != BY_ENTRY:
        return new_sums(problem, pattern)
    shape = sums_shape(lookup, table, problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k)
    return Sums(torch.zeros(shape), pattern, shared=shape[:2] != (problem.batch, problem.heads))


def captured_gradients(problem: Problem, x: Operands, wanted: Sequence[Learned | None],
                       of_tables: Sequence[Sums | None]) -> list[Tensor | None]:
    """The gradient of each captured tensor that needs one."""
    found: list[Tensor | None] = [None] * len(x.captured)
    values = leaf_values(slot_values(x.captured, x.ints, x.floats), problem.batch, problem.heads, *all_lengths(problem, x))
    for lookup, sums in zip(wanted, of_tables, strict=True):
        if lookup is None or sums is None:
            continue
        table = x.captured[lookup.slot]
        total = sums.total(problem)
        if lookup.pattern in ("rows", "cols"):
            total = total.flatten(2)
        grad = gather(lookup, total, values, table, problem.seqlen_k).to(table.dtype)
        before = found[lookup.slot]
        found[lookup.slot] = grad if before is None else before + grad
    return found
