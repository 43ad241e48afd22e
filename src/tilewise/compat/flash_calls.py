"""flash-attn's three ways to hold sequences - dense, packed, in a cache - in terms of `tilewise.attention` and its siblings.

What its generations add to them is done here once: scales of fp8 inputs, and qv, scores from two pairs of tensors,

    softmax(scale * (q k^T + qv v^T)) v

which is attention of [q, qv] to keys [k, v]: q, and where they do not lie side by side in memory k and v, are copied.
`given` is what `flash_options.options` returns. Every function returns (out, lse), lse -inf for a row that sees no key.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.api import attention, attention_varlen, attention_with_kv_cache
from tilewise.fp8 import FP8
from tilewise.kv_cache import INTEGERS, KVCache, check_tensor
from tilewise.paged_cache import PagedKVCache
from tilewise.problem import MAX_HEAD_DIM, MAX_LATENT_DIM
from tilewise.rotary import Rotary


class Descale(NamedTuple):
    """fp32 [B, H_kv] each: what fp8 values are multiplied by. None: 1."""
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None


class Turning(NamedTuple):
    """Rotary embedding of new keys and queries.

    cos, sin: [positions, rotary_dim / 2]; starts: [B], the position of the first new key and query, default: the number of
    rows in use before; moving: whether queries stand at positions one after another, or all at the first.
    """
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    starts: Tensor | None
    moving: bool


class New(NamedTuple):
    """Keys and values to append, [B, S_new, H_kv, D], or packed with cu_seqlens."""
    k: Tensor | None = None
    v: Tensor | None = None
    cu_seqlens: Tensor | None = None


class Place(NamedTuple):
    """Where the sequences of a call lie in a cache."""
    lengths: Any = None                 # rows in use, left padding included: int, integers [B], or None: all there are
    left_padding: Tensor | None = None  # integers [B]
    slots: Tensor | None = None         # integers [B]: numbers in the cache; None: in order
    pages: Tensor | None = None         # integers [batch of the cache, n]


NO_SCALES, NOTHING_NEW = Descale(), New()


def dense(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any], qv: Tensor | None = None,
          descale: Descale = NO_SCALES) -> tuple[Tensor, Tensor]:
    """q [B, S_q, H, D], k [B, S_k, H_kv, D], v [B, S_k, H_kv, D_v]."""
    q, k, v = map(rows_contiguous, (q, k, v))
    if qv is not None:
        check_qv(q, qv, k, v)
    scales = checked_scales(k, len(q), descale)
    if qv is not None:
        q, k = torch.cat([q, qv], -1), torch.cat([k, v], -1)
    return attention(q, k, v, return_lse=True, **scales, **given)


def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], max_seqlen: tuple[Any, Any],
           given: dict[str, Any], seqused: tuple[Tensor | None, Tensor | None] = (None, None), qv: Tensor | None = None,
           descale: Descale = NO_SCALES) -> tuple[Tensor, Tensor]:
    """q [total_q, H, D], k [total_k, H_kv, D], v; cu_seqlens, max_seqlen and seqused of queries and of keys."""
    q, k, v = map(rows_contiguous, (q, k, v))
    if qv is not None:
        check_qv(q, qv, k, v)
    scales = checked_scales(k, len(cu_seqlens[0]) - 1, descale)
    if qv is not None:
        q, k = torch.cat([q, qv], -1), torch.cat([k, v], -1)
    scales |= given
    return attention_varlen(q, k, v, *cu_seqlens, max_seqlen_q=integer(max_seqlen[0]), max_seqlen_k=integer(max_seqlen[1]),
                            seqused_q=seqused[0], seqused_k=seqused[1], return_lse=True, **scales)


def cached(q: Tensor, k_cache: Tensor, v_cache: Tensor, place: Place, given: dict[str, Any], new: New = NOTHING_NEW,
           turning: Turning | None = None, qv: Tensor | None = None, descale: Descale = NO_SCALES,
           cu_seqlens_q: Tensor | None = None, max_seqlen_q: Any = None,
           num_splits: int | None = None) -> tuple[Tensor, Tensor]:
    """q [B, S_q, H, D], or packed; k_cache [slots, rows, H_kv, D] or [pages, page size, H_kv, D], v_cache, written in place.

    Appends are one operation with attention where flash-attn's positions are those of `attention_with_kv_cache`; otherwise
    keys and queries are turned, or keys appended, before.
    """
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    lengths = row_counts(place, batch, k_cache, new)
    if qv is not None:
        check_qv(q, qv, k_cache, v_cache)
    q, k, v, factor = from_fp8(rows_contiguous(q), new.k, new.v, k_cache, descale, cu_seqlens_q)
    k, v = map(rows_contiguous, (k, v))
    apart = new.cu_seqlens is not cu_seqlens_q or qv is not None        # not one operation with attention
    rotary = None
    if turning is not None:
        if k is None:
            raise ValueError("rotary_cos: expected None without new keys k, which it turns")
        starts = lengths if turning.starts is None else turning.starts
        rotary = _rotary(turning, capacity(place, k_cache))
        fused = (not apart and cu_seqlens_q is None and turning.starts is None and place.left_padding is None
                 and q.shape[1] == k.shape[1] and (turning.moving or q.shape[1] == 1))
        if not fused:
            k = rotated(k, rotary, starts, new.cu_seqlens)
            q = rotated(q, rotary, starts, cu_seqlens_q, turning.moving)
            rotary = None
    cache = memory(k_cache, v_cache, lengths, place, batch)
    if k is not None and apart:
        cache.append(k, v, cu_seqlens=new.cu_seqlens)
        k = v = None
    if qv is not None:
        whole, v_cache, values_first = side_by_side(k_cache, v_cache)
        q = torch.cat([qv, q] if values_first else [q, qv], -1)
        cache = memory(whole, v_cache, lengths + new_counts(new), place, batch)
    own = {name: value for name, value in given.items() if name != "deterministic"}
    out, lse = attention_with_kv_cache(q, cache, k, v, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=integer(max_seqlen_q),
                                       rotary=rotary, num_splits=num_splits, return_lse=True, **own)
    return scaled(out, factor), lse


def rows_contiguous(x: Any) -> Any:
    """x with a contiguous last dimension; a copy where it has none, as flash-attn makes."""
    return x if not isinstance(x, Tensor) or x.stride(-1) == 1 else x.contiguous()


def unpacked(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of qkv [B, S, 3, H, D], or [B, S, H + 2 H_kv, D] with num_heads_q = H: views."""
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k, v = qkv.unbind(2)
        return q, k, v
    if qkv.dim() == 4 and num_heads_q is not None and num_heads_q < qkv.shape[2] and (qkv.shape[2] - num_heads_q) % 2 == 0:
        heads = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, heads, heads], 2)
        return q, k, v
    raise ValueError(f"qkv: expected [B, S, 3, heads, head_dim], or [B, S, num_heads_q + 2 kv_heads, head_dim] with "
                     f"num_heads_q, got {list(qkv.shape)} with {num_heads_q=}")


def integer(x: Any) -> int | None:
    """A length that may have come as a tensor of one."""
    return int(x) if isinstance(x, Tensor) else x


# ---- caches ---------------------------------------------------------------------------------------------------------

def capacity(place: Place, k_cache: Tensor) -> int:
    """Rows that a sequence has at most."""
    return k_cache.shape[1] * (1 if place.pages is None else place.pages.shape[1])


def row_counts(place: Place, batch: int, k_cache: Tensor, new: New) -> Tensor:
    """int32 [B]: rows in use, left padding included, before anything is appended; the call's own copy."""
    if (new.k is None) != (new.v is None):
        raise ValueError(f"{'v' if new.v is None else 'k'}: expected new keys k and new values v together, got None for one")
    lengths = place.lengths
    if lengths is None:
        if new.k is not None:
            raise ValueError("cache_seqlens: expected the lengths behind which k and v are written, got None")
        lengths = capacity(place, k_cache)
    if isinstance(lengths, int):
        return torch.full((batch,), lengths, dtype=torch.int32, device=k_cache.device)
    lengths = rows_contiguous(lengths)
    check_tensor("cache_seqlens", lengths, (batch,), INTEGERS, k_cache.device)
    return lengths.to(torch.int32, copy=True)


def memory(k: Tensor, v: Tensor, rows: Tensor, place: Place, batch: int) -> KVCache | PagedKVCache:
    """The cache as one of ours, in the caller's tensors; rows: in use, left padding included."""
    padding, slots, table = map(rows_contiguous, place[1:])
    for name, x in (("cache_leftpad", padding), ("cache_batch_idx", slots)):
        if x is not None:
            check_tensor(name, x, (batch,), INTEGERS, k.device)
    padding = None if padding is None else padding.int()
    lengths = rows.clone() if padding is None else rows - padding
    if table is not None:
        check_tensor("block_table", table, ("B", "n"), INTEGERS, k.device)
        pages = table if slots is None else table[slots.long()]
        if len(pages) != batch:
            raise ValueError(f"block_table: expected a row for each of q's {batch} sequences, got {len(pages)}")
        return PagedKVCache.wrap(k, v, pages.int(), lengths, left_padding=padding)
    if slots is None and k.shape[0] != batch:
        if k.shape[0] < batch:
            raise ValueError(f"k_cache: expected at least q's {batch} sequences, got {k.shape[0]}")
        slots = torch.arange(batch, device=k.device)
    return KVCache.wrap(k, v, lengths, slots=slots, left_padding=padding)


def new_counts(new: New) -> Tensor | int:
    """How many keys each sequence got."""
    if new.k is None:
        return 0
    return new.k.shape[1] if new.cu_seqlens is None else new.cu_seqlens.diff().int()


# ---- rotary embedding -----------------------------------------------------------------------------------------------

def turned_by(cos: Tensor | None, sin: Tensor | None, interleaved: bool, given: dict[str, Any],
              starts: Tensor | None = None) -> Turning | None:
    """What flash-attn's rotary arguments ask for; None: nothing is turned. Under a causal or local mask queries stand one after
    another."""
    if cos is None and sin is None:
        return None
    return Turning(cos, sin, interleaved, starts, moving=given["causal"] or given["mask"] is not None)


def _rotary(turning: Turning, rows: int) -> Rotary:
    if turning.cos is None or turning.sin is None:
        raise ValueError("rotary_cos, rotary_sin: expected both or none, got one")
    rotary = Rotary(turning.cos, turning.sin, turning.interleaved)
    if rotary.max_position < rows:
        raise ValueError(f"rotary_cos: expected positions for all {rows} rows of the cache, got {rotary.max_position}")
    return rotary


def rotated(x: Tensor, rotary: Rotary, offsets: int | Tensor, cu_seqlens: Tensor | None = None, moving: bool = True) -> Tensor:
    """x [B, S, H, D], or packed [total, H, D], turned: token t of sequence b to position offsets[b] + t, or with moving=False
    to offsets[b]. Differentiable in x."""
    if isinstance(offsets, Tensor):
        offsets = offsets.long()
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device) * moving
        positions = steps + (offsets[:, None, None] if isinstance(offsets, Tensor) else offsets)    # [B, 1, S], or [S]
    else:
        rows = torch.arange(len(x), device=x.device)
        sequence = torch.bucketize(rows, cu_seqlens[1:], right=True)
        owned = sequence < len(cu_seqlens) - 1
        sequence = torch.where(owned, sequence, 0)
        first = offsets[sequence] if isinstance(offsets, Tensor) else offsets
        positions = torch.where(owned, (rows - cu_seqlens[sequence]) * moving + first, 0)
    return rotary.rotate(x.transpose(-3, -2), positions).transpose(-3, -2)


# ---- qv -------------------------------------------------------------------------------------------------------------

def check_qv(q: Tensor, qv: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless qv is like q, with v's head dim, and both together are not too long."""
    if FP8 in (q.dtype, v.dtype):
        raise NotImplementedError("qv: expected None with float8_e4m3fn tensors, whose values would need two scales")
    check_tensor("qv", qv, (*q.shape[:-1], v.shape[-1]), (q.dtype,), q.device)
    together, most = k.shape[-1] + v.shape[-1], MAX_LATENT_DIM if k.shape[-2] == 1 else MAX_HEAD_DIM
    if together > most:
        raise ValueError(f"qv: expected head dims of q and qv of at most {most} together ({MAX_LATENT_DIM} with one key head, "
                         f"otherwise {MAX_HEAD_DIM}), got {q.shape[-1]} and {qv.shape[-1]}")


def side_by_side(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(keys [v, k] or [k, v], the values in them, whether they come first): views where both are parts of one tensor's rows,
    as multi-head latent attention keeps them; otherwise a copy of both."""
    dim, dim_v = k.shape[-1], v.shape[-1]
    steps = [step for step, size in zip(k.stride()[:-1], k.shape, strict=False) if size > 1]
    if (k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() and k.stride() == v.stride()
            and all(step >= dim + dim_v for step in steps)):
        shape = (*k.shape[:-1], dim + dim_v)
        if k.storage_offset() == v.storage_offset() + dim_v:
            whole = v.as_strided(shape, v.stride())
            return whole, whole[..., :dim_v], True
        if v.storage_offset() == k.storage_offset() + dim:
            return k.as_strided(shape, k.stride()), v, False
    whole = torch.cat([v, k], -1)
    return whole, whole[..., :dim_v], True


# ---- fp8 ------------------------------------------------------------------------------------------------------------

def checked_scales(k: Any, batch: int, descale: Descale) -> dict[str, Any]:
    """q_scale, k_scale and v_scale for keys k, where any is given."""
    given = {name: scale for name, scale in descale._asdict().items() if scale is not None}
    for name, scale in given.items():
        if not isinstance(k, Tensor) or k.dtype != FP8:
            raise ValueError(f"{name}_descale: expected None: only float8_e4m3fn tensors come with scales, not "
                             f"{getattr(k, 'dtype', type(k).__name__)}")
        check_tensor(f"{name}_descale", scale, (batch, k.shape[-2]), (torch.float32,), k.device)
    return {f"{name}_scale": scale for name, scale in given.items()}


def from_fp8(q: Tensor, k: Any, v: Any, cache: Any, descale: Descale,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Any, Any, Tensor | None]:
    """For a cache in fp8, which stays as it is: q and new k and v in bf16, q times its scale and that of the keys; and what out
    must be multiplied by."""
    batch = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    scales = checked_scales(cache, batch, descale)
    if not isinstance(cache, Tensor) or cache.dtype != FP8:
        return q, k, v, None

    def of_rows(*names: str) -> Tensor | None:
        """[.., S_q or total, H, 1] from products of [B, H_kv]."""
        given = [scales[name] for name in names if name in scales]
        if not given:
            return None
        heads = math.prod(given[1:], start=given[0]).repeat_interleave(q.shape[-2] // cache.shape[-2], 1)[..., None]
        if cu_seqlens is None:
            return heads[:, None]
        rows = torch.arange(len(q), device=q.device)
        return heads[torch.bucketize(rows, cu_seqlens[1:], right=True).clamp(max=batch - 1)]

    def wide(x: Any) -> Any:
        return x.bfloat16() if isinstance(x, Tensor) and x.dtype == FP8 else x

    return scaled(wide(q), of_rows("q_scale", "k_scale")), wide(k), wide(v), of_rows("v_scale")


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else (x.float() * factor).to(x.dtype)
