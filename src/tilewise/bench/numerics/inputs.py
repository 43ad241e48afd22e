"""What is computed: sizes, dtype, and inputs that are hard in different ways."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 32                # queries that a long sequence has: the last ones
DTYPES = "float32", "bfloat16", "float16"
PRECISIONS = "highest", "high", "medium"        # of torch.set_float32_matmul_precision


@dataclass(frozen=True)
class Setting:
    """q [1, seqlen_q, heads, head_dim], k and v [1, seqlen_k, heads, head_dim]; causal: aligned bottom-right.

    kind: a key of KINDS. precision: of fp32 products.
    """
    kind: str
    dtype: str
    seqlen_q: int
    seqlen_k: int
    heads: int = 4
    head_dim: int = 64
    causal: bool = False
    precision: str = "highest"

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        precision = "" if self.precision == "highest" else f" {self.precision}"
        sizes = f"N {self.seqlen_q} x {self.seqlen_k} H {self.heads} D {self.head_dim}"
        return f"{self.kind} {self.dtype}{precision} {sizes} {mask}"


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Random:
    """Draws tensors like others, from one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator)


Kind = Callable[[Inputs, Random], Inputs]


def normal(x: Inputs, random: Random) -> Inputs:
    """N(0, 1)."""
    return x


def outliers(x: Inputs, random: Random) -> Inputs:
    """N(0, 1) + N(0, 100) Bernoulli(0.001), as in the FlashAttention-3 paper (Shah et al. 2024, section 4.3): 1 in 1000 is ten
    times as large."""
    q, k, v = (t + 10 * random(t) * (torch.rand(t.shape, generator=random.generator) < 0.001) for t in x[:3])
    return Inputs(q, k, v, x.dout)


def near_constant(x: Inputs, random: Random) -> Inputs:
    """All keys of a head the same but for a hundredth: scores differ little, dk is what is left of terms that cancel."""
    return x._replace(k=x.k[:, :1] + 0.01 * x.k)


def scaled(factor: float) -> Kind:
    """Scores of that standard deviation: from 16 on, most rows of probabilities are nearly one-hot."""
    return lambda x, random: x._replace(q=factor * x.q)


KINDS: dict[str, Kind] = {
    "normal": normal, "outliers": outliers, "near-constant keys": near_constant,
    **{f"scores x {factor}": scaled(factor) for factor in (4, 16, 64)}}


def draw(setting: Setting, device: torch.device) -> Inputs:
    """The inputs, rounded to the setting's dtype: that rounding is no one's error."""
    s, random = setting, Random(0)
    plain = Inputs(*(random(torch.empty(1, n, s.heads, s.head_dim)) for n in (s.seqlen_q, s.seqlen_k, s.seqlen_k, s.seqlen_q)))
    return Inputs(*(t.to(device, getattr(torch, s.dtype)) for t in KINDS[s.kind](plain, random)))


class Sizes(NamedTuple):
    """square: N of the kinds of inputs; lengths: of the keys under FEW causal queries, one head."""
    square: int
    heads: int
    lengths: tuple[int, ...]


FULL, QUICK = Sizes(1024, 2, (512, 2048, 8192, 32768, 131072)), Sizes(256, 1, (512, 1024))


def settings(device: torch.device, sizes: Sizes) -> dict[str, list[Setting]]:
    """By part: kinds of inputs; long causal rows; on GPUs the precisions of fp32 products (ours on CPUs have one)."""
    n, heads, lengths = sizes
    found = {"inputs": [Setting(kind, dtype, n, n, heads) for kind in KINDS for dtype in DTYPES],
             "lengths": [Setting("normal", dtype, FEW, length, 1, causal=True) for length in lengths for dtype in DTYPES]}
    if device.type == "cuda":
        found["precision"] = [Setting(kind, "float32", n, n, heads, precision=p) for kind in ("normal", "scores x 16")
                              for p in PRECISIONS[1:]]
    return found
