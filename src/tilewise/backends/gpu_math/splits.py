"""Flash-Decoding (Dao et al. 2023): which problems have their keys split, and into how many shares."""
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.backends.gpu_math.arguments import Tiles, blocks
from tilewise.problem import MAX_SPLITS, Operands, Problem

DECODE_ROWS = 64                        # queries of a group up to which its keys are split rather than walked at once
MIN_TILES = 2                           # of keys, that a share has


def few_queries(problem: Problem) -> bool:
    """Whether a sequence's queries of a whole group fit into a tile or two, as in decoding."""
    return problem.seqlen_q * problem.group <= DECODE_ROWS


def folds(problem: Problem) -> bool:
    """Whether the queries of a group share blocks. Where tiles come in lists, each head has its own."""
    return (problem.cached or few_queries(problem)) and not problem.graphs.listed


def decodes(problem: Problem) -> bool:
    """Whether a kernel for few queries serves a problem."""
    return few_queries(problem) and folds(problem)


def planned(problem: Problem, config: Tiles, together: int = 1) -> int:
    """How many shares the keys are cut into. together: programs that a multiprocessor runs at a time."""
    if problem.splits:
        return problem.splits
    if not few_queries(problem) or problem.graphs.listed:
        return 1
    programs = blocks(problem.seqlen_q * problem.group, config.BLOCK_M) * problem.batch * problem.kv_heads
    return splits_for(programs, blocks(problem.seqlen_k, config.BLOCK_N), multiprocessors(problem.device) * together)


def splits_for(programs: int, tiles: int, places: int) -> int:
    """Shares of the keys that fill the device: the fewest within 15% of the best use of whole waves.

    programs: without a split; tiles: of keys at most, each share has at least MIN_TILES of them; places: programs that run at
    a time.
    """
    if programs == 0 or programs >= 0.8 * places:
        return 1
    use = {}
    for splits in range(1, max(1, min(MAX_SPLITS, places, tiles // MIN_TILES)) + 1):
        if splits == 1 or blocks(tiles, splits) != blocks(tiles, splits - 1):
            waves = programs * splits / places
            use[splits] = waves / math.ceil(waves)
    return min(splits for splits in use if use[splits] >= 0.85 * max(use.values()))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Parts(NamedTuple):
    """What the shares give, in fp32: out [splits, slots, H, rows, DV], lse [splits, slots, H, rows]."""
    out: Tensor
    lse: Tensor


def new_parts(problem: Problem, splits: int, device: torch.device) -> Parts:
    """Memory for them; lse is -inf where nothing will be written: in rows of no sequence."""
    slots, rows = problem.rows_q
    lse = torch.empty((splits, slots, problem.heads, rows), dtype=torch.float32, device=device)
    return Parts(torch.empty((*lse.shape, problem.head_dim_v), dtype=torch.float32, device=device),
                 lse if problem.packed_q is None else lse.fill_(-torch.inf))


def hide_unused(problem: Problem, x: Operands, lse: Tensor) -> None:
    """Sinks have given an lse to rows of no sequence, of which the merge does not know."""
    if problem.has_sinks and x.q_rows is not None:
        lse.masked_fill_(~in_use(x.q_rows, problem.rows_q[1]), -torch.inf)


def in_use(q_rows: Tensor, rows: int) -> Tensor:
    """Which packed rows belong to a sequence: bool [rows]."""
    change = torch.zeros(rows + 1, dtype=torch.int32, device=q_rows.device)
    for ends, sign in ((q_rows[:, 1], 1), (q_rows[:, 1] + q_rows[:, 2], -1)):
        change.index_add_(0, ends.long(), torch.full_like(ends, sign))
    return change[:-1].cumsum(0) > 0
