"""Which tiles the Triton kernels visit for a problem, and how many rows they load there: numbers, without running a kernel.

The arithmetic of `gpu_math/masking.py`, on whole grids at once: O(N) for masks with bands, O(tiles in lists) for others.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tilewise.backends.gpu_math.arguments import in_all
from tilewise.costs import Blocks, Walk, cut
from tilewise.problem import Operands, Problem
from tilewise.sequences import hosted
from tilewise.trace.evaluate import evaluate, leaf_values, slot_values
from tilewise.trace.tile_lists import Question, tile_list

NOTHING = Walk(0, 0, 0, 0, 0)


def walk(problem: Problem, x: Operands, tiles: Blocks, *, of_keys: bool = False, fold: bool = False, splits: int = 1) -> Walk:
    """Of a kernel that is parallel over queries, or `of_keys` over keys; fold: the queries of a group share blocks.

    Raises NotImplementedError for packed sequences whose mask has no bands.
    """
    per_row, heads = (problem.group, problem.kv_heads) if fold else (1, problem.kv_heads if of_keys else problem.heads)
    if problem.graphs.listed:
        if problem.unequal:
            raise NotImplementedError("sequences of unequal length under a mask without bands: counted, not in closed form")
        found = listed(problem, x, tiles, of_keys)
    else:
        found = NOTHING
        for first, batch, nq, nk in sequences(problem, x):
            found += along_bands(problem, x, tiles, (first, batch, nq, nk), of_keys, fold, splits)
    packed, seqlen, block = ((problem.packed_k, problem.seqlen_k, tiles.k) if of_keys else
                             (problem.packed_q, problem.seqlen_q, tiles.q))
    return found._replace(programs=in_all(packed, seqlen, problem.batch, per_row, block) * heads)


def sequences(problem: Problem, x: Operands) -> Iterator[tuple[int, int, int, int]]:
    """(first, how many, queries, keys) of sequences of equal length; each by itself where they differ."""
    if not problem.unequal:
        yield 0, problem.batch, problem.seqlen_q, problem.seqlen_k
        return
    of_q, of_k = hosted(x.q_rows, problem.batch, problem.seqlen_q), hosted(x.k_rows, problem.batch, problem.seqlen_k)
    for b, (q, k) in enumerate(zip(of_q, of_k, strict=True)):
        yield b, 1, q[2], k[2]


def along_bands(problem: Problem, x: Operands, tiles: Blocks, sizes: tuple[int, int, int, int], of_keys: bool, fold: bool,
                splits: int) -> Walk:
    """Sequences of one length under a mask of at most two bands, or none."""
    first, batch, nq, nk = sizes
    own, others, block, other = (nk, nq, tiles.k, tiles.q) if of_keys else (nq, nk, tiles.q, tiles.k)
    per_row = problem.group if fold else 1
    heads = problem.kv_heads if of_keys or fold else problem.heads          # of the programs
    count = cut(own * per_row, block)
    row = torch.arange(count * block).reshape(1, 1, count, block)
    rows = row // per_row
    live = rows < own
    values = leaf_values(slot_values(x.captured, x.ints, x.floats), batch, problem.heads, nq, nk, first=first)
    if fold:
        values["h"] = torch.arange(problem.kv_heads)[:, None, None] * problem.group + row % problem.group
    values["k" if of_keys else "q"] = rows.clamp(max=max(own - 1, 0))
    bands = problem.graphs.queries if of_keys else problem.graphs.keys
    edges = [torch.as_tensor(evaluate(graph, values)) for graph in bands] or [torch.tensor(n) for n in (0, others - 1)] * 2
    ranges, shown = [], []
    for at in range(0, len(edges), 4):
        lo, hi = edges[at], edges[at + 1]
        seen = live & (lo <= hi)
        begin = torch.where(seen, lo, others).amin(-1).clamp(min=0)
        last = torch.where(seen, hi, -1).amax(-1).clamp(max=others - 1)
        start = begin // other
        ranges.append((start, torch.maximum((last + other) // other, start), begin, last + 1))
        shown.append((seen, lo, hi))
    begin, end = ranges[0][2], ranges[0][3]
    spans = [ranges[0][:2]]
    if len(ranges) == 2:
        (s0, e0, *_), (s1, e1, first_1, end_1) = ranges
        swap = s1 < s0
        early = torch.where(swap, s1, s0), torch.where(swap, e1, e0)
        start = torch.maximum(torch.where(swap, s0, s1), early[1])
        spans = [early, (start, torch.maximum(torch.where(swap, e0, e1), start))]
        begin, end = torch.minimum(begin, first_1), torch.maximum(end, end_1)
    shape = torch.broadcast_shapes(*(e.shape for e, _ in spans), (1, 1, count))
    members = problem.group if of_keys else 1                               # heads that each program walks for
    repeats = batch * heads * members // (shape[0] * shape[1])

    def total(of_span: Callable[[Tensor, Tensor], Tensor]) -> int:
        return sum(int(of_span(s, e).expand(shape).sum()) for s, e in spans) * repeats

    parts = 0
    if splits > 1:
        parts = seen_parts(spans, shown, live, splits, other, others) * (batch * heads // (shape[0] * shape[1]))
    return Walk(
        0, batch * heads * own * per_row, total(lambda s, e: e - s),
        total(lambda s, e: (torch.minimum(e * other, end) - torch.maximum(s * other, begin)).clamp(min=0) * (e > s)),
        total(lambda s, e: ((e * other).clamp(max=others) - s * other) * (e > s)), parts)


def seen_parts(spans: list, shown: list, live: Tensor, splits: int, other: int, others: int) -> int:
    """(row, share) pairs in which a row sees a key: shares are of the tiles that a block visits (`masking.share`)."""
    start, end = spans[0][0], spans[-1][1]
    end = torch.maximum(spans[0][1], end)
    size = (end - start + splits - 1) // splits
    pairs = 0
    for part in range(splits):
        low = ((start + part * size) * other)[..., None]
        high = torch.minimum(start + (part + 1) * size, end)[..., None] * other
        sees: Any = False
        for seen, lo, hi in shown:
            sees = sees | (seen & (torch.maximum(lo.clamp(min=0), low) <= torch.minimum(hi.clamp(max=others - 1), high - 1)))
        pairs += int((sees & live).sum())
    return pairs


def listed(problem: Problem, x: Operands, tiles: Blocks, of_keys: bool) -> Walk:
    """Under a mask without bands: the tiles in the kernel's own list."""
    assert problem.graphs.mask is not None
    found = tile_list(Question(problem.program, problem.graphs.mask, tuple(x.ints), tuple(x.floats), problem.batch,
                               problem.heads, (problem.seqlen_q, problem.seqlen_k), (tiles.q, tiles.k), of_keys, False,
                               problem.device), x.captured)
    own, others, block, other = ((problem.seqlen_k, problem.seqlen_q, tiles.k, tiles.q) if of_keys else
                                 (problem.seqlen_q, problem.seqlen_k, tiles.q, tiles.k))
    rows = cut(own, block) * (problem.batch if found.per_batch else 1) * (problem.heads if found.per_head else 1)
    entries = found.tiles[int(found.tiles[0]):int(found.tiles[2 * rows])].long()
    repeats = problem.batch * problem.heads * cut(own, block) // max(1, rows)
    loaded = int((others - entries * other).clamp(max=other).sum()) * repeats
    starts = found.tiles[:2 * rows + 1].long()
    masked = int((starts[2::2] - starts[1::2]).sum())
    heads = problem.kv_heads if of_keys else problem.heads
    return Walk(0, problem.batch * heads * own, len(entries) * repeats, loaded, loaded, masked=masked * repeats)
