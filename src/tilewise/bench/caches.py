"""Caches that hold the same keys and values, and what decodes with each: ours, and what a user would take instead."""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw
from tilewise.bench.contest import free_bytes, gib
from tilewise.bench.peers import function_of
from tilewise.bench.timing import Call

STEPS = 48              # tokens there is room for behind the context: rounds that are timed, and those before them
FILLED = 2048           # tokens written to pages at a time
PAGES = 16, 256         # page sizes

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]     # q [B, H, 1, D], k and v [B, H_kv, N, D] -> [B, H, 1, D_v]


@dataclass(frozen=True)
class Setting:
    """One query for each of `batch` sequences of `context` keys. head_dim_v < head_dim: v is a prefix of k (MLA).

    seconds: for all contenders together, of attention alone and then of steps.
    """
    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    head_dim_v: int = 128
    dtype: str = "bfloat16"
    seconds: float = 0.4

    @property
    def v_in_k(self) -> bool:
        return self.head_dim_v < self.head_dim

    @property
    def kind(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def nbytes(self, rows: int | None = None) -> int:
        """Of the keys and values of all sequences, `context` rows each if not told otherwise."""
        width = self.head_dim + (0 if self.v_in_k else self.head_dim_v)
        return self.batch * (self.context if rows is None else rows) * self.kv_heads * width * self.kind.itemsize

    def __str__(self) -> str:
        return f"B {self.batch}, N {self.context}, {self.heads}/{self.kv_heads}/{self.head_dim}, {self.dtype}"


class World:
    """The inputs of a setting, and the cache that all others are copied from."""

    def __init__(self, setting: Setting, device: torch.device):
        s, generator = setting, torch.Generator(device).manual_seed(0)
        self.setting, self.device = setting, device
        self.cache = tw.KVCache(s.batch, s.context + STEPS, s.kv_heads, s.head_dim, head_dim_v=s.head_dim_v, dtype=s.kind,
                                device=device, v_in_k=s.v_in_k)
        for memory in (self.cache.k,) if s.v_in_k else (self.cache.k, self.cache.v):
            memory.normal_(generator=generator)
        self.cache.lengths.fill_(s.context)
        self.q, self.k_new, self.v_new = (
            torch.randn(s.batch, 1, heads, width, generator=generator, device=device, dtype=s.kind)
            for heads, width in ((s.heads, s.head_dim), (s.kv_heads, s.head_dim), (s.kv_heads, s.head_dim_v)))
        if s.v_in_k:
            self.v_new = self.k_new[..., :s.head_dim_v]

    @property
    def lying(self) -> tuple[Tensor, Tensor]:
        """k and v [B, H_kv, capacity, D] as our cache has them: heads inside rows."""
        return self.cache.k.transpose(1, 2), self.cache.v.transpose(1, 2)

    @cached_property
    def contiguous(self) -> tuple[Tensor, Tensor]:
        """The same with rows inside heads."""
        k = self.lying[0].contiguous()
        return k, k[..., :self.setting.head_dim_v] if self.setting.v_in_k else self.lying[1].contiguous()


class Decoder(NamedTuple):
    """attend: to the context; step: appends a token, then attends; or why there is neither. Both return [B, 1, H, D_v]."""
    name: str
    attend: Call | None
    step: Call | None
    reason: str = ""


def decoders(world: World) -> list[Decoder]:
    """All that may decode in a setting, ours first."""
    setting = world.setting
    one, alone = setting.kv_heads == 1, setting.heads == setting.kv_heads
    expanded = setting.heads // setting.kv_heads * setting.nbytes()
    fused = not setting.v_in_k and setting.head_dim <= 256
    found = [ours(world, "tilewise", world.cache)]
    found += [copied(world, f"pages {size}", partial(in_pages, world, size)) for size in PAGES]
    found.append(within(expanded * (not fused), world, "sdpa", lambda: growing(world, "sdpa", sdpa, *world.lying)))
    found.append(absent("sdpa contiguous", "with one key head its cache lies like ours") if one else
                 copied(world, "sdpa contiguous", lambda: growing(world, "sdpa contiguous", sdpa, *world.contiguous)))
    found.append(absent("sdpa folded", "heads are not grouped") if alone else
                 copied(world, "sdpa folded", lambda: growing(world, "sdpa folded", folded, *world.contiguous),
                        new=not one and "contiguous" not in vars(world)))
    found.append(within(expanded, world, "standard", lambda: growing(world, "standard", standard, *world.lying)))
    return [*found, flash_attn(world)]


def absent(name: str, reason: str) -> Decoder:
    return Decoder(name, None, None, reason)


def within(size: int, world: World, name: str, make: Callable[[], Decoder]) -> Decoder:
    """A decoder that needs so many bytes beside its cache, if they are there."""
    free = free_bytes(world.device)
    return make() if 2 * size <= free else absent(name, f"needs {gib(size)} beside the cache, more than half of {gib(free)}")


def copied(world: World, name: str, make: Callable[[], Decoder], new: bool = True) -> Decoder:
    """A decoder with a copy of the cache, if there is room for it."""
    size, free = new * world.setting.nbytes(), free_bytes(world.device)
    return make() if 1.3 * size <= free else absent(name, f"a copy of the cache needs {gib(size)}, free {gib(free)}")


# ---- ours -----------------------------------------------------------------------------------------------------------------

def ours(world: World, name: str, cache: tw.KVCache | tw.PagedKVCache, sequences: list[int] | None = None) -> Decoder:
    v_new = None if world.setting.v_in_k else world.v_new

    def attend(turn: int) -> Tensor:
        return tw.attention_with_kv_cache(world.q, cache, cache_batch_idx=sequences)

    def step(turn: int) -> Tensor:
        return tw.attention_with_kv_cache(world.q, cache, world.k_new, v_new, cache_batch_idx=sequences)

    return Decoder(name, attend, step)


def in_pages(world: World, size: int) -> Decoder:
    return ours(world, f"pages {size}", *paged(world, size))


def paged(world: World, size: int) -> tuple[tw.PagedKVCache, list[int]]:
    """A paged cache; a sequence's pages are anywhere in memory, as in a server that has run for a while."""
    s = world.setting
    each = -(-(s.context + STEPS) // size)
    cache = tw.PagedKVCache(s.batch * each, size, s.kv_heads, s.head_dim, max_sequences=s.batch, max_pages_per_sequence=each,
                            head_dim_v=s.head_dim_v, dtype=s.kind, device=world.device, v_in_k=s.v_in_k)
    assert cache.book is not None
    random.Random(0).shuffle(cache.book.free_pages)
    sequences = [cache.new() for _ in range(s.batch)]
    for first in range(0, s.context, FILLED):
        rows = slice(first, min(first + FILLED, s.context))
        cache.append(world.cache.k[:, rows], None if s.v_in_k else world.cache.v[:, rows], sequences=sequences)
    return cache, sequences


# ---- others ---------------------------------------------------------------------------------------------------------------

def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    p = torch.softmax((q @ k.mT) * q.shape[-1] ** -0.5, -1, dtype=torch.float32)
    return p.to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a group as if they were queries of one head: without a mask the same, and its keys are read once."""
    return scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v).reshape(*q.shape[:3], v.shape[3])


def growing(world: World, name: str, attend: Attend, k: Tensor, v: Tensor) -> Decoder:
    """A decoder on k and v [B, H_kv, capacity, D], which a step writes to as any code would: at one index for the batch."""
    q, context = world.q.transpose(1, 2), world.setting.context
    k_new, v_new = world.k_new[:, 0], world.v_new[:, 0]
    length = context

    def alone(turn: int) -> Tensor:
        return attend(q, k[:, :, :context], v[:, :, :context]).transpose(1, 2)

    def step(turn: int) -> Tensor:
        nonlocal length
        k[:, :, length] = k_new
        if not world.setting.v_in_k:
            v[:, :, length] = v_new
        length += 1
        return attend(q, k[:, :, :length], v[:, :, :length]).transpose(1, 2)

    return Decoder(name, alone, step)


def flash_attn(world: World) -> Decoder:
    function, reason = function_of("flash_attn", "flash_attn_with_kvcache", world.device)
    if function is None:
        return absent("flash_attn", reason)
    k, v, start = world.cache.k, world.cache.v, world.cache.lengths.clone()
    lengths = start.clone()

    def step(turn: int) -> Tensor:
        out = function(world.q, k, v, world.k_new, world.v_new, cache_seqlens=lengths)
        lengths.add_(1)
        return out

    return Decoder("flash_attn", lambda turn: function(world.q, k, v, cache_seqlens=start), step)
