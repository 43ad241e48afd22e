"""How a problem is cut into work, from the sizes of the CPU's caches."""
from __future__ import annotations

import functools
import os

from tilewise.backends.cpu import threads
from tilewise.problem import MAX_SPLITS, Problem

PANEL = 64                              # keys visited together: rows.h
BLOCK_ROWS = 48                         # queries of a block, forward: a multiple of the registers' 6 rows
PANELS = 6                              # of a group: scores [BLOCK_ROWS, PANELS * PANEL] at a time
FEW_ROWS = 16                           # queries that read keys where they lie
SHARE_PANELS = 2                        # of a share of the keys, at least
BACKWARD_ROWS, BACKWARD_PANELS = 96, 4  # likewise backward, at most
TASKS = 4                               # for each thread, so that none waits long for another


@functools.cache
def cache_bytes(level: int) -> int:
    """Size of a cache; a usual one where the system does not tell."""
    try:
        found = os.sysconf(f"SC_LEVEL{level}_CACHE_SIZE")
    except (ValueError, OSError):
        found = 0
    return found if found > 0 else {2: 1 << 20, 3: 16 << 20}[level]


def folds(problem: Problem) -> bool:
    """Whether a block holds the queries of all heads of a group, not of one. Lists of panels are of one head's queries."""
    return not problem.graphs.listed


def blocks(problem: Problem, rows: int) -> int:
    """Blocks of one key head's queries."""
    heads = min(problem.group, rows) if folds(problem) else 1
    return -(-problem.seqlen_q // (rows // heads)) * -(-problem.group // heads)


def few_rows(problem: Problem) -> int:
    """Up to how many queries over the heads of a group a sequence reads its keys where they lie; 0: no sequence does."""
    few = FEW_ROWS if problem.unequal else problem.seqlen_q * problem.group
    return few if few <= FEW_ROWS and folds(problem) and not problem.batch_invariant else 0


def splits(problem: Problem) -> int:
    """Shares of the keys: enough that every thread has work, none shorter than a few groups of panels."""
    if problem.splits or problem.batch_invariant:
        return max(1, problem.splits)
    few = problem.seqlen_q * problem.group <= few_rows(problem)
    tasks = problem.batch * (1 if few else problem.kv_heads * blocks(problem, BLOCK_ROWS))
    if tasks == 0 or tasks >= TASKS * threads.count():
        return 1
    longest = problem.seqlen_k // (SHARE_PANELS * PANEL)
    return max(1, min(-(-TASKS * threads.count() // tasks), longest, MAX_SPLITS))


def forward(problem: Problem) -> dict[str, int]:
    """Fields of `abi.Problem`."""
    per_unit, few = blocks(problem, BLOCK_ROWS), few_rows(problem)
    many = problem.seqlen_q * problem.group > few
    packed = 4 * (problem.seqlen_k + PANEL) * (problem.head_dim + problem.head_dim_v)
    together = max(cache_bytes(3) // 2 // packed, -(-TASKS * threads.count() // per_unit), 1)
    return dict(block_rows=BLOCK_ROWS, panels=PANELS, fold=folds(problem), splits=splits(problem), few_rows=few,
                units_together=min(problem.batch * problem.kv_heads, together) if many else 0)


def backward(problem: Problem, shared: bool, listed: bool) -> dict[str, int]:
    """Fields of `abi.Problem`. shared, listed: what sums are wanted (`gradients.Sums`)."""
    units, workers = problem.batch * problem.kv_heads, threads.count()
    keys = 4 * PANEL * (3 * problem.head_dim + 2 * problem.head_dim_v)
    panels = max(1, min(BACKWARD_PANELS, int(0.6 * cache_bytes(2)) // keys))
    parts = 1 if units >= TASKS * workers or units % workers == 0 else -(-TASKS * workers // max(1, units))
    if shared:  # entries are added by the same list of jobs for each unit, one unit after another
        parts = workers
    parts = max(1, min(parts, -(-problem.seqlen_k // (panels * PANEL))))
    return dict(block_rows=BACKWARD_ROWS, panels=panels, fold=folds(problem), splits=1, parts=parts,
                units_together=1 if shared else max(1, units), lists=workers if shared or listed else 0)
