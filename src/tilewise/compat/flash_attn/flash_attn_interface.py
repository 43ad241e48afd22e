"""flash-attn 2's functions.

    q [B, S_q, H, D], k, v [B, S_k, H_kv, D]        packed: [total, H, D] with cu_seqlens int32 [B + 1]
    dropout_p         on the probabilities; bits from the device's default generator, another stream than flash-attn's
    softmax_scale     default D ** -0.5
    causal            query i sees key j iff j <= i + S_k - S_q
    window_size       (left, right) neighbours, negative: unbounded. So also where flash-attn 2 takes a bound of at least S_k
                      for none, which hides too little or shows too much when S_q > S_k
    softcap           c * tanh(s / c); 0 for none
    alibi_slopes      [H] or [B, H]: adds -slope * |i + S_k - S_q - j|
    deterministic     gradients bitwise repeatable
    return_attn_probs for tests: (out, lse, S_dmask), lse [B, H, S_q] or [H, total_q] in fp32, +inf for a row that sees no key;
                      S_dmask with dropout: probabilities, negative where dropped, [B, H, S_q, S_k] rounded up to 128, of that
                      size in memory; without: empty
    **more            of the later generations: attention_chunk, score_mod, mask_mod, learnable_sink (`flash_options.options`),
                      and backend, as in `tw.attention`

Errors are those of `tw.attention`, raised before anything is computed.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise import rng
from tilewise.compat.flash_calls import New, Place, cached, dense, packed, turned_by
from tilewise.compat.flash_options import hints, options
from tilewise.compat.flash_passes import flash_attn_backward as _flash_attn_backward
from tilewise.compat.flash_passes import flash_attn_forward as _flash_attn_forward
from tilewise.compat.flash_passes import flash_attn_varlen_backward as _flash_attn_varlen_backward
from tilewise.compat.flash_passes import flash_attn_varlen_forward as _flash_attn_varlen_forward
from tilewise.problem import MAX_HEAD_DIM

# "_..." are no part of flash-attn's documented interface; libraries for ring attention import them.
__all__ = ["_flash_attn_backward", "_flash_attn_forward", "_flash_attn_varlen_backward", "_flash_attn_varlen_forward",
           "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
           "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache"]

UNBOUNDED = (-1, -1)
TILE = 128                              # S_dmask's lengths are multiples of it


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
                    causal: bool = False, window_size=UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
                    deterministic: bool = False, return_attn_probs: bool = False, **more: Any) -> Any:
    """out [B, S_q, H, D_v] of dense q, k and v."""
    given = options(dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
                    alibi_slopes=alibi_slopes, deterministic=deterministic, **more)
    if not return_attn_probs:
        return dense(q, k, v, given)[0]
    probabilities = _dropout_to_be_shown(given, q.device)
    out, lse = dense(q, k, v, given)
    if not probabilities:
        return out, _empty_rows_positive(lse), q.new_empty(0)
    ends_q, ends_k = (torch.arange(len(x) + 1, dtype=torch.int32, device=q.device) * x.shape[1] for x in (q, k))
    shown = _s_dmask(q.flatten(0, 1), k.flatten(0, 1), (ends_q, ends_k), (q.shape[1], k.shape[1]), given)
    return out, _empty_rows_positive(lse), shown


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
                             causal: bool = False, window_size=UNBOUNDED, softcap: float = 0.0,
                             alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
                             **more: Any) -> Any:
    """kv [B, S_k, 2, H_kv, D]."""
    k, v = _parts("kv", kv, 5, 2)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                           deterministic, return_attn_probs, **more)


def flash_attn_qkvpacked_func(qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                              window_size=UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
                              deterministic: bool = False, return_attn_probs: bool = False, **more: Any) -> Any:
    """qkv [B, S, 3, H, D]."""
    q, k, v = _parts("qkv", qkv, 5, 3)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                           deterministic, return_attn_probs, **more)


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                           max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                           window_size=UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
                           deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
                           **more: Any) -> Any:
    """out [total_q, H, D_v] of packed q, k and v.

    block_table int32 [B, n]: k and v are in pages [pages, page size, H_kv, D], cu_seqlens_k then tells lengths alone. Without
    gradient: to be called under torch.no_grad() where inputs require one.
    """
    given = options(dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
                    alibi_slopes=alibi_slopes, deterministic=deterministic, **more)
    ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    probabilities = return_attn_probs and _dropout_to_be_shown(given, q.device)
    if block_table is None:
        out, lse = packed(q, k, v, ends, longest, given)
    elif probabilities:
        raise NotImplementedError("return_attn_probs: expected False with dropout and block_table")
    else:
        place = Place(cu_seqlens_k.diff(), pages=block_table)
        out, lse = cached(q, k, v, place, given, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q)
    if not return_attn_probs:
        return out
    return out, _empty_rows_positive(lse), _s_dmask(q, k, ends, longest, given) if probabilities else q.new_empty(0)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                                    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
                                    causal: bool = False, window_size=UNBOUNDED, softcap: float = 0.0,
                                    alibi_slopes: Tensor | None = None, deterministic: bool = False,
                                    return_attn_probs: bool = False, **more: Any) -> Any:
    """kv [total_k, 2, H_kv, D]."""
    k, v = _parts("kv", kv, 4, 2)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
                                  **more)


def flash_attn_varlen_qkvpacked_func(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0,
                                     softmax_scale: float | None = None, causal: bool = False, window_size=UNBOUNDED,
                                     softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
                                     return_attn_probs: bool = False, **more: Any) -> Any:
    """qkv [total, 3, H, D]."""
    q, k, v = _parts("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
                                  **more)


@torch.no_grad()
def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
                            rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
                            cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
                            cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
                            softmax_scale: float | None = None, causal: bool = False, window_size=UNBOUNDED,
                            softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None,
                            num_splits: int = 0, return_softmax_lse: bool = False, **more: Any) -> Any:
    """out [B, S_q, H, D_v], or (out, lse), of queries to a cache in the caller's tensors. Without gradient.

    Args:
        q: [B, S_q, H, D]; the last query stands at the sequence's last key.
        k_cache, v_cache: [slots, rows, H_kv, D]; with block_table [pages, page size, H_kv, D], pages of any size.
        k, v: [B, S_new, H_kv, D], first written into the cache behind cache_seqlens rows, in place.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2] for at least the cache's rows; they turn k to the rows it is
            written to, and q to the same from cache_seqlens on if causal or with a window, otherwise all of q to
            cache_seqlens. rotary_interleaved: entries 2 i and 2 i + 1 pair.
        cache_seqlens: rows in use before, left padding included: a number or int32 [B]; not advanced. Default: all.
        cache_batch_idx: int32 [B], each sequence's slot (row of block_table); several may read one.
        cache_leftpad: int32 [B], rows before the first key. With pages as well.
        block_table: int32 [B, n], the pages of each sequence in order.
        num_splits: shares of the keys, computed apart and merged; 0: chosen.
    """
    given = options(softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
                    alibi_slopes=alibi_slopes, **more)
    place = Place(cache_seqlens, cache_leftpad, cache_batch_idx, block_table)
    turning = turned_by(rotary_cos, rotary_sin, rotary_interleaved, given)
    out, lse = cached(q, k_cache, v_cache, place, given, New(k, v), turning, num_splits=hints(num_splits))
    return (out, _empty_rows_positive(lse)) if return_softmax_lse else out


def _parts(name: str, x: Tensor, dims: int, parts: int) -> Any:
    """The tensors that lie along the third dimension from the end."""
    if not isinstance(x, Tensor) or x.dim() != dims or x.shape[-3] != parts:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected [{'B, S' if dims == 5 else 'total'}, {parts}, heads, head_dim], got {got}")
    return x.unbind(-3)


def _empty_rows_positive(lse: Tensor) -> Tensor:
    """lse as flash-attn 2 returns it: +inf where a row saw no key."""
    return torch.where(lse == -torch.inf, torch.inf, lse)


def _dropout_to_be_shown(given: dict[str, Any], device: torch.device) -> bool:
    """Whether there is dropout; then its bits become known, the same as if they had not been asked for."""
    if given["dropout_p"] == 0:
        return False
    seed, offset, first = rng.draw(device).tolist()
    given["rng"] = rng.Rng(seed, offset, first)
    return True


@torch.no_grad()
def _s_dmask(q: Tensor, k: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int], given: dict[str, Any]) -> Tensor:
    """Probabilities [B, H, longest_q, longest_k, rounded up], negative where dropped, of packed q and k.

    Attention to values that are unit vectors returns the probabilities: of as many keys at a time as a value has entries.
    """
    batch, heads = len(ends[0]) - 1, q.shape[1]
    rounded_q, rounded_k = (-(-int(n) // TILE) * TILE for n in longest)
    shown = q.new_zeros(batch, rounded_q, heads, rounded_k)
    (of_row, row), (_, key) = (_numbered(x, end) for x, end in zip((q, k), ends, strict=True))
    own = given | dict(dropout_p=0.0)
    own.pop("rng")
    for first in range(0, rounded_k, MAX_HEAD_DIM):
        columns = torch.arange(first, min(first + MAX_HEAD_DIM, rounded_k), device=q.device)
        unit = (key[:, None, None] == columns).to(q.dtype).expand(-1, k.shape[1], -1).contiguous()
        part, _ = packed(q, k, unit, ends, longest, own)
        shown[of_row, row, :, first:first + len(columns)] = part
    sequence, row, head, column = torch.meshgrid(*(torch.arange(n, device=q.device) for n in shown.shape), indexing="ij")
    kept = rng.keep(given["rng"].tensor(q.device), rng.threshold(given["dropout_p"]), sequence, head, heads, row, column)
    return torch.where(kept, shown, -shown).transpose(1, 2)


def _numbered(x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of packed x: its sequence, and its number in it."""
    rows = torch.arange(len(x), device=x.device)
    sequence = torch.bucketize(rows, ends[1:], right=True).clamp(max=len(ends) - 2)
    return sequence, rows - ends[sequence]
