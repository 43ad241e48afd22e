"""Flash-Decoding's table (Dao et al. 2023): one query for each of B sequences of N keys, nine times the same bytes.

16 query heads and 2 key heads of dimension 128, fp16 (CodeLlama-34B on 4 GPUs). "tilewise" splits the keys as it thinks fit,
"tilewise unsplit" does not. "standard" is what the blog calls PyTorch: it repeats keys and values for every query head.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw
from tilewise.bench.cases import Call, Case
from tilewise.bench.paper import published, tables
from tilewise.bench.paper.race import FORWARD, Entrant, Row, race, short_of
from tilewise.bench.tolerance import Results, Verdict, judge

TITLE = "Flash-Decoding, attention of one query"
SIZES = (*((2**(8 - i), 2**(8 + i)) for i in range(9)), (1, 131072))
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
QUICK = 64              # times fewer keys, which in the paper are 64k in all
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]     # q [B, H, 1, D], k and v [B, H_kv, N, D] -> [B, H, 1, D]


@dataclass(frozen=True)
class Setting:
    batch: int
    seqlen: int
    dtype: str = "float16"
    seconds: float = 2.0

    def nbytes(self) -> int:
        """Of all keys and values."""
        return 2 * self.batch * self.seqlen * KV_HEADS * HEAD_DIM * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Measurement:
    """A row of the table. paper: its sizes there; setting: here."""
    paper: tuple[int, int]
    setting: Setting

    def cases(self) -> list[str]:
        return [str(self)]

    def __str__(self) -> str:
        return "decode B {} N {}".format(*self.paper)


def measurements(device: torch.device, quick: bool = False) -> list[Measurement]:
    """The ten rows of the table."""
    found = [Measurement((b, n), Setting(b, n, "float16" if device.type == "cuda" else "float32")) for b, n in SIZES]
    return [replace(m, setting=smaller(m.setting)) for m in found] if quick else found


def smaller(setting: Setting) -> Setting:
    shorter = min(QUICK, setting.seqlen // 64)
    return replace(setting, batch=max(1, setting.batch * shorter // QUICK), seqlen=setting.seqlen // shorter, seconds=0.1)


@torch.inference_mode()
def measure(measurement: Measurement, device: torch.device) -> list[Row]:
    s = measurement.setting
    words = short_of(3 * s.nbytes(), device, "keys and values, twice,")
    entrants = [Entrant("tilewise", state="refused", reason=words)] if words else field(s, device)
    found = race(entrants, device, [FORWARD], seconds=s.seconds,
                 rates=lambda mode, seconds: {"gb_per_s": s.nbytes() / seconds / 1e9})
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "paper": list(measurement.paper)}
    return [{"case": str(measurement), "setting": asdict(s) | sizes | {"mode": FORWARD}, **found[FORWARD],
             "published": published.flash_decoding(*measurement.paper)}]


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
        last = q[-1:, :, -1:], cache.k[-1:, :, -1:], cache.v[-1:, :, -1:]
        truth, standard = (Results({"out": tw.attention(*(x.to(kind) for x in last), backend="reference")})
                           for kind in (torch.float64, dtype))
        return judge(Call(Case("timed"), *last, {}), Results({"out": call(0)[-1:, :, -1:]}), truth, standard)

    def entrant(name: str, call: Callable[[int], Tensor]) -> Entrant:
        return Entrant(name, {FORWARD: call}, partial(verdicts, call))

    words = short_of((1 + HEADS // KV_HEADS) * s.nbytes(), device, "repeated keys and values")
    return [entrant("tilewise", ours), entrant("tilewise unsplit", partial(ours, splits=1)),
            Entrant("standard", state="refused", reason=words) if words else entrant("standard", partial(other, standard)),
            entrant("sdpa", partial(other, sdpa))]


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    return torch.softmax((q * HEAD_DIM ** -0.5) @ k.mT, -1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def lines(rows: Sequence[Row], device: torch.device, quick: bool) -> list[str]:
    """As the blog prints it: a line for each B, N."""
    columns = [("{}, {}".format(*row["setting"]["paper"]), row) for row in rows]
    cut = [*["float32 (paper: float16)"] * (device.type != "cuda"), *[f"{QUICK} times fewer keys"] * quick]
    return [TITLE, *tables.transposed("B, N; microseconds", columns, "seconds", 1e6), *tables.remarks(rows),
            *([f"cut: {', '.join(cut)}"] if cut else [])]
