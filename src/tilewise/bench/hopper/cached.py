"""Calls that read a cache with few queries: what the decode kernel is tested with, in the simulator and on a GPU."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from tilewise.bench.cases import Case, Maker
from tilewise.bench.gate import Expected, faults
from tilewise.fp8 import FP8
from tilewise.packing import cu_seqlens
from tilewise.problem import Problem

BEHIND = 9                              # rows of each slot behind the longest sequence, and pages that nobody holds


@dataclass(frozen=True)
class CachedCase:
    """One call of `tw.attention_with_kv_cache`, on sequences of these lengths.

    queries: of each sequence, in one packed tensor if they differ. page_size: None for a slot each. padding: rows before a
    sequence's first key. order: the sequences that are read; None: all. fp8: keys and values are stored so.
    options: keyword arguments, from a `Maker`.
    """
    name: str
    lengths: tuple[int, ...]
    queries: int | tuple[int, ...] = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    page_size: int | None = None
    padding: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    fp8: bool = False
    options: Callable[[Maker], dict[str, Any]] = field(default=lambda make: {})

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class CachedCall:
    """A case with its tensors. Whatever no sequence holds is NaN, and what lies behind a sequence's pages is no page."""
    q: Tensor
    cache: tw.KVCache | tw.PagedKVCache
    options: dict[str, Any]

    def run(self, backend: str) -> dict[str, Tensor]:
        """out and lse."""
        found = tw.attention_with_kv_cache(self.q, self.cache, **self.options, return_lse=True, backend=backend)
        return dict(zip(("out", "lse"), found, strict=True))

    def described(self) -> Problem:
        return tw.explain(self.q, self.cache, **self.options, backend="reference").problem

    def exact(self) -> CachedCall:
        """In fp64."""
        k, v = (x.double() if scale is None else x.double() * scale[:, None].double()
                for x, scale in ((self.cache.k, self.cache.k_scale), (self.cache.v, self.cache.v_scale)))
        if isinstance(self.cache, tw.PagedKVCache):
            cache: Any = tw.PagedKVCache.wrap(k, v, self.cache.block_table, self.cache.lengths)
        else:
            cache = tw.KVCache.wrap(k, v, self.cache.lengths, left_padding=self.cache.left_padding)
        return CachedCall(self.q.double(), cache, self.options)

    def faults(self, backend: str) -> str:
        """What is wrong with a backend's results, by the tolerance rule."""
        right = Expected(self.exact().run("reference"), self.run("reference"), (self.q, self.cache.k, self.cache.v))
        return faults(right.verdicts(self.run(backend)))


def draw(case: CachedCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> CachedCall:
    """Seeded inputs for a case."""
    generator = torch.Generator().manual_seed(seed)
    make = Maker(Case(case.name), torch.device(device), generator)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    order = tuple(range(len(case.lengths))) if case.order is None else case.order
    dims = case.head_dim, case.head_dim if case.head_dim_v is None else case.head_dim_v
    stored = FP8 if case.fp8 else dtype
    scales = {f"{name}_scale": 0.5 + make.uniform(case.kv_heads) for name in "kv"} if case.fp8 else {}
    if case.page_size is None:
        padding = (0,) * len(case.lengths) if case.padding is None else case.padding
        rows = max(a + b for a, b in zip(case.lengths, padding, strict=True)) + BEHIND
        places = [[(slot, padding[slot] + i) for i in range(n)] for slot, n in enumerate(case.lengths)]
        k, v = (filled(make, len(case.lengths), rows, case.kv_heads, dim, places).to(stored) for dim in dims)
        cache: Any = tw.KVCache.wrap(k, v, lengths, left_padding=torch.tensor(padding, dtype=torch.int32, device=device),
                                     **scales)
    else:
        counts = [-(-n // case.page_size) for n in case.lengths]
        free = torch.randperm(sum(counts) + BEHIND, generator=generator).tolist()
        table = torch.full((len(counts), max(counts) + 2), -7, dtype=torch.int32)
        for b, count in enumerate(counts):
            table[b, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        places = [[(int(table[b, i // case.page_size]), i % case.page_size) for i in range(n)]
                  for b, n in enumerate(case.lengths)]
        k, v = (filled(make, sum(counts) + BEHIND, case.page_size, case.kv_heads, dim, places).to(stored) for dim in dims)
        cache = tw.PagedKVCache.wrap(k, v, table.to(device), lengths, **scales)
    options = case.options(make) | dict(cache_batch_idx=torch.tensor(order, device=device))
    if isinstance(case.queries, tuple):
        options |= dict(cu_seqlens_q=cu_seqlens(torch.tensor(case.queries, device=device)), max_seqlen_q=max(case.queries))
        shape: tuple[int, ...] = (sum(case.queries),)
    else:
        shape = len(order), case.queries
    return CachedCall(make.normal(*shape, case.heads, case.head_dim).to(dtype), cache, options)


def filled(make: Maker, slots: int, rows: int, heads: int, dim: int, places: list[list[tuple[int, int]]]) -> Tensor:
    """Memory [slots, rows, heads, dim] with keys at these places of the sequences, NaN elsewhere."""
    memory = torch.full((slots, rows, heads, dim), torch.nan, device=make.device)
    where = torch.tensor([place for own in places for place in own], device=make.device)
    memory[where[:, 0], where[:, 1]] = make.normal(len(where), heads, dim)
    return memory


def of_heads(make: Maker) -> dict[str, Any]:
    return dict(score_mod=[tw.alibi(make.uniform(4)), tw.softcap(3.0)], sinks=make.normal(4), causal=True)


PAGES = tuple(CachedCase(f"pages of {size}", (200, 1, 0, 70), 2, page_size=size, options=lambda m: dict(causal=True))
              for size in (8, 16, 48, 128, 256))
CASES = (
    CachedCase("one key", (1, 70)),
    CachedCase("several tiles", (300, 0, 129, 64)),
    CachedCase("shares", (330, 5, 200), options=lambda m: dict(num_splits=3)),
    CachedCase("more shares than tiles", (70, 3), options=lambda m: dict(num_splits=5, sinks=m.normal(4))),
    CachedCase("queries", (150, 5, 200), 5, options=lambda m: dict(causal=True)),
    CachedCase("more queries than keys", (150, 3), 5, options=lambda m: dict(causal=True)),
    CachedCase("a tile of queries", (150, 90), 16, 8, 2, options=lambda m: dict(causal=True, num_splits=2)),
    CachedCase("one key head", (150,), 4, 16, 1, options=lambda m: dict(causal=True)),
    CachedCase("heads alone", (150,), 3, 2, 2),
    CachedCase("window", (330, 20), 3, options=lambda m: dict(mask=tw.window(100, 0))),
    CachedCase("window from a tile's middle", (330, 20), options=lambda m: dict(mask=tw.window(70, 0), num_splits=2)),
    CachedCase("prefix or window", (330, 60), 3, options=lambda m: dict(mask=tw.prefix(m.values([70, 9])) | tw.window(90, 0))),
    CachedCase("key lengths", (200, 60), 2, options=lambda m: dict(mask=tw.key_lengths(m.values([150, 0])), causal=True)),
    CachedCase("alibi, softcap, sinks", (200, 60), 2, options=of_heads),
    CachedCase("score function", (200, 60), 2, options=lambda m: dict(
        score_mod=lambda s, b, h, q, k: s * torch.log(2.0 + q) - 0.1 * k, causal=True)),
    CachedCase("scale", (200,), options=lambda m: dict(scale=-0.3)),
    CachedCase("left padding", (200, 60, 9), 2, padding=(5, 0, 70), options=lambda m: dict(causal=True)),
    CachedCase("slots", (200, 60, 150), 2, order=(2, 0), options=lambda m: dict(causal=True)),
    CachedCase("packed", (200, 60, 9, 150), (3, 1, 0, 8), options=lambda m: dict(causal=True, sinks=m.normal(4))),
    CachedCase("packed shares", (200, 60, 150), (3, 1, 8), options=lambda m: dict(
        causal=True, sinks=m.normal(4), num_splits=2)),
    CachedCase("head dim 128", (200, 60), 2, head_dim=128, options=lambda m: dict(causal=True)),
    CachedCase("head dim 256", (200, 60), 2, head_dim=256, options=lambda m: dict(causal=True, num_splits=2)),
    CachedCase("head dim 256, softcap", (130, 60), 2, head_dim=256, options=of_heads),
    CachedCase("values wider", (200, 60), 2, head_dim=40, head_dim_v=136),
    CachedCase("values narrower", (200, 60), 2, head_dim=136, head_dim_v=40),
    *PAGES,
    CachedCase("pages, wide", (200, 60), 2, head_dim=128, page_size=16, options=of_heads),
    CachedCase("pages, packed", (200, 60, 30), (3, 1, 8), page_size=16, order=(2, 0, 1), options=lambda m: dict(causal=True)),
    CachedCase("fp8", (300, 0, 70), 2, fp8=True, options=lambda m: dict(causal=True)),
    CachedCase("fp8, shares", (400,), fp8=True, head_dim=128, options=lambda m: dict(num_splits=2, sinks=m.normal(4))),
    CachedCase("fp8, pages", (200, 60), 2, fp8=True, page_size=16, head_dim=128, options=of_heads),
    CachedCase("fp8, small pages", (200, 60), 2, fp8=True, page_size=8, options=lambda m: dict(mask=tw.window(90, 0))),
    CachedCase("fp8, head dim 256", (130, 60), 2, fp8=True, head_dim=256, head_dim_v=144),
)
