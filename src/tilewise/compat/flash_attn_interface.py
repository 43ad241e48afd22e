"""FlashAttention-3's module `flash_attn_interface`: `from tilewise.compat.flash_attn_interface import flash_attn_func`.

As in `tilewise.compat.flash_attn.flash_attn_interface`, and:

    qv                  [.., S_q, H, D_v]: scores are scale * (q k^T + qv v^T), scale (D + D_v) ** -0.5 by default; D + D_v at
                        most 512, with one key head 576. Costs a copy of q, and of k and v, of a cache all of it, unless they
                        are columns of one tensor there, side by side. Differentiable, where FlashAttention-3 drops its gradient
    q, k, v_descale     fp32 [B, H_kv], for float8_e4m3fn inputs: what they are multiplied by; `tw.attention`'s q_scale, k_scale
                        and v_scale. Of a cache q is copied in bf16, which is out's dtype
    attention_chunk     c: query at p sees keys j with j // c == p // c; 0 for none
    num_splits          of a cache: shares of the keys, 0: chosen. Dense and packed keys are not split: accepted, no effect
    pack_gqa, sm_margin, scheduler_metadata    about speed alone: accepted, no effect
    return_attn_probs   (out, lse); lse -inf for a row that sees no key, +inf if there are no keys at all
    **more              of the other generations: dropout_p, alibi_slopes, score_mod, mask_mod, learnable_sink, and backend
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.compat.flash_calls import Descale, New, Place, cached, dense, packed, turned_by, unpacked
from tilewise.compat.flash_options import hints, options
from tilewise.kv_cache import INTEGERS, check_tensor
from tilewise.state import AttentionState, merge_states

__all__ = ["flash_attn_combine", "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
           "flash_attn_with_kvcache", "get_scheduler_metadata"]

UNBOUNDED = (-1, -1)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
                    qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
                    v_descale: Tensor | None = None, window_size=UNBOUNDED, attention_chunk: int = 0, softcap: float = 0.0,
                    num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
                    return_attn_probs: bool = False, **more: Any) -> Any:
    """out [B, S_q, H, D_v] of dense q, k and v."""
    hints(num_splits, pack_gqa, sm_margin)
    given = options(softmax_scale=softmax_scale, causal=causal, window_size=window_size, attention_chunk=attention_chunk,
                    softcap=softcap, deterministic=deterministic, **more)
    out, lse = dense(q, k, v, given, qv, Descale(q_descale, k_descale, v_descale))
    return (out, _without_keys(lse, k)) if return_attn_probs else out


def flash_attn_qkvpacked_func(qkv: Tensor, softmax_scale: float | None = None, causal: bool = False,
                              q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
                              window_size=UNBOUNDED, attention_chunk: int = 0, softcap: float = 0.0,
                              deterministic: bool = False, num_heads_q: int | None = None, sm_margin: int = 0,
                              return_attn_probs: bool = False, **more: Any) -> Any:
    """qkv [B, S, 3, H, D], or [B, S, H + 2 H_kv, D] with num_heads_q = H."""
    q, k, v = unpacked(qkv, num_heads_q)
    return flash_attn_func(q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk,
                           softcap, deterministic=deterministic, sm_margin=sm_margin, return_attn_probs=return_attn_probs,
                           **more)


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                           max_seqlen_k: int, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
                           softmax_scale: float | None = None, causal: bool = False, qv: Tensor | None = None,
                           q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
                           window_size=UNBOUNDED, attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
                           pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
                           return_attn_probs: bool = False, **more: Any) -> Any:
    """out [total_q, H, D_v] of packed q, k and v.

    seqused_q, seqused_k: int32 [B], how many rows of each sequence are in use; of others out is 0 and lse -inf.
    """
    hints(num_splits, pack_gqa, sm_margin)
    given = options(softmax_scale=softmax_scale, causal=causal, window_size=window_size, attention_chunk=attention_chunk,
                    softcap=softcap, deterministic=deterministic, **more)
    out, lse = packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), given, (seqused_q, seqused_k), qv,
                      Descale(q_descale, k_descale, v_descale))
    return (out, _without_keys(lse, k)) if return_attn_probs else out


@torch.no_grad()
def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
                            qv: Tensor | None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
                            cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
                            cache_leftpad: Tensor | None = None, page_table: Tensor | None = None,
                            cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
                            max_seqlen_q: int | None = None, rotary_seqlens: Tensor | None = None,
                            q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
                            softmax_scale: float | None = None, causal: bool = False, window_size=UNBOUNDED,
                            attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True,
                            scheduler_metadata: Tensor | None = None, num_splits: int = 0, pack_gqa: bool | None = None,
                            sm_margin: int = 0, return_softmax_lse: bool = False, **more: Any) -> Any:
    """As flash-attn 2's (`tilewise.compat.flash_attn`), whose block_table is page_table here. Without gradient. And:

    q: packed [total, H, D] with cu_seqlens_q; k, v: packed [total_new, H_kv, D] with cu_seqlens_k_new, int32 [B + 1].
    rotary_seqlens: int32 [B], the position of each sequence's first new key and query; default: its rows in use.
    Returns out, or with return_softmax_lse (out, lse, out_accum, lse_accum); the last two, the parts of a split, are empty.
    """
    splits = hints(num_splits, pack_gqa, sm_margin)
    given = options(softmax_scale=softmax_scale, causal=causal, window_size=window_size, attention_chunk=attention_chunk,
                    softcap=softcap, **more)
    place = Place(cache_seqlens, cache_leftpad, cache_batch_idx, page_table)
    turning = turned_by(rotary_cos, rotary_sin, rotary_interleaved, given, rotary_seqlens)
    if turning is None and rotary_seqlens is not None:
        raise ValueError("rotary_seqlens: expected None without rotary_cos and rotary_sin")
    out, lse = cached(q, k_cache, v_cache, place, given, New(k, v, cu_seqlens_k_new), turning, qv,
                      Descale(q_descale, k_descale, v_descale), cu_seqlens_q, max_seqlen_q, splits)
    empty = out.new_empty(0, dtype=torch.float32)
    return (out, lse, empty, empty.clone()) if return_softmax_lse else out


def flash_attn_combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None,
                       out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention to all keys, from the results of attention to disjoint parts of them.

    out_partial: [parts, B, S, H, D] or [parts, total, H, D]; lse_partial: the same without D. out: written to. out_dtype:
    default out_partial's.
    """
    if out_partial.shape[:-1] != lse_partial.shape or len(out_partial) < 1:
        raise ValueError(f"lse_partial: expected at least one part, and out_partial's shape without its last dimension, "
                         f"{list(out_partial.shape[:-1])}, got {list(lse_partial.shape)}")
    states = [AttentionState(*part) for part in zip(out_partial, lse_partial, strict=True)]
    merged = merge_states(states)
    dtype = out_dtype or (out_partial.dtype if out is None else out.dtype)
    result = merged.out.to(dtype)
    return (result if out is None else out.copy_(result)), merged.lse


def get_scheduler_metadata(batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int,
                           headdim: int, cache_seqlens: Tensor, qkv_dtype: torch.dtype = torch.bfloat16,
                           headdim_v: int | None = None, cu_seqlens_q: Tensor | None = None,
                           cu_seqlens_k_new: Tensor | None = None, cache_leftpad: Tensor | None = None,
                           page_size: int | None = None, max_seqlen_k_new: int = 0, causal: bool = False,
                           window_size=UNBOUNDED, attention_chunk: int = 0, has_softcap: bool = False, num_splits: int = 0,
                           pack_gqa: bool | None = None, sm_margin: int = 0) -> Tensor:
    """An empty int32 tensor on cache_seqlens' device: nothing needs to be prepared, no call reads it."""
    check_tensor("cache_seqlens", cache_seqlens, (batch_size,), INTEGERS, None)
    hints(num_splits, pack_gqa, sm_margin)
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)


def _without_keys(lse: Tensor, k: Tensor) -> Tensor:
    """lse as FlashAttention-3 returns it: +inf where there are no keys to begin with."""
    return torch.full_like(lse, torch.inf) if k.shape[-3] == 0 else lse
