"""Self-attention of one sequence, ours beside SDPA and beside the machine's fp32 matrix product.

Everyone finds its inputs as it wants them: ours [1, N, H, D], SDPA [1, H, N, D].
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw
from tilewise.bench.cpu.figures import FASTER, SHARE, Ratio, ratios
from tilewise.bench.cpu.race import CPU, PASSES, Rival, entrant, race
from tilewise.bench.masks import Work, causal, draw
from tilewise.bench.serving.contest import Row
from tilewise.bench.timing import Call

TITLE = "attention"
SGEMM = 2048            # rows and columns of the product


@dataclass(frozen=True)
class Setting:
    """mode: a key of PASSES. mask: full, causal or window, of the query and the `window` - 1 keys before it.

    faster, of_sgemm: bars on the ratio to SDPA and on the share of the product's FLOP rate. seconds: for all contenders.
    """
    mode: str
    seqlen: int
    heads: int
    head_dim: int
    dtype: str
    mask: str
    faster: float | None = None
    of_sgemm: float | None = None
    window: int = 0
    seconds: float = 10.0

    def flops(self) -> float:
        """Of the forward pass of full attention."""
        return 4 * self.heads * self.seqlen**2 * self.head_dim

    def masks(self) -> tuple[tw.Mask | None, Callable | None]:
        """The mask that ours is given, and the same as a function of the indices."""
        if self.mask == "window":
            return tw.window(self.window - 1, 0), lambda b, h, q, k: (q >= k) & (q - k < self.window)
        return (tw.causal(), causal) if self.mask == "causal" else (None, None)

    def __str__(self) -> str:
        mask = f"window {self.window}" if self.window else self.mask
        return f"{PASSES[self.mode]} N {self.seqlen} H {self.heads} D {self.head_dim} {self.dtype} {mask}"


def settings(quick: bool = False) -> list[Setting]:
    shrink, seconds = (16, 0.2) if quick else (1, 10.0)
    make = partial(Setting, seconds=seconds)
    tiny, short, long = (n // shrink for n in (512, 2048, 8192))
    kinds, sizes, sixteen = ("full", "causal"), ((short, 8), (long, 4)), ("bfloat16", "float16")
    faster = {"full": 1.1, "causal": 1.3, "tiny full": 1.05, "tiny causal": 1.5, "forward bfloat16": 1.5, "both bfloat16": 3.0}
    found = [make("forward", n, heads, dim, "float32", kind, faster[kind], 0.85 if kind == "full" else None)
             for dim, (n, heads), kind in product((64, 128), sizes, kinds)]
    found += [make("forward", tiny, 8, 64, "float32", kind, faster[f"tiny {kind}"]) for kind in kinds]
    found += [make("both", n, heads, 64, "float32", kind, 1.5) for (n, heads), kind in product(sizes, kinds)]
    found += [make(mode, short, 8, 64, dtype, kind, faster.get(f"{mode} {dtype}"))
              for dtype, mode, kind in product(sixteen, PASSES, kinds)]
    return [*found, Setting("both", long, 4, 64, "float32", "window", 8.0, window=512 // shrink, seconds=2 * seconds)]


def measure(setting: Setting) -> Row:
    field = {"tilewise": entrant(ours(setting), setting.mode), "sdpa": entrant(sdpa(setting), setting.mode)}
    rows, timed = race(field, {"sgemm": sgemm()} if setting.of_sgemm else {}, setting.seconds)
    return {"contenders": rows, "figures": ratios(
        [Ratio(FASTER, "SDPA", "sdpa", "tilewise", setting.faster),
         Ratio(SHARE, "the sgemm rate", "sgemm", "tilewise", setting.of_sgemm, setting.flops() / (2 * SGEMM**3))], timed)}


def ours(setting: Setting) -> Work:
    mask, function = setting.masks()
    return Work(*drawn(setting), mask=function, blocks=mask)


def sdpa(setting: Setting) -> Rival:
    function = setting.masks()[1]
    options: dict[str, Any] = {"is_causal": setting.mask == "causal"}
    if setting.mask == "window" and function is not None:
        i = torch.arange(setting.seqlen)
        options = {"attn_mask": function(0, 0, i[:, None], i)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    tensors, dout = drawn(setting)
    laid = {name: heads_first(x.detach()).requires_grad_() for name, x in tensors.items()}
    return Rival(laid, heads_first(dout), mask=function, attend=attend)


def drawn(setting: Setting) -> tuple[dict[str, Tensor], Tensor]:
    return draw(setting.seqlen, setting.heads, setting.head_dim, CPU, getattr(torch, setting.dtype))


def heads_first(x: Tensor) -> Tensor:
    """The same [1, N, H, D] with each head's rows in one piece of memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sgemm() -> Call:
    """A product of fp32 matrices."""
    a, b, c = (torch.ones(SGEMM, SGEMM) for _ in range(3))
    return lambda turn: torch.mm(a, b, out=c)
