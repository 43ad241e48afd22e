"""Sequences of unequal length: where their rows lie, and the same problem one sequence at a time.

Rows are told as int32 [B, 3]: for each sequence its slot (an index of a tensor's first dimension), its first row and its
number of rows. Packed sequences (`cu_seqlens`) lie one after another in slot 0, those of a cache each in a slot, or in pages.
Kernels read this table on the device; `tiled` and `reference`, which walk sequences one by one, read it on the host.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.problem import Operands, Problem
from tilewise.statistics import Statistics
from tilewise.trace.memo import Memo, abstract

_rows = Memo()


def packed_rows(name: str, cu_seqlens: Tensor, seqused: Tensor | None, total: int, max_seqlen: int | None, device: torch.device,
                check: bool) -> tuple[Tensor, int]:
    """(rows, length of the longest) of packed sequences, checked.

    name: "q" or "k", for messages. cu_seqlens: integer [B + 1], from 0; seqused: integer [B] or None: rows in use of each.
    Values are looked at on the CPU, elsewhere with `check`, which waits for the device; without, where max_seqlen is not
    given, it is the total.
    """
    given = [(f"cu_seqlens_{name}", cu_seqlens), *([] if seqused is None else [(f"seqused_{name}", seqused)])]
    for label, x in given:
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64) or x.dim() != 1:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{label}: expected an int32 tensor of one dimension, got {got}")
        if x.device != device:
            raise ValueError(f"{label}: expected a tensor on q's device {device}, got {x.device}")
    if len(cu_seqlens) < 1 or (seqused is not None and len(seqused) != len(cu_seqlens) - 1):
        got = f"{len(cu_seqlens)} entries" + (f" with {len(given[1][1])} in {given[1][0]}" if seqused is not None else "")
        raise ValueError(f"cu_seqlens_{name}: expected one entry more than there are sequences, got {got}")
    integer = isinstance(max_seqlen, int) or hasattr(max_seqlen, "__index__")  # torch.compile knows only the first of its own
    if max_seqlen is not None and (isinstance(max_seqlen, (bool, Tensor)) or not integer or max_seqlen < 0):
        raise ValueError(f"max_seqlen_{name}: expected None or an integer >= 0, got {max_seqlen!r}")
    longest = total if max_seqlen is None else max_seqlen
    tensors = [x for _, x in given]
    if not abstract(*tensors) and (check or device.type == "cpu"):
        found = _rows.get(("longest", name, total), tensors, lambda: _checked(name, cu_seqlens, seqused, total))
        if max_seqlen is not None and found > max_seqlen:
            raise ValueError(f"max_seqlen_{name}: expected at least the longest sequence, {found}, got {max_seqlen}")
        longest = found if max_seqlen is None else max_seqlen
    return _rows.get(("rows",), tensors, lambda: _packed(cu_seqlens, seqused)), longest


def all_rows(problem: Problem, x: Operands) -> tuple[Tensor, Tensor]:
    """Of the queries and of the keys, also where one of them is dense: sequence b is then slot b."""
    def dense(n: int) -> Tensor:
        slots = torch.arange(problem.batch, dtype=torch.int32, device=problem.device)
        return torch.stack([slots, 0 * slots, 0 * slots + n], 1)

    return (dense(problem.seqlen_q) if x.q_rows is None else x.q_rows,
            dense(problem.seqlen_k) if x.k_rows is None else x.k_rows)


def all_lengths(problem: Problem, x: Operands) -> tuple[Any, Any]:
    """Queries and keys of each sequence: integers if all are equal, otherwise int64 [B, 1, 1, 1] each."""
    if not problem.unequal:
        return problem.seqlen_q, problem.seqlen_k
    q, k = (rows[:, 2, None, None, None].long() for rows in all_rows(problem, x))
    return q, k


def _packed(cu_seqlens: Tensor, seqused: Tensor | None) -> Tensor:
    starts = cu_seqlens[:-1].int()
    return torch.stack([torch.zeros_like(starts), starts, cu_seqlens.diff().int() if seqused is None else seqused.int()], 1)


def _checked(name: str, cu_seqlens: Tensor, seqused: Tensor | None, total: int) -> int:
    """The longest sequence, once all is found right."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] > total or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens_{name}: expected to rise from 0 to at most {name}'s {total} rows, got {_short(ends)}")
    lengths = [b - a for a, b in pairwise(ends)]
    if seqused is not None:
        used = seqused.tolist()
        if any(not 0 <= n <= room for n, room in zip(used, lengths, strict=True)):
            raise ValueError(f"seqused_{name}: expected 0 up to each sequence's rows {_short(lengths)}, got {_short(used)}")
        lengths = used
    return max(lengths, default=0)


def _short(values: list) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:6]))}, ..., {', '.join(map(str, values[-3:]))}]"


# ---- one at a time ----------------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """One sequence of a problem, as a problem of its own."""
    problem: Problem
    operands: Operands
    q: tuple[int, slice]                # slot and rows
    k: tuple[int, slice]


def one_by_one(problem: Problem, x: Operands) -> Iterator[Part]:
    """The sequences that have queries. Differentiable; waits for the device's lengths."""
    q_rows, k_rows = hosted(x.q_rows, problem.batch, problem.seqlen_q), hosted(x.k_rows, problem.batch, problem.seqlen_k)
    q = cut(x.q, q_rows, problem.packed_q)
    k, v = ([] if problem.cached else cut(t, k_rows, problem.packed_k) for t in (x.k, x.v))
    bias = [None] * problem.batch if x.bias is None else list(x.bias.expand(problem.batch, -1, -1, -1).unbind(0))
    pages = None if x.pages is None else x.pages.cpu()
    for b, ((q_slot, q_first, nq), (k_slot, k_first, nk)) in enumerate(zip(q_rows, k_rows, strict=True)):
        if nq == 0:
            continue
        bias_b = bias[b]
        if problem.cached:
            k_b, v_b = (stored(t, scale, problem.dtype, None if pages is None else pages[b], k_slot, k_first, nk)
                        for t, scale in ((x.k, x.k_scale), (x.v, x.v_scale)))
        else:
            k_b, v_b = k[b], v[b]
        if bias_b is not None:
            bias_b = bias_b[None, :, :nq if bias_b.shape[1] > 1 else 1, :nk if bias_b.shape[2] > 1 else 1]
        settings = problem.settings._replace(cached=False, max_seqlen_q=0, max_seqlen_k=0)
        one = replace(problem, batch=1, seqlen_q=nq, seqlen_k=nk, first=problem.first + b, settings=settings, packed_q=None,
                      packed_k=None, page_size=None, stored=None, unequal=False, row=nk - nq if problem.cached else 0,
                      bias_shape=None if bias_b is None else tuple(bias_b.shape))
        own = x._replace(q=q[b], k=k_b, v=v_b, bias=bias_b, q_rows=None, k_rows=None, pages=None, k_scale=None, v_scale=None)
        yield Part(one, own, (q_slot, slice(q_first, q_first + nq)), (k_slot, slice(k_first, k_first + nk)))


def hosted(rows: Tensor | None, batch: int, length: int) -> list[list[int]]:
    """Rows as numbers."""
    return [[b, 0, length] for b in range(batch)] if rows is None else rows.tolist()


def cut(x: Tensor, rows: Sequence[Sequence[int]], packed: int | None) -> list[Tensor]:
    """The rows of each sequence, [1, H, n, D]. Packed ones by one split, whose gradient is one concatenation."""
    if packed is None:
        return list(x.split(1))
    sizes, end = [], 0
    for _, first, n in rows:
        sizes += [first - end, n]
        end = first + n
    return list(x.split([*sizes, packed - end], 2)[1::2])


def stored(x: Tensor, scale: Tensor | None, dtype: torch.dtype, pages: Tensor | None, slot: int, first: int, n: int) -> Tensor:
    """The keys or values [1, H_kv, n, D] of one sequence of a cache; a view, unless it is in pages or in fp8."""
    if pages is None:
        found = x[slot, :, first:first + n][None]
    else:
        size = x.shape[2]
        used = pages[:-(-n // size)].to(x.device)
        found = x.transpose(1, 2).index_select(0, used).flatten(0, 1).transpose(0, 1)[None, :, :n]     # one copy, in x's order
    return found if scale is None else (found.to(torch.promote_types(dtype, torch.float32)) * scale[:, None, None]).to(dtype)


def over_sequences(attention: Callable[[Problem, Operands], tuple[Tensor, Tensor]], problem: Problem,
                   x: Operands) -> tuple[Tensor, Tensor]:
    """(out, lse) of all sequences by the attention of one. Differentiable."""
    where, results = [], []
    for part in one_by_one(problem, x):  # what a part gathers from pages is gone before the next one gathers
        where.append(part.q)
        results.append(attention(part.problem, part.operands))
    if not results:
        tensors = (x.q, x.k, x.v, x.bias, x.sinks, *x.captured)
        nothing = sum(t[None][:0].sum() for t in tensors if t is not None and t.requires_grad)  # gradients are 0, not missing
        return problem.new_q(problem.head_dim_v) + nothing, problem.new_lse() + nothing
    out, lse = zip(*results, strict=True)
    if problem.packed_q is None:
        swap = problem.layout == "bshd"  # heads inside rows in memory
        whole = torch.cat([piece.transpose(1, 2) if swap else piece for piece in out])
        return whole.transpose(1, 2) if swap else whole, torch.cat(lse)
    return joined(out, where, problem.packed_q, 0.0), joined(lse, where, problem.packed_q, -torch.inf)


def statistics_of_sequences(statistics: Callable[[Problem, Operands, Tensor], Statistics], problem: Problem, x: Operands,
                            lse: Tensor) -> Statistics:
    """Those of all sequences by the statistics of one, given lse."""
    found = problem.new_statistics()
    for part in one_by_one(problem, x):
        (slot, rows), (k_slot, keys) = part.q, part.k
        if problem.cached:
            k_slot, keys = part.problem.first - problem.first, slice(0, part.problem.seqlen_k)
        own = statistics(part.problem, part.operands, lse[slot:slot + 1, :, rows])
        for whole, of_part, at, here in zip(found, own, (slot, slot, k_slot), (rows, rows, keys), strict=True):
            if whole is not None and of_part is not None:
                whole[at, :, here] = of_part[0]
    return found


def joined(x: Sequence[Tensor], where: Sequence[tuple[int, slice]], rows: int, fill: float) -> Tensor:
    """Pieces [1, H, n, ...] of packed sequences, at least one, as one tensor of `rows`, `fill` elsewhere. Differentiable."""
    pieces, end = [], 0
    for piece, (_, own) in zip(x, where, strict=True):
        pieces += [piece.new_full((*piece.shape[:2], own.start - end, *piece.shape[3:]), fill), piece]
        end = own.stop
    last = pieces[-1]
    pieces.append(last.new_full((*last.shape[:2], rows - end, *last.shape[3:]), fill))
    whole = [piece.transpose(1, 2) for piece in pieces]                 # heads inside rows, as packed tensors are
    return torch.cat(whole, 1).transpose(1, 2)
