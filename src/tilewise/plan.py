"""Which backend computes a problem, and what that will cost: decided here, shown by `tilewise.explain`."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise import backends
from tilewise.problem import Operands, Problem
from tilewise.trace.bounds import EMPTY, FULL, tile_classes
from tilewise.trace.evaluate import leaf_values, slot_values


def choose(problem: Problem, backend: str) -> str:
    """The backend that serves: the first of `backends.AUTO` that volunteers, or the one named, which must be able to.

    Raises ValueError for an unknown name, NotImplementedError with the reasons when none, or not the one named, can.
    """
    if backend == "auto":
        reasons = {}
        for name in backends.AUTO:
            reasons[name] = backends.load(name).volunteers(problem)
            if reasons[name] is None:
                return name
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"no backend can compute this here: {listed}")
    reason = backends.load(backend).supports(problem)
    if reason is not None:
        raise NotImplementedError(f'backend={backend!r} cannot compute this: {reason}; backend="auto" picks one that can')
    return backend


PATTERNS = {"rows": "sums over keys", "cols": "sums over queries", "diagonal": "sums along diagonals",
            "direct": "stored, shared dimensions summed", "any": "added entry by entry"}


@dataclass(frozen=True)
class Plan:
    """What will happen for one problem. Work and traffic are of one forward and one backward pass; bytes, not rates.

    tiles           (queries, keys) per tile
    visited, full   tiles computed, and those of them without a mask, of all `tiles_in_all`; over sequences and heads
    flops           of the matrix products, forward and backward
    read, written   bytes between slow and fast memory, forward, if nothing stays in a cache between tiles
    workspace       bytes beside inputs, outputs and gradients, forward and backward
    products        how fp32 inputs are multiplied: "ieee", "tf32x3" or "tf32"
    tables          (shape, pattern) of each lookup of a captured floating tensor: how its gradient is summed
    standard_*      the same for standard attention, which holds the score matrix
    """
    problem: Problem
    backend: str
    passed_over: dict[str, str]
    tiles: tuple[int, int]
    visited: int
    full: int
    tiles_in_all: int
    flops: tuple[int, int]
    read: int
    written: int
    workspace: tuple[int, int]
    products: str
    tables: tuple[tuple[torch.Size, str], ...]
    standard_traffic: int
    standard_workspace: int

    def __str__(self) -> str:
        p = self.problem
        shapes = (f"q [B {p.batch}, S {p.seqlen_q}, H {p.heads}, D {p.head_dim}]  "
                  f"k [B {p.batch}, S {p.seqlen_k}, H {p.kv_heads}, D {p.head_dim}]  D_v {p.head_dim_v}")
        rows = [("problem", f"{shapes}, {str(p.dtype)[6:]} on {p.device}"), ("backend", self.backend)]
        rows += [("", f"not {name}: {reason}") for name, reason in self.passed_over.items()]
        share = self.visited / max(1, self.tiles_in_all)
        rows += [
            ("tiles", f"{self.tiles[0]} queries x {self.tiles[1]} keys; {self.visited:,} of {self.tiles_in_all:,} computed "
                      f"({share:.0%}), {self.full:,} of them without a mask"),
            ("FLOPs", f"{si(self.flops[0])} forward, {si(self.flops[1])} backward"),
            ("traffic", f"{si(self.read)}B read, {si(self.written)}B written forward; standard attention "
                        f"{si(self.standard_traffic)}B"),
            ("extra memory", f"{si(self.workspace[0])}B forward, {si(self.workspace[1])}B backward; standard attention "
                             f"{si(self.standard_workspace)}B")]
        if p.dtype == torch.float32:
            rows.append(("fp32 products", f"{self.products} (torch.set_float32_matmul_precision decides)"))
        rows.append(("gradients", "bitwise repeatable"))
        rows += [("", f"captured {list(shape)}: {PATTERNS[pattern]}") for shape, pattern in self.tables]
        return "\n".join(f"{label:13} {text}" for label, text in rows)


def plan(problem: Problem, x: Operands, backend: str) -> Plan:
    """The plan for a problem. Reads captured tensors' values, so it waits for the device they are on."""
    name = choose(problem, backend)
    module = backends.load(name)
    earlier = backends.AUTO[:backends.AUTO.index(name)] if backend == "auto" else ()
    passed_over = {other: backends.load(other).volunteers(problem) for other in earlier}
    tiles = module.tile_sizes(problem)
    values = leaf_values(slot_values([t.cpu() for t in x.captured], x.ints, x.floats), problem.batch, problem.heads,
                         problem.seqlen_q, problem.seqlen_k)
    mask, bands = (None, ()) if name == "reference" else (problem.graphs.mask, problem.graphs.keys)
    classes = tile_classes(mask, bands, values, problem.batch, problem.heads, (problem.seqlen_q, problem.seqlen_k), tiles)
    repeats = problem.batch * problem.heads // max(1, classes.shape[0] * classes.shape[1])
    visited, full = int((classes != EMPTY).sum()) * repeats, int((classes == FULL).sum()) * repeats
    size = torch.finfo(problem.dtype).bits // 8
    forward_flops = 2 * visited * min(tiles[0], problem.seqlen_q) * min(tiles[1], problem.seqlen_k) * (
        problem.head_dim + problem.head_dim_v)
    rows, dims = problem.batch * problem.heads * problem.seqlen_q, problem.head_dim + problem.head_dim_v
    matrix = rows * problem.seqlen_k * size
    keys = visited * min(tiles[1], problem.seqlen_k) * dims * size
    inputs = (rows * problem.head_dim + problem.batch * problem.kv_heads * problem.seqlen_k * dims) * size
    return Plan(
        problem, name, passed_over, tiles, visited, full, classes.shape[2] * classes.shape[3] * problem.batch * problem.heads,
        flops=(forward_flops, int(2.5 * forward_flops)), read=rows * problem.head_dim * size + keys,
        written=rows * (problem.head_dim_v * size + 4), workspace=module.workspace(problem), products=module.precision(problem),
        tables=tuple((x.captured[lookup.slot].shape, lookup.pattern) for lookup in problem.graphs.learned),
        standard_traffic=4 * matrix + inputs + rows * problem.head_dim_v * size, standard_workspace=2 * matrix)


def si(value: float) -> str:
    """A number with a decimal prefix, such as 4.3 G."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
