"""Sparse attention: patterns of blocks and a sliding window, beside full attention times the pattern's density.

That yardstick is ideal: what is hidden costs nothing. SDPA is given a boolean matrix, FlexAttention its block mask.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw
from tilewise import patterns
from tilewise.bench.contest import BOTH, FORWARD, PASSES, Entrant, Outcome, race
from tilewise.bench.peers import NO_GRADIENTS, flex_attend
from tilewise.bench.shapes import WORK, laid_bhsd
from tilewise.bench.suite import Bars, Trial, Wanted
from tilewise.bench.work import Work, draw
from tilewise.masks import Mask

IDEAL = "full x density"
BARS = {(mode, IDEAL): 1 / 1.3 for mode in (FORWARD, BOTH)}
LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "butterfly": patterns.butterfly, "local+global": lambda n: patterns.local(n, 1) | patterns.global_blocks(n, 1),
    "bigbird": patterns.bigbird}


@dataclass(frozen=True)
class Setting:
    """pattern: a key of LAYOUTS, or "window", of the query and the `block` - 1 keys before it. seconds: for all contenders."""
    pattern: str
    seqlen: int
    heads: int
    head_dim: int
    dtype: str
    block: int = 128
    seconds: float = 20.0

    def masks(self, device: torch.device) -> tuple[Mask, Callable, float]:
        """The mask that ours is given, the same as a function of the indices, and the share of scores that it shows."""
        n, block = self.seqlen, self.block
        if self.pattern == "window":
            shown = sum(min(i + 1, block) for i in range(n))
            return tw.window(block - 1, 0), lambda b, h, q, k: (q >= k) & (q - k < block), shown / n**2
        layout = LAYOUTS[self.pattern](n // block).to(device)
        return (tw.block_mask(layout, block_size=block), lambda b, h, q, k: layout[q // block, k // block],
                layout.float().mean().item())

    def flops(self) -> float:
        """Of the forward pass of full attention."""
        return 4 * self.heads * self.seqlen**2 * self.head_dim

    def __str__(self) -> str:
        return f"{self.pattern} {self.block}, N {self.seqlen} H {self.heads} D {self.head_dim} {self.dtype}"


def trials(wanted: Wanted) -> list[Trial]:
    on_gpu = wanted.device.type == "cuda"
    size = (16384, 16, 128, "bfloat16") if on_gpu else (8192, 4, 64, "float32")
    if wanted.quick:
        size = (2048, *size[1:]) if on_gpu else (1024, 1, 64, "float32")
    seconds = 2.0 if wanted.quick or on_gpu else 20.0
    settings = [Setting(pattern, *size, block=block, seconds=seconds)
                for pattern, block in (*((name, 128) for name in LAYOUTS), ("window", 512 if not wanted.quick else 128))]
    # On a CPU FlexAttention compiles for half a minute, and has only a forward pass.
    others = ("sdpa, boolean mask", "flex") if on_gpu or not wanted.quick else ("sdpa, boolean mask",)
    return [trial(setting, wanted.device, others=others, bars=None if on_gpu else BARS) for setting in settings]


def trial(setting: Setting, device: torch.device, *, part: str = "sparse", modes: tuple[str, ...] = PASSES,
          others: Sequence[str] = (), bars: Bars | None = None) -> Trial:
    density = setting.masks(torch.device("cpu"))[2]
    return Trial(part, str(setting), asdict(setting) | {"batch": 1, "density": density}, modes,
                 partial(measure, setting, device, modes, others), bars or {})


def measure(setting: Setting, device: torch.device, modes: Sequence[str] = PASSES,
            others: Sequence[str] = ()) -> dict[str, Outcome]:
    mask, function, density = setting.masks(device)
    tensors, dout = draw(setting.seqlen, setting.heads, setting.head_dim, device, getattr(torch, setting.dtype))
    timed = [mode for mode in (FORWARD, BOTH) if mode in modes or len(modes) == len(PASSES)]
    full = Work(tensors, dout).entrant(IDEAL, timed)
    rivals = {"sdpa, boolean mask": with_matrix, "flex": with_blocks}
    entrants = [Work(tensors, dout, mask=function, blocks=mask).entrant("tilewise", timed),
                Entrant(IDEAL, full.calls, factor=density),
                *(rivals[name](name, tensors, dout, function, device, timed) for name in others)]
    return race(entrants, device, modes, seconds=setting.seconds, rates=partial(rates, setting, density))


def rates(setting: Setting, density: float, mode: str, seconds: float) -> dict[str, float]:
    return {"tflops": WORK[mode] * density * setting.flops() / seconds / 1e12}


def with_matrix(name: str, tensors: dict[str, Tensor], dout: Tensor, function: Callable, device: torch.device,
                modes: Sequence[str]) -> Entrant:
    """SDPA, which finds its inputs as it wants them."""
    i = torch.arange(dout.shape[1], device=device)
    matrix = function(0, 0, i[:, None], i)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=matrix).transpose(1, 2)

    laid = {key: laid_bhsd(x.detach()).requires_grad_() for key, x in tensors.items()}
    return Work(laid, laid_bhsd(dout), mask=function, attend=attend).entrant(name, modes)


def with_blocks(name: str, tensors: dict[str, Tensor], dout: Tensor, function: Callable, device: torch.device,
                modes: Sequence[str]) -> Entrant:
    """FlexAttention."""
    alone = device.type != "cuda"
    work = Work(tensors, dout, mask=function, attend=flex_attend(device, function))
    return work.entrant(name, (FORWARD,) if alone else modes, NO_GRADIENTS if alone else "")
