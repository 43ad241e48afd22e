"""Shapes of self-attention that are timed, and their tensors."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.costs import Sizes

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
WORK = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}     # of a pass, in FLOPs of the forward, as the field counts


@dataclass(frozen=True)
class Shape:
    """Self-attention to be timed: q [batch, seqlen, heads, head_dim], k and v with kv_heads."""
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    dtype: str

    def flops(self) -> float:
        """Of the forward pass: 4 B H S^2 D, half of it under a causal mask."""
        return 4 * self.batch * self.heads * self.seqlen**2 * self.head_dim / (2 if self.causal else 1)

    def sizes(self) -> Sizes:
        return Sizes(self.batch, self.heads, self.kv_heads, self.seqlen, self.seqlen, self.head_dim, self.head_dim,
                     getattr(torch, self.dtype).itemsize)

    def draw(self, device: torch.device, seed: int) -> Inputs:
        """q, k, v, which require gradients, and dout."""
        generator = torch.Generator(device).manual_seed(seed)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        q, k, v, dout = (torch.randn((self.batch, self.seqlen, h, self.head_dim), generator=generator, device=device,
                                     dtype=getattr(torch, self.dtype)) for h in heads)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def matrix_bytes(self) -> int:
        """About what a forward and backward pass holds in matrices of scores, of which some are fp32."""
        return 5 * 4 * self.batch * self.heads * self.seqlen**2

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"B {self.batch} N {self.seqlen} H {heads} D {self.head_dim} {self.dtype} {self.mask}"


def laid_bhsd(x: Tensor) -> Tensor:
    """The same [B, S, H, D], in memory [B, H, S, D]: each head's rows in one piece."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def of_the_paper(device: torch.device, quick: bool = False, head_dims: Sequence[int] = (),
                 lengths: Sequence[int] = ()) -> list[Shape]:
    """On a GPU the protocol of the FlashAttention-2 paper, section 4.1: 16k tokens and 2048 channels in all, in bf16; elsewhere
    smaller shapes in fp32. Most telling first."""
    dims: Sequence[int]
    sizes: Sequence[int]
    if device.type == "cuda":
        tokens, channels, dtype = 16384, 2048, "bfloat16"
        dims, sizes = (128, 64, 256), (4096, 16384, 1024, 8192, 2048, 512)
    else:
        tokens, channels, dtype = 2048, 512, "float32"
        dims, sizes = (64, 128), (1024, 2048, 256)
    if quick:
        tokens, dims, sizes = tokens // 4, dims[:1], (1024,) if device.type == "cuda" else (256,)
    return [Shape(max(1, tokens // s), s, channels // d, channels // d, d, causal, dtype)
            for d in head_dims or dims for s in lengths or sizes for causal in (True, False)]
