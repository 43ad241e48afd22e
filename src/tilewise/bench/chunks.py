"""A prompt read in chunks, and drafted tokens verified together; beside the same at once, and one by one.

Each call puts the cache back to where it began, all alike.
"""
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

import tilewise as tw
from tilewise.bench.contest import FORWARD, Entrant, Outcome, race
from tilewise.bench.gate import Expected
from tilewise.bench.suite import Trial
from tilewise.bench.timing import Call
from tilewise.bench.tolerance import Verdict

PARENTS = -1, 0, 0, 1, 1, 2, 2, 3       # of the drafts: the node above each


@dataclass(frozen=True)
class Setting:
    """One sequence. prompt: tokens in it; chunks: sizes; context: keys before the drafts. seconds: for each of both parts."""
    prompt: int = 2048
    chunks: tuple[int, ...] = (128, 512, 2048)
    context: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    seconds: float = 2.0

    def draw(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of one sequence."""
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (torch.randn(1, tokens, heads, self.head_dim, generator=generator, device=device,
                               dtype=getattr(torch, self.dtype)) for heads in (self.heads, self.kv_heads, self.kv_heads))
        return q, k, v


def settings(device: torch.device, quick: bool = False) -> list[Setting]:
    if quick:
        return [Setting(256, (64, 256), 512, 4, 2, 32, "float32", seconds=0.5)]
    return [Setting() if device.type == "cuda" else Setting(dtype="float32", seconds=10.0)]


def trials(setting: Setting, device: torch.device) -> list[Trial]:
    shape = f"{setting.heads}/{setting.kv_heads}/{setting.head_dim}"
    return [Trial("chunks", f"prompt of {setting.prompt} tokens, {shape}", asdict(setting), (FORWARD,),
                  partial(prefill, setting, device)),
            Trial("drafts", f"{len(PARENTS)} drafted tokens behind {setting.context}, {shape}", asdict(setting), (FORWARD,),
                  partial(drafts, setting, device))]


@torch.inference_mode()
def prefill(setting: Setting, device: torch.device) -> dict[str, Outcome]:
    """A whole prompt by one call of attention, and into a cache in chunks of some sizes."""
    q, k, v = setting.draw(setting.prompt, device)
    cache = tw.KVCache(1, setting.prompt, setting.kv_heads, setting.head_dim, dtype=q.dtype, device=device)
    calls: dict[str, Call] = {"at once": lambda turn: tw.attention(q, k, v, causal=True)}
    calls |= {f"chunks of {size}": partial(in_chunks, q, k, v, cache, size) for size in setting.chunks}
    return contest(calls, dict.fromkeys(calls, expected(q, k, v, tw.causal())), setting, device)


def in_chunks(q: Tensor, k: Tensor, v: Tensor, cache: tw.KVCache, size: int, turn: int) -> Tensor:
    """A prompt into an empty cache."""
    cache.reset()
    return torch.cat([tw.attention_with_kv_cache(*part, causal=True) for part in zip(
        q.split(size, 1), itertools.repeat(cache), k.split(size, 1), v.split(size, 1), strict=False)], 1)


@torch.inference_mode()
def drafts(setting: Setting, device: torch.device) -> dict[str, Outcome]:
    """Tokens that were guessed, each behind an earlier one: in one call with the tree's mask, and a token at a time."""
    q, k, v = setting.draw(setting.context + len(PARENTS), device)
    parents = torch.tensor(PARENTS, dtype=torch.int32, device=device)
    cache = tw.KVCache(1, setting.context + len(PARENTS), setting.kv_heads, setting.head_dim, dtype=q.dtype, device=device)
    cache.append(k[:, :setting.context], v[:, :setting.context])
    start, new = cache.lengths.clone(), tuple(x[:, setting.context:] for x in (q, k, v))

    def tree(turn: int) -> Tensor:
        cache.truncate(start)
        return tw.attention_with_kv_cache(new[0], cache, *new[1:], mask=tw.tree(parents))

    def one_by_one(turn: int) -> Tensor:
        cache.truncate(start)
        return torch.cat([tw.attention_with_kv_cache(q, cache, k, v)
                          for q, k, v in zip(*(x.split(1, 1) for x in new), strict=True)], 1)

    right = {"tree": expected(new[0], k, v, tw.tree(parents)), "one by one": expected(new[0], k, v, tw.causal())}
    return contest({"tree": tree, "one by one": one_by_one}, right, setting, device)


def expected(q: Tensor, k: Tensor, v: Tensor, mask: tw.Mask) -> Expected:
    """The right out of the last head."""
    return Expected.of(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], mask)


def contest(calls: Mapping[str, Call], right: Mapping[str, Expected], setting: Setting,
            device: torch.device) -> dict[str, Outcome]:
    entrants = [Entrant(name, {FORWARD: call}, partial(verdicts, call, right[name])) for name, call in calls.items()]
    return race(entrants, device, (FORWARD,), seconds=setting.seconds)


def verdicts(call: Call, right: Expected) -> Sequence[Verdict]:
    """Of the last head."""
    out = call(0)
    assert isinstance(out, Tensor)
    return right.verdicts({"out": out[:, :, -1:]})
