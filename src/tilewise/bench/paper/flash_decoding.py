"""Flash-Decoding's table (Dao et al. 2023): one query for each of B sequences of N keys, nine times the same bytes.

16 query heads and 2 key heads of dimension 128, fp16 (CodeLlama-34B on 4 GPUs). "tilewise" splits the keys as it thinks fit,
"tilewise unsplit" does not. "standard" is what the blog calls PyTorch: it repeats keys and values for every query head.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw
from tilewise.bench.contest import FORWARD, Entrant, Outcome, race
from tilewise.bench.gate import Expected
from tilewise.bench.paper import published, tables
from tilewise.bench.paper.cut import Cut, Cuts
from tilewise.bench.paper.passes import lack
from tilewise.bench.record import Row
from tilewise.bench.suite import Trial, Wanted
from tilewise.bench.tolerance import Verdict

TITLE = "Flash-Decoding, attention of one query"
SIZES = (*((2**(8 - i), 2**(8 + i)) for i in range(9)), (1, 131072))
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]     # q [B, H, 1, D], k and v [B, H_kv, N, D] -> [B, H, 1, D]


@dataclass(frozen=True)
class Sizes(Cut):
    """keys: of all sequences together, in all rows of the table but the last, which has twice as many."""
    keys: int = 65536


CUTS = Cuts(Sizes(), Sizes(seconds=0.2), Sizes("float32"), Sizes("float32", 0.1, keys=1024))


@dataclass(frozen=True)
class Setting:
    batch: int
    seqlen: int
    dtype: str

    def nbytes(self) -> int:
        """Of all keys and values."""
        return 2 * self.batch * self.seqlen * KV_HEADS * HEAD_DIM * getattr(torch, self.dtype).itemsize


def trials(wanted: Wanted) -> list[Trial]:
    """The ten rows of the table."""
    cut = CUTS.of(wanted.device, wanted.quick)
    assert isinstance(cut, Sizes)
    fewer = Sizes().keys // cut.keys
    return [trial(paper, Setting(max(1, paper[0] // fewer), min(paper[1], paper[0] * paper[1] // fewer), cut.dtype), wanted,
                  cut.seconds) for paper in SIZES]


def trial(paper: tuple[int, int], setting: Setting, wanted: Wanted, seconds: float) -> Trial:
    """paper: batch and seqlen there."""
    facts = asdict(setting) | {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "paper": list(paper)}
    return published.Trial(TITLE, "B {} N {}".format(*paper), facts, (FORWARD,), partial(measure, setting, wanted, seconds),
                           published={FORWARD: published.flash_decoding(*paper)})


@torch.inference_mode()
def measure(setting: Setting, wanted: Wanted, seconds: float) -> dict[str, Outcome]:
    if words := lack(3 * setting.nbytes(), wanted.device, "keys and values in two layouts"):
        raise MemoryError(words)
    return race(field(setting, wanted.device), wanted.device, (FORWARD,), seconds=seconds,
                rates=lambda mode, time: {"gb_per_s": setting.nbytes() / time / 1e9})


def field(s: Setting, device: torch.device) -> list[Entrant]:
    """Ours with and without split, and others: each has the cache in the layout that serves it."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, s.dtype)
    cache = tw.KVCache(s.batch, s.seqlen, KV_HEADS, HEAD_DIM, dtype=dtype, device=device)
    for memory in (cache.k, cache.v):
        memory.normal_(generator=generator)
    cache.lengths.fill_(s.seqlen)
    q = torch.randn(s.batch, 1, HEADS, HEAD_DIM, generator=generator, dtype=dtype, device=device)
    k, v = (x.transpose(1, 2).contiguous() for x in (cache.k, cache.v))

    def ours(turn: int, splits: int | None = None) -> Tensor:
        return tw.attention_with_kv_cache(q, cache, num_splits=splits)

    def other(attend: Attend, turn: int) -> Tensor:
        return attend(q.transpose(1, 2), k, v).transpose(1, 2)

    def verdicts(call: Callable[[int], Tensor]) -> list[Verdict]:
        right = Expected.of(q[-1:, :, -1:], cache.k[-1:, :, -1:], cache.v[-1:, :, -1:])
        return right.verdicts({"out": call(0)[-1:, :, -1:]})

    def entrant(name: str, call: Callable[[int], Tensor]) -> Entrant:
        return Entrant(name, {FORWARD: call}, partial(verdicts, call))

    words = lack((1 + HEADS // KV_HEADS) * s.nbytes(), device, "repeated keys and values")
    return [entrant("tilewise", ours), entrant("tilewise unsplit", partial(ours, splits=1)),
            Entrant("standard", state="refused", reason=words) if words else entrant("standard", partial(other, standard)),
            entrant("sdpa", partial(other, sdpa))]


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    return torch.softmax((q * HEAD_DIM ** -0.5) @ k.mT, -1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def lines(rows: Sequence[Row], wanted: Wanted) -> list[str]:
    """As the blog prints it: a line for each B, N."""
    columns = [("{}, {}".format(*row["setting"]["paper"]), row) for row in rows]
    return [TITLE, *CUTS.lines(wanted.device, wanted.quick),
            *tables.transposed("B, N; microseconds", columns, "seconds", 1e6), *tables.remarks(rows)]
