"""Which backend computes a problem, and what that will cost: decided here, shown by `tilewise.explain`."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tilewise import backends, costs, widening
from tilewise.fp8 import FP8
from tilewise.problem import Operands, Problem
from tilewise.sequences import hosted
from tilewise.trace.bounds import tile_counts
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


def takes_fp8(problem: Problem, backend: str) -> bool:
    """Whether the backend that serves multiplies fp8 inputs as they are; others are given copies in bf16."""
    return backend != "reference" and getattr(backends.load(choose(problem, backend)), "FP8", False)


PATTERNS = {"rows": "sums over keys", "cols": "sums over queries", "diagonal": "sums along diagonals",
            "direct": "stored, shared dimensions summed", "any": "added entry by entry"}


@dataclass(frozen=True)
class Plan:
    """What will happen for one problem. Work and traffic are of one forward and one backward pass; bytes, not rates.

    tiles           (queries, keys) per tile
    visited, full   tiles computed, and those of them without a mask, of all `tiles_in_all`; over sequences and heads
    splits          shares of the keys, merged afterwards (Flash-Decoding)
    flops           of the matrix products, forward and backward
    read, written   bytes between slow and fast memory, forward, if nothing stays in a cache between tiles
    workspace       bytes beside inputs, outputs and gradients, forward and backward; copies included
    copied          bytes of copies of fp8 inputs in bf16; 0 where they are multiplied as they are
    repeatable      whether gradients have the same bits each time
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
    splits: int
    flops: tuple[int, int]
    read: int
    written: int
    workspace: tuple[int, int]
    copied: int
    repeatable: bool
    products: str
    tables: tuple[tuple[torch.Size, str], ...]
    standard_traffic: int
    standard_workspace: int

    def __str__(self) -> str:
        p = self.problem
        shapes = (f"q [{rows_of(p.batch, p.seqlen_q, p.packed_q)}, H {p.heads}, D {p.head_dim}]  "
                  f"k [{rows_of(p.batch, p.seqlen_k, p.packed_k)}, H {p.kv_heads}, D {p.head_dim}]  D_v {p.head_dim_v}")
        if p.cached:
            shapes += f", from {'pages of ' + str(p.page_size) if p.page_size else 'a cache'}"
        dtype = FP8 if p.quantized else p.dtype
        rows = [("problem", f"{shapes}, {str(dtype)[6:]} on {p.device}"), ("backend", self.backend)]
        rows += [("", f"not {name}: {reason}") for name, reason in self.passed_over.items()]
        forward_only = p.cached or p.quantized
        rows += [
            ("tiles", f"{self.tiles[0]} queries x {self.tiles[1]} keys; {self.visited:,} of {self.tiles_in_all:,} computed "
                      f"({percent(self.visited, self.tiles_in_all)}), {self.full:,} of them without a mask"),
            ("FLOPs", f"{si(self.flops[0]).rstrip()} forward"
                      + ("" if forward_only else f", {si(self.flops[1]).rstrip()} backward")),
            ("traffic", f"{si(self.read)}B read, {si(self.written)}B written forward; standard attention "
                        f"{si(self.standard_traffic)}B"),
            ("extra memory", f"{si(self.workspace[0])}B forward"
                             + ("" if forward_only else f", {si(self.workspace[1])}B backward")
                             + f"; standard attention {si(self.standard_workspace)}B")]
        if p.quantized:
            rows.append(("fp8", f"q, k and v are copied in bfloat16, {si(self.copied)}B" if self.copied else
                         "multiplied as it is; probabilities are rounded to it, and v is copied, transposed"))
        if self.splits > 1:
            rows.append(("keys", f"in {self.splits} shares, each by programs of its own, merged afterwards"))
        if p.dtype == torch.float32:
            rows.append(("fp32 products", f"{self.products} (torch.set_float32_matmul_precision decides)"))
        rows.append(("gradients", "none: a cache is for inference" if p.cached else "none of fp8 inputs" if p.quantized else
                     "bitwise repeatable" if self.repeatable else
                     "of q are sums in any order; deterministic=True makes them bitwise repeatable"))
        rows += [("", f"captured {list(shape)}: {PATTERNS[pattern]}") for shape, pattern in self.tables]
        return "\n".join(f"{label:13} {text}" for label, text in rows)


def plan(problem: Problem, x: Operands, backend: str) -> Plan:
    """The plan for a problem. Reads captured tensors' values and lengths, so it waits for the device they are on."""
    name = choose(problem, backend)
    module = backends.load(name)
    earlier = backends.AUTO[:backends.AUTO.index(name)] if backend == "auto" else ()
    passed_over = {other: backends.load(other).volunteers(problem) for other in earlier}
    asked, copied = problem, 0
    if problem.quantized and not takes_fp8(problem, name):
        copied = widening.copied(x)
        problem, x = widening.widened(problem, x)
    tiles = module.tile_sizes(problem)
    slots = slot_values([t.cpu() for t in x.captured], x.ints, x.floats)
    mask, bands = (None, ()) if name == "reference" else (problem.graphs.mask, problem.graphs.keys)
    workspace = module.workspace(problem)
    visited = full = in_all = flops = standard = matrix = 0
    moved = costs.Moved()
    for first, batch, nq, nk in groups(problem, x):
        values = leaf_values(slots, batch, problem.heads, nq, nk, first=first)
        here, whole = tile_counts(mask, bands, values, batch, problem.heads, (nq, nk), tiles)
        visited, full = visited + here, full + whole
        in_all += batch * problem.heads * -(-nq // tiles[0]) * -(-nk // tiles[1])
        s = costs.Sizes(batch, problem.heads, problem.kv_heads, nq, nk, problem.head_dim, problem.head_dim_v,
                        problem.dtype.itemsize, x.k.itemsize, x.q.itemsize)
        keys = here * min(tiles[1], nk)
        flops += costs.products(keys * min(tiles[0], nq), problem.head_dim + problem.head_dim_v)
        moved += costs.flash2_forward(s, costs.Walk(here, s.rows, here, keys, keys))
        standard += costs.standard_forward(s).total
        matrix += s.scores * s.itemsize
    return Plan(
        asked, name, passed_over, tiles, visited, full, in_all, module.splits(problem),
        flops=(flops, costs.backward_products(flops)),
        read=sum(moved.read.values()), written=sum(moved.written.values()),
        workspace=(workspace[0] + copied, 0 if asked.quantized else workspace[1]), copied=copied,
        repeatable=module.repeatable(problem), products=module.precision(problem),
        tables=() if asked.quantized else tuple(
            (x.captured[lookup.slot].shape, lookup.pattern) for lookup in problem.graphs.learned),
        standard_traffic=standard, standard_workspace=2 * matrix)


def groups(problem: Problem, x: Operands) -> Iterator[tuple[int, int, int, int]]:
    """(first sequence, how many, queries, keys) of sequences of equal length."""
    if not problem.unequal:
        yield 0, problem.batch, problem.seqlen_q, problem.seqlen_k
        return
    lengths = zip(hosted(x.q_rows, problem.batch, problem.seqlen_q), hosted(x.k_rows, problem.batch, problem.seqlen_k),
                  strict=True)
    for b, (q, k) in enumerate(lengths):
        if q[2] > 0:
            yield b, 1, q[2], k[2]


def rows_of(batch: int, longest: int, packed: int | None) -> str:
    return f"B {batch}, S {longest}" if packed is None else f"{packed} in B {batch}, S up to {longest}"


def si(value: float) -> str:
    """A number with a decimal prefix, such as 4.3 G."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"


def percent(part: int, whole: int) -> str:
    """A percentage in which next to nothing is not nothing, nor nearly everything everything."""
    share = part / max(1, whole)
    return "<1%" if 0 < share < 0.005 else ">99%" if 0.995 <= share < 1 else f"{share:.0%}"
