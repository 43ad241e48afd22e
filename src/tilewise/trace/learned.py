"""Gradients of captured tensors: where the terms of a table's gradient come from, and where they go.

A score function reads a table at indices computed from (b, h, q, k); the gradient of an entry is the sum of dS * factor over
the scores that read it, factor being d score / d entry. How that sum is cheapest follows from the indices (`pattern`):

    rows       they depend on b, h and q only: sums over the keys of each query, then over queries
    cols       on b, h and k only: likewise
    diagonal   on b, h and q - k only, as relative positions do: sums along diagonals
    direct     they are b, h, q, k themselves, each at most once: the terms are the gradient, summed over b or h if missing
    any        anything else: each term is added to its entry
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.trace.evaluate import evaluate
from tilewise.trace.graph import Graph, Node, leaves, slot_of

FREE, DIAGONAL = "free", "diagonal"     # of q and k; a function of q - k


class Learned(NamedTuple):
    """One lookup of a floating captured tensor in a score function, and d score / d entry."""
    load: Node
    factor: Graph

    @property
    def name(self) -> str:
        """Of the slot that is read."""
        return str(self.load.args[0])

    @property
    def slot(self) -> int:
        return slot_of(self.load)

    @property
    def indices(self) -> tuple[Graph, ...]:
        return self.load.args[1::2]

    @property
    def pattern(self) -> str:
        """How its gradient is summed: one of those that the module's text lists."""
        used = frozenset().union(*map(leaves, self.indices)) if self.indices else frozenset()
        if not {"q", "k"} <= used:
            return "cols" if "k" in used else "rows"
        if all(isinstance(i, str) and i in "bhqk" for i in self.indices) and len(set(self.indices)) == len(self.indices):
            return "direct"
        return "diagonal" if all(_invariant(_dependence(i)) for i in self.indices) else "any"


def _dependence(graph: Graph) -> Any:
    """FREE, DIAGONAL, (a, b) for a q + b k + something free, or None for another dependence on q and k."""
    if isinstance(graph, str):
        return {"q": (1, 0), "k": (0, 1)}.get(graph, FREE)
    found = [_dependence(a) for a in graph.args]
    if all(f == FREE for f in found):
        return FREE
    if graph.op in ("add", "sub", "neg") and all(f == FREE or isinstance(f, tuple) for f in found):
        first, second = [(0, 0) if f == FREE else f for f in (*found, FREE)][:2]
        sign = 1 if graph.op == "add" else -1
        total = (-first[0], -first[1]) if graph.op == "neg" else (first[0] + sign * second[0], first[1] + sign * second[1])
        return FREE if total == (0, 0) else total
    return DIAGONAL if all(map(_invariant, found)) else None


def _invariant(dependence: Any) -> bool:
    """Whether it stays the same one step down the diagonal."""
    return dependence in (FREE, DIAGONAL) or (isinstance(dependence, tuple) and dependence[0] + dependence[1] == 0)


def contiguous_tables(lookups: Sequence[Learned], captured: Sequence[Tensor],
                      ints: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """Captured tensors and the program's integers, tables to which terms are added entry by entry made contiguous.

    In others an entry of memory may stand for several of the table, as in expanded ones.
    """
    tables, numbers = list(captured), list(ints)
    for lookup in lookups:
        if lookup.pattern == "any":
            tables[lookup.slot] = tables[lookup.slot].contiguous()
            for name, stride in zip(lookup.load.args[2::2], tables[lookup.slot].stride(), strict=True):
                numbers[int(str(name)[1:])] = stride
    return tables, numbers


def sums_shape(learned: Learned, table: Tensor, batch: int, heads: int, nq: int, nk: int) -> tuple[int, ...]:
    """The shape of the sums from which `gather` makes the gradient."""
    if learned.pattern == "direct":
        return batch if "b" in learned.indices else 1, heads if "h" in learned.indices else 1, nq, nk
    return {"rows": (batch, heads, nq), "cols": (batch, heads, nk), "diagonal": (batch, heads, nq + nk - 1),
            "any": tuple(table.shape)}[learned.pattern]


def tile_sums(learned: Learned, terms: Tensor, values: Mapping[str, Any], table: Tensor) -> Tensor:
    """The sums of one tile's terms [B, H, rows, cols]; values: leaves, q [rows, 1] and k [cols] those of the tile.

    Diagonals in ascending order of q - k, rows + cols - 1 of them.
    """
    pattern = learned.pattern
    if pattern == "rows":
        return terms.sum(-1)
    if pattern == "cols":
        return terms.sum(-2)
    if pattern == "diagonal":
        return _diagonals(terms)
    if pattern == "direct":
        return terms.sum([d for d, leaf in enumerate("bh") if leaf not in learned.indices], keepdim=True)
    return _scatter(learned, terms, values, table)


def _diagonals(x: Tensor) -> Tensor:
    """Sums of x[..., i, j] over equal i - j, from -(n - 1) to m - 1."""
    m, n = x.shape[-2:]
    # rows of length n + m, read as rows of length n + m - 1: each is one entry further to the right than the last
    skewed = torch.nn.functional.pad(x.flip(-1), (0, m)).flatten(-2)[..., :m * (n + m - 1)]
    return skewed.unflatten(-1, (m, n + m - 1)).sum(-2)


def from_offset_tiles(tiles: Tensor, nq: int, nk: int) -> Tensor:
    """Sums over diagonals [B, H, nq + nk - 1] from those of tiles at equal offsets from the diagonal.

    tiles: [B, H, offsets, m, n], offsets in steps of min(m, n), the first that of the last keys and the first queries.
    """
    m, n = tiles.shape[-2:]
    step = min(m, n)
    steps = -(-(m + n - 1) // step)
    parts = torch.nn.functional.pad(_diagonals(tiles), (0, steps * step - (m + n - 1))).unflatten(-1, (steps, step))
    count = tiles.shape[2]
    total = tiles.new_zeros((*tiles.shape[:2], count + steps - 1, step))
    for shift in range(steps):
        total[:, :, shift:shift + count] += parts[:, :, :, shift]
    beyond = -(-nk // n) * n - nk  # diagonals of keys that the last tile has beyond the sequence
    return total.flatten(2)[..., beyond:beyond + nq + nk - 1]


def gather(learned: Learned, sums: Tensor, values: Mapping[str, Any], table: Tensor, keys: int) -> Tensor:
    """The table's gradient from the sums over all tiles; values: leaves but q and k; keys: of the longest sequence."""
    pattern, device = learned.pattern, sums.device
    if pattern == "any":
        return sums
    if pattern == "direct":
        kept = [leaf for leaf in "bhqk" if leaf in learned.indices]
        squeezed = sums.reshape([n for n, leaf in zip(sums.shape, "bhqk", strict=True) if leaf in kept])
        grad = squeezed.permute([kept.index(str(leaf)) for leaf in learned.indices])
        missing = [extra for n, wanted in zip(grad.shape[::-1], table.shape[::-1], strict=True) for extra in (0, wanted - n)]
        return torch.nn.functional.pad(grad, missing)
    if pattern == "rows":
        rows = _inside(values["nq"], torch.arange(sums.shape[2], device=device)[:, None])
        return _scatter(learned, sums[..., None], {**values, "q": rows}, table)
    if pattern == "cols":
        cols = _inside(values["nk"], torch.arange(sums.shape[2], device=device))
        return _scatter(learned, sums[:, :, None], {**values, "k": cols}, table)
    difference = torch.arange(sums.shape[2], device=device) - (keys - 1)
    if isinstance(values["nk"], Tensor):  # sums that a sequence does not reach are 0
        difference = torch.minimum(torch.maximum(difference, 1 - values["nk"].clamp(min=1)), values["nq"].clamp(min=1) - 1)
    one = {"q": difference.clamp(min=0), "k": (-difference).clamp(min=0)}
    return _scatter(learned, sums[:, :, None], {**values, **one}, table)


def _inside(length: int | Tensor, index: Tensor) -> Tensor:
    """Indices of a sequence of unequal ones; what lies behind its end has sums of 0."""
    return torch.minimum(index, length - 1).clamp(min=0) if isinstance(length, Tensor) else index


def _scatter(learned: Learned, terms: Tensor, values: Mapping[str, Any], table: Tensor) -> Tensor:
    """Zeros like `table` with the terms added where the indices point; in fp64, whose sums torch takes in fixed order."""
    indices = [torch.as_tensor(evaluate(i, values), device=terms.device).expand(terms.shape) for i in learned.indices]
    zeros = torch.zeros(table.shape, dtype=torch.float64, device=terms.device)
    if not indices:
        return terms.sum().to(terms.dtype)
    return zeros.index_put(tuple(indices), terms.double(), accumulate=True).to(terms.dtype)
