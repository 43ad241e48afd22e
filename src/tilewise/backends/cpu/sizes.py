"""How a problem is cut into work, from the sizes of the CPU's caches."""
from __future__ import annotations

import functools
import os

from tilewise.backends.cpu import threads
from tilewise.problem import MAX_SPLITS, Problem

PANEL = 64                              # keys visited together: rows.h
BLOCK_ROWS = 48                         # queries of a block, forward: a multiple of the registers' 6 rows; with lists
LISTED_ROWS = 64                        # so many, also backward: masks are made of blocks of powers of two
PANELS = 8                              # of a group: scores [BLOCK_ROWS, PANELS * PANEL] at a time
FEW_ROWS = 16                           # queries that read keys where they lie
SHARE_PANELS = 2                        # of a share of the keys, at least
BACKWARD_ROWS, BACKWARD_PANELS = 96, 8  # likewise backward, at most
DQ_COPIES = 2                           # of fp32 dQ, at most, that jobs have together; more queries come in several passes
TASKS = 4                               # for each thread, so that none waits long for another


@functools.cache
def cache_bytes(level: int) -> int:
    """Size of a cache; a usual one where the system does not tell."""
    try:
        found = os.sysconf(f"SC_LEVEL{level}_CACHE_SIZE")
    except (ValueError, OSError):
        found = 0
    return found if found > 0 else {2: 1 << 20, 3: 16 << 20}[level]


def panels_of(problem: Problem) -> int:
    """Panels of the longest sequence, at least one."""
    return max(1, -(-problem.seqlen_k // PANEL))


def folds(problem: Problem) -> bool:
    """Whether a block holds the queries of all heads of a group, not of one. Lists of panels are of one head's queries."""
    return not problem.graphs.listed


def rows(problem: Problem) -> int:
    """Queries of a block, forward."""
    return BLOCK_ROWS if folds(problem) else LISTED_ROWS


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
    return shares(problem, problem.batch * (1 if few else problem.kv_heads * blocks(problem, rows(problem))))


def shares(problem: Problem, tasks: int) -> int:
    """Of the keys, for so many tasks that have all of them."""
    if tasks == 0 or tasks >= TASKS * threads.count():
        return 1
    longest = problem.seqlen_k // (SHARE_PANELS * PANEL)
    return max(1, min(-(-TASKS * threads.count() // tasks), longest, MAX_SPLITS))


def forward(problem: Problem) -> dict[str, int]:
    """Fields of `abi.Problem`."""
    few = few_rows(problem)
    many = problem.seqlen_q * problem.group > few
    return dict(block_rows=rows(problem), panels=min(PANELS, panels_of(problem)), fold=folds(problem), splits=splits(problem),
                few_rows=few, aligned=problem.batch_invariant, units_together=units_together(problem, 1) if many else 0)


def units_together(problem: Problem, packs: int) -> int:
    """Units whose packed keys and values, so many of each, stay in the last cache; enough that every thread has work."""
    packed = 4 * packs * (problem.seqlen_k + PANEL) * (problem.head_dim + problem.head_dim_v)
    together = max(cache_bytes(3) // 2 // packed, -(-TASKS * threads.count() // blocks(problem, rows(problem))), 1)
    return min(problem.batch * problem.kv_heads, together)


def tangent(problem: Problem) -> dict[str, int]:
    """Fields of `abi.Problem`, as forward; keys and values are packed with their tangents."""
    tasks = problem.batch * problem.kv_heads * blocks(problem, rows(problem))
    return dict(block_rows=rows(problem), panels=min(PANELS, panels_of(problem)), fold=folds(problem),
                aligned=problem.batch_invariant, splits=1 if problem.batch_invariant else shares(problem, tasks),
                units_together=units_together(problem, 2))


def backward(problem: Problem, shared: bool, listed: bool, moving: bool = False) -> dict[str, int]:
    """Fields of `abi.Problem`. shared, listed: what sums are wanted (`gradients.Sums`); moving: of the derivative in a
    direction, in which keys and values have tangents."""
    units, workers = problem.batch * problem.kv_heads, threads.count()
    of_keys, of_values = (5, 3) if moving else (3, 2)               # copies, dK and dV among them
    keys = 4 * PANEL * (of_keys * problem.head_dim + of_values * problem.head_dim_v)
    panels = min(panels_of(problem), BACKWARD_PANELS, max(1, int(0.6 * cache_bytes(2)) // keys))
    even = units >= TASKS * workers or (units % workers == 0 and not problem.unequal)
    parts = 1 if even else -(-TASKS * workers // max(1, units))
    if shared:  # entries are added by the same list of jobs for each unit, one unit after another
        parts = workers
    parts = min(parts, -(-panels_of(problem) // panels))
    rows, together = BACKWARD_ROWS if folds(problem) else LISTED_ROWS, 1 if shared else max(1, units)
    copies = together * parts if parts > 1 else workers
    span = max(1, -(-blocks(problem, rows) * min(DQ_COPIES * units, copies) // copies))
    return dict(block_rows=rows, panels=panels, fold=folds(problem), splits=1, parts=parts, span=span, units_together=together,
                lists=workers if shared or listed else 0)


def key_mass(problem: Problem) -> dict[str, int]:
    """Fields of `abi.Problem`: blocks of keys and queries as backward."""
    cut = backward(problem, False, False)
    return dict(block_rows=cut["block_rows"], panels=cut["panels"], fold=cut["fold"], splits=1)


def workspace(problem: Problem) -> tuple[int, int]:
    """Bytes beside inputs, outputs and gradients, forward and backward: scratch of the threads, packed keys and values, parts
    of a split; dQ, delta. As the kernels lay them out (`Memory` in each), up to the rounding of rows to vectors."""
    dims, workers = problem.head_dim + problem.head_dim_v, threads.count()
    statistics = problem.heads * problem.queries
    cut = forward(problem)
    m, panels = cut["block_rows"], panels_of(problem)
    units, few = cut["units_together"], cut["few_rows"] * problem.kv_heads
    of_forward = statistics
    if units:
        of_forward += units * panels * PANEL * dims + workers * (m * (dims + cut["panels"] * PANEL) + PANEL * dims + panels)
    if cut["splits"] > 1:
        of_forward += cut["splits"] * (problem.head_dim_v + 3) * (units * blocks(problem, m) * m + problem.batch * few)
    of_forward += workers * few * dims
    back = backward(problem, False, False)
    n, m = back["panels"] * PANEL, back["block_rows"]
    scratch = n * (3 * problem.head_dim + 2 * problem.head_dim_v) + m * (dims + 2 * n)
    dq = back["span"] * m * problem.head_dim
    jobs = back["units_together"] * back["parts"] if back["parts"] > 1 else workers
    kept = back["units_together"] * panels * PANEL * dims if back["span"] < blocks(problem, m) else 0
    return 4 * of_forward, 4 * (2 * statistics + workers * scratch + jobs * dq + kept)
