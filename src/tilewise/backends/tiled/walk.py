"""The tiles of a problem, and the scores of a tile."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise import rng
from tilewise.problem import Operands, Problem
from tilewise.trace.bounds import EMPTY, FULL, hidden_rows, tile_classes
from tilewise.trace.evaluate import evaluate, leaf_values, slot_values
from tilewise.trace.graph import leaves

TILE_ELEMENTS = 1 << 20                 # scores held at a time, over all sequences and heads
LONGEST_TILE, SHORTEST_TILE = 512, 32
BLOCK = 128, 64                         # (queries, keys) at most, of masks without intervals: their kept blocks are gathered


NONE: Mapping[str, Tensor] = {}


class Tile(NamedTuple):
    rows: slice
    cols: tuple[slice, ...]             # several where kept blocks are not neighbours
    masked: bool


@dataclass(frozen=True)
class Walk:
    """A problem with its operands' small parts, ready to be walked tile by tile."""
    problem: Problem
    values: dict[str, Any]              # of the program's leaves, except s, q and k
    rng: Tensor | None
    tiles: tuple[tuple[Tile, ...], ...] # per block of queries
    hidden_queries: Tensor | None       # [B or 1, H or 1, S_q]: those that see no key, and
    hidden_keys: Tensor | None          # [B or 1, H_kv or 1, S_k]: those that no query sees; None: there are none

    @property
    def flat(self) -> tuple[Tile, ...]:
        return tuple(tile for row in self.tiles for tile in row)

    def scores(self, tile: Tile, q: Tensor, k: Tensor, bias: Tensor | None = None,
               tables: Mapping[str, Tensor] = NONE) -> tuple[Tensor, Mapping[str, Any]]:
        """Finished scores [B, H, rows, cols] of a tile, and the values of its leaves, of which s is the raw score.

        q comes multiplied by scale. tables: in the place of captured tensors.
        """
        problem, graphs = self.problem, self.problem.graphs
        s = product(q, k.mT, problem.group)
        if graphs.score is None and bias is None and not tile.masked:
            return s, {}
        values = {**self.values, **self.indices(tile), **tables, "s": s}
        if graphs.score is not None:
            s = evaluate(graphs.score, values)
        if bias is not None:
            s = s + bias
        if tile.masked and graphs.mask is not None:
            s = torch.where(torch.as_tensor(evaluate(graphs.mask, values), device=s.device), s, -torch.inf)
        return s, values

    def queries(self, x: Tensor) -> Tensor:
        """x [B, H, S_q, ...], 0 where a query sees no key: it may be padding, which may hold anything."""
        return x if self.hidden_queries is None else torch.where(self.hidden_queries[..., None], 0.0, x)

    def keys(self, x: Tensor) -> Tensor:
        """x [B, H_kv, S_k, ...], 0 where no query sees a key."""
        return x if self.hidden_keys is None else torch.where(self.hidden_keys[..., None], 0.0, x)

    def clean(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q, k, v and others by name, without what no product may see."""
        return {**inputs, "q": self.queries(inputs["q"]), "k": self.keys(inputs["k"]), "v": self.keys(inputs["v"])}

    def indices(self, tile: Tile) -> dict[str, Tensor]:
        device = self.problem.device
        cols = [torch.arange(run.start, run.stop, device=device) for run in tile.cols]
        return dict(q=torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None],
                    k=cols[0] if len(cols) == 1 else torch.cat(cols))

    def dropped(self, tile: Tile, p: Tensor) -> Tensor:
        """p after dropout."""
        if self.rng is None:
            return p
        index = self.indices(tile)
        kept = rng.keep(self.rng, self.problem.dropout, self.values["b"], self.values["h"], self.problem.heads,
                        index["q"] + self.problem.row, index["k"])
        return torch.where(kept, p, 0.0) * rng.rescale(self.problem.dropout)


def walk(problem: Problem, x: Operands) -> Walk:
    """The walk over a problem's tiles; on the CPU it looks at what masks' tensors hold, elsewhere it does not wait for that."""
    values = leaf_values(slot_values(x.captured, x.ints, x.floats, problem.dtype), problem.batch, problem.heads,
                         problem.seqlen_q, problem.seqlen_k, problem.device, problem.first)
    graphs, device = problem.graphs, problem.device
    queries = dict(q=torch.arange(problem.seqlen_q, device=device)[:, None])
    keys = dict(k=torch.arange(problem.seqlen_k, device=device)[:, None])
    hidden_queries = hidden_keys = None
    if graphs.keys:
        hidden_queries = hidden_rows(graphs.keys, values | queries, problem.seqlen_k, device)
        hidden_keys = hidden_rows(graphs.queries, values | keys, problem.seqlen_q, device)
        if hidden_keys.shape[1] > 1:  # hidden from a whole group
            hidden_keys = hidden_keys.unflatten(1, (problem.kv_heads, problem.group)).all(2)
    return Walk(problem, values, x.rng, tuple(_visited(problem, values)), _if_any(hidden_queries), _if_any(hidden_keys))


def _if_any(hidden: Tensor | None) -> Tensor | None:
    """None where the host knows that there are none."""
    return None if hidden is None or (hidden.device.type == "cpu" and not hidden.any()) else hidden


def tile_sizes(problem: Problem) -> tuple[int, int]:
    """(queries, keys) per tile: near TILE_ELEMENTS over all sequences and heads; few queries have tiles of many keys."""
    together = 1 if problem.unequal else problem.batch  # unequal sequences come one by one
    each = TILE_ELEMENTS / max(1, together * problem.heads)
    length = min(LONGEST_TILE, max(SHORTEST_TILE, power_of_two(each ** 0.5)))
    if problem.graphs.listed:
        return min(length, BLOCK[0]), min(length, BLOCK[1])
    keys = max(length, power_of_two(each / max(1, problem.seqlen_q))) if problem.seqlen_q < length // 2 else length
    return length, min(keys, -(-max(1, problem.seqlen_k) // max(1, problem.splits)))


def power_of_two(x: float) -> int:
    """The largest up to x."""
    return 1 << int(x).bit_length() - 1


def _visited(problem: Problem, values: dict[str, Any]) -> Iterator[tuple[Tile, ...]]:
    """The tiles that are not EMPTY for some sequence and head, per block of queries, keys ascending."""
    tile_q, tile_k = tile_sizes(problem)
    mask, bands = problem.graphs.mask, problem.graphs.keys
    undecided = False
    if problem.device.type != "cpu" and mask is not None:  # reading the device's values would wait for it
        undecided = not bands or any(leaf[0] == "t" or leaf in "bh" for node in bands for leaf in leaves(node))
        values = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    classes = tile_classes(None if undecided else mask, () if undecided else bands, values, problem.batch, problem.heads,
                           (problem.seqlen_q, problem.seqlen_k), (tile_q, tile_k))
    certain = classes.amin((0, 1)).tolist() if classes.numel() else []
    visible = classes.amax((0, 1)).tolist() if classes.numel() else []
    for i in range(-(-problem.seqlen_q // tile_q)):
        rows = slice(i * tile_q, min((i + 1) * tile_q, problem.seqlen_q))
        kept = [j for j in range(-(-problem.seqlen_k // tile_k)) if visible and visible[i][j] != EMPTY]
        if undecided or not problem.graphs.listed:
            yield tuple(Tile(rows, (slice(j * tile_k, min((j + 1) * tile_k, problem.seqlen_k)),),
                             undecided or certain[i][j] != FULL) for j in kept)
        else:
            yield (*_gathered(problem, rows, [j for j in kept if certain[i][j] == FULL], tile_k, False),
                   *_gathered(problem, rows, [j for j in kept if certain[i][j] != FULL], tile_k, True))


def _gathered(problem: Problem, rows: slice, blocks: list[int], size: int, masked: bool) -> Iterator[Tile]:
    """Blocks of keys as few tiles of near TILE_ELEMENTS scores."""
    together = max(1, TILE_ELEMENTS // max(1, problem.batch * problem.heads * (rows.stop - rows.start) * size))
    for first in range(0, len(blocks), together):
        runs: list[slice] = []
        for j in blocks[first:first + together]:
            start, stop = j * size, min((j + 1) * size, problem.seqlen_k)
            if runs and runs[-1].stop == start:
                runs[-1] = slice(runs[-1].start, stop)
            else:
                runs.append(slice(start, stop))
        yield Tile(rows, tuple(runs), masked)


def product(a: Tensor, b: Tensor, group: int) -> Tensor:
    """a [B, H, M, K] @ b [B, H_kv, K, N] -> [B, H, M, N]: the heads of a group share one factor and one product."""
    if group == 1:
        return a @ b
    batch, heads, rows, inner = a.shape
    folded = a.reshape(batch, heads // group, group * rows, inner) @ b
    return folded.reshape(batch, heads, rows, b.shape[-1])


def product_over_rows(a: Tensor, b: Tensor, group: int) -> Tensor:
    """Sum over a group's heads and rows of a^T b: a [B, H, M, N], b [B, H, M, K] -> [B, H_kv, N, K]."""
    if group == 1:
        return a.mT @ b
    batch, heads, rows, _ = a.shape
    fold = (batch, heads // group, group * rows)
    return a.reshape(*fold, a.shape[-1]).mT @ b.reshape(*fold, b.shape[-1])


def probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse), 0 for rows without keys."""
    return torch.exp(s - torch.where(lse == -torch.inf, torch.inf, lse)[..., None])
