"""flash_attn.layers.rotary: rotary embedding (Su et al. 2021), with XPos (Sun et al. 2022); the arithmetic is `tw.Rotary`'s.

Tables are cos, sin [positions, rotary_dim / 2]; tensors [B, S, heads, D]. interleaved: entries 2 i and 2 i + 1 pair (GPT-J),
otherwise i and i + rotary_dim / 2 (GPT-NeoX). seqlen_offsets: a number or integers [B], the position of a sequence's first
token. Functions whose names end in _ write into their argument and return it.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewise.compat.flash_calls import rotated, unpacked
from tilewise.rotary import Rotary

__all__ = ["RotaryEmbedding", "apply_rotary_emb", "apply_rotary_emb_func", "apply_rotary_emb_kv_", "apply_rotary_emb_qkv_",
           "apply_rotary_emb_torch", "rotate_half"]


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False,
                     seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None,
                     max_seqlen: int | None = None) -> Tensor:
    """x [B, S, H, D], or packed [total, H, D] with cu_seqlens int32 [B + 1], its first rotary_dim entries turned.

    max_seqlen is not needed. Raises IndexError for positions beyond the tables, where positions are on the CPU.
    """
    turned = rotated(x, Rotary(cos, sin, interleaved), seqlen_offsets, cu_seqlens)
    return _into(x, turned) if inplace else turned


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(qkv: Tensor, cos: Tensor, sin: Tensor, cos_k: Tensor | None = None, sin_k: Tensor | None = None,
                          interleaved: bool = False, seqlen_offsets: int | Tensor = 0,
                          num_heads_q: int | None = None) -> Tensor:
    """Turns queries and keys in qkv [B, S, 3, H, D], or [B, S, H + 2 H_kv, D] with num_heads_q = H; cos_k, sin_k: keys' own."""
    q, k, v = unpacked(qkv, num_heads_q)
    of_keys = Rotary(cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved)
    turned = rotated(q, Rotary(cos, sin, interleaved), seqlen_offsets), rotated(k, of_keys, seqlen_offsets), v
    return _into(qkv, torch.stack(turned, 2) if qkv.dim() == 5 else torch.cat(turned, 2))


def apply_rotary_emb_kv_(kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False,
                         seqlen_offsets: int | Tensor = 0) -> Tensor:
    """Turns the keys in kv [B, S, 2, H_kv, D]."""
    k, v = kv.unbind(2)
    return _into(kv, torch.stack([rotated(k, Rotary(cos, sin, interleaved), seqlen_offsets), v], 2))


def _into(x: Tensor, turned: Tensor) -> Tensor:
    """x, once `turned` is written into it; gradients flow through what is returned. A leaf, which autograd does not let be
    written to, is changed without it."""
    if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
        x.detach().copy_(turned)
        return turned
    return x.copy_(turned)


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """(-x_2, x_1) of every pair (x_1, x_2) of x's last dimension."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    one, other = x.chunk(2, -1)
    return torch.cat([-other, one], -1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [B, S, H, D] turned by cos, sin [S, rotary_dim / 2] or [B, S, rotary_dim / 2], in x's dtype."""
    cos, sin = (t.repeat_interleave(2, -1) if interleaved else t.repeat(*[1] * (t.dim() - 1), 2) for t in (cos, sin))
    own, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    return torch.cat([own * cos[..., None, :] + rotate_half(own, interleaved) * sin[..., None, :], rest], -1)


class RotaryEmbedding(nn.Module):
    """Turns queries and keys in place, with tables that grow as needed; scale_base: XPos, for instance 512."""

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False,
                 scale_base: float | None = None, device=None):
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        pairs = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", self.base ** (-pairs / dim), persistent=False)
        scale = None if scale_base is None else (pairs + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _update_cos_sin_cache(self, seqlen: int, device=None, dtype: torch.dtype | None = None) -> None:
        """Tables of at least seqlen positions; angles in fp64, whatever dtype the module was cast to."""
        known = self._cos_cached
        if known is not None and seqlen <= self._seq_len_cached and (known.device, known.dtype) == (device, dtype) and not (
                self.training and known.is_inference()):
            return
        self._seq_len_cached = seqlen
        table = Rotary.of(self.dim, max(1, seqlen), self.base, device=device, dtype=torch.float64)
        if self.scale_base is None:
            self._cos_cached, self._sin_cached = table.cos.to(dtype), table.sin.to(dtype)
            return
        pairs = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64)
        power = (torch.arange(seqlen, device=device, dtype=torch.float64) - seqlen // 2) / self.scale_base
        scale = ((pairs + 0.4 * self.dim) / (1.4 * self.dim)) ** power[:, None]
        self._cos_cached, self._sin_cached = (table.cos * scale).to(dtype), (table.sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (table.cos / scale).to(dtype), (table.sin / scale).to(dtype)

    def forward(self, qkv: Tensor, kv: Tensor | None = None, seqlen_offset: int | Tensor = 0, max_seqlen: int | None = None,
                num_heads_q: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """qkv as in `apply_rotary_emb_qkv_`; with kv [B, S, 2, H_kv, D], qkv is q [B, S, H, D], and (q, kv) are returned.

        seqlen_offset: of tensors, max_seqlen says up to which position tables are needed.
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        if self._cos_cached is None or self._sin_cached is None:
            raise ValueError("max_seqlen: expected a number of positions where seqlen_offset is a tensor, got None")
        of_q, of_k = (self._cos_cached, self._sin_cached), (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, *of_q, *of_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, *of_q, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        cos, sin = (own if keys is None else keys for own, keys in zip(of_q, of_k, strict=True))
        return q, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offset)
