"""FlashAttention-4's functions (`flash_attn.cute.interface`): `from tilewise.compat.flash_attn_cute import flash_attn_func`.

    window_size          (left, right), None: unbounded, as is (-1, -1); a negative bound leaves the query's neighbourhood out
    learnable_sink       [H], one logit per head in the softmax denominator, differentiable
    score_mod            score_mod(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors[, aux_scalars]) -> score
    mask_mod             mask_mod(b, h, q_idx, kv_idx, seqlen_info, aux_tensors[, aux_scalars]) -> boolean
                         Torch functions of zero-dimensional values, as `tw.score_mod` takes them, in the place of cute.jit
                         functions, or `tw.Mask` and `tw.ScoreMod`; differentiable, also for aux_tensors. seqlen_info:
                         `SeqlenInfo`. Of what mask_mod shows, causal and window_size show a part, where
                         FlashAttention-4's forward ignores these two
    softcap              comes before score_mod; there they exclude each other
    block_sparse_tensors lists of blocks, with block_size: of partial ones mask_mod decides, full ones are visible, others not
    qv                   as in `tilewise.compat.flash_attn_interface`; q and k None: scores of qv and v alone
    num_splits, pack_gqa, scheduler_metadata, min_seqlen_k, seqlen_k_per_split, disable_scheduler_metadata,
    block_sparse_tensors_bwd    about speed alone, or follow from the rest: accepted, no effect (num_splits > 1 has one with
                         pages)
    **more               of the other generations: dropout_p, alibi_slopes, attention_chunk, and backend

All return (out, lse): lse None unless return_lse or an input requires a gradient, [B, H, S_q] or [H, total], with qv
[B, S_q, H] or [total, H]; -inf for a row that sees no key, differentiable.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.compat.flash_attn_interface import flash_attn_combine as combine
from tilewise.compat.flash_calls import Place, cached, dense, packed
from tilewise.compat.flash_options import hints, options
from tilewise.compat.flex import from_lists
from tilewise.masks import Mask, Q
from tilewise.masks import mask_mod as captured_mask
from tilewise.score_mods import ScoreMod
from tilewise.score_mods import score_mod as captured_score
from tilewise.trace.graph import substitute

__all__ = ["SeqlenInfo", "flash_attn_combine", "flash_attn_func", "flash_attn_varlen_func", "get_scheduler_metadata"]

UNBOUNDED = (None, None)


class SeqlenInfo(NamedTuple):
    """Of the sequence a score belongs to: where its queries and keys begin in packed tensors, and how many there are."""
    offset_q: Any
    offset_k: Any
    seqlen_q: Any
    seqlen_k: Any


def flash_attn_func(q: Tensor | None, k: Tensor | None, v: Tensor, qv: Tensor | None = None,
                    gather_kv_indices: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
                    window_size=UNBOUNDED, learnable_sink: Tensor | None = None, softcap: float = 0.0, num_splits: int = 1,
                    pack_gqa: bool | None = None, deterministic: bool = False, score_mod: Callable | None = None,
                    score_mod_bwd: Callable | None = None, mask_mod: Callable | None = None,
                    aux_tensors: Sequence[Tensor] | None = None, aux_scalars: Sequence | None = None,
                    block_sparse_tensors: Any = None, block_sparse_tensors_bwd: Any = None, return_lse: bool = False,
                    **more: Any) -> tuple[Tensor, Tensor | None]:
    """(out [B, S_q, H, D_v], lse) of dense q, k and v."""
    q, k, qv_too = _queries(q, k, v, qv, gather_kv_indices, score_mod_bwd)
    hints(num_splits, pack_gqa)
    info = SeqlenInfo(0, 0, q.shape[1], k.shape[1])
    scored, shown = _mods(score_mod, mask_mod, aux_tensors, aux_scalars, info)
    if block_sparse_tensors is not None:
        shown = _blocks(block_sparse_tensors, shown)
    given = options(softmax_scale=softmax_scale, causal=causal, window_size=window_size, learnable_sink=learnable_sink,
                    softcap=softcap, deterministic=deterministic, score_mod=scored, mask_mod=shown, signed_window=True,
                    **more)
    out, lse = dense(q, k, v, given, qv_too)
    return out, _lse(lse, return_lse, qv)


def flash_attn_varlen_func(q: Tensor | None, k: Tensor | None, v: Tensor, qv: Tensor | None = None,
                           cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
                           max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, min_seqlen_k: int | None = None,
                           seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
                           gather_kv_indices: Tensor | None = None, page_table: Tensor | None = None,
                           softmax_scale: float | None = None, causal: bool = False, window_size=UNBOUNDED,
                           learnable_sink: Tensor | None = None, softcap: float = 0.0, num_splits: int = 1,
                           pack_gqa: bool | None = None, deterministic: bool = False, score_mod: Callable | None = None,
                           score_mod_bwd: Callable | None = None, mask_mod: Callable | None = None,
                           block_sparse_tensors: Any = None, aux_tensors: Sequence[Tensor] | None = None,
                           aux_scalars: Sequence | None = None, return_lse: bool = False, scheduler_metadata: Any = None,
                           seqlen_k_per_split: Any = None, disable_scheduler_metadata: bool = False,
                           **more: Any) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of sequences of unequal length: q and k, v each packed with cu_seqlens, or [B, S, heads, head_dim] with or
    without seqused, the rows in use; or k, v in pages [pages, page size, H_kv, D], page_table int32 [B, n], seqused_k: how
    many are in use (without gradient: under torch.no_grad() where inputs require one).
    """
    q, k, qv_too = _queries(q, k, v, qv, gather_kv_indices, score_mod_bwd)
    if block_sparse_tensors is not None:
        raise NotImplementedError("block_sparse_tensors: expected None with sequences of unequal length: write what they show "
                                  "as mask_mod, whose tiles are found by themselves")
    splits = hints(num_splits, pack_gqa)
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    ends_q, ends_k = _ends(q, cu_seqlens_q), None if page_table is not None else _ends(k, cu_seqlens_k)
    used_q = ends_q.diff() if seqused_q is None else seqused_q
    used_k: Any = seqused_k
    if ends_k is not None and seqused_k is None:
        used_k = ends_k.diff()
    elif page_table is not None and seqused_k is None:
        used_k = q.new_full((batch,), page_table.shape[1] * k.shape[1], dtype=torch.int32)
    none = torch.zeros_like(used_q)
    info = SeqlenInfo(ends_q[:-1], none if ends_k is None else ends_k[:-1], used_q, used_k)
    scored, shown = _mods(score_mod, mask_mod, aux_tensors, aux_scalars, info)
    given = options(softmax_scale=softmax_scale, causal=causal, window_size=window_size, learnable_sink=learnable_sink,
                    softcap=softcap, deterministic=deterministic, score_mod=scored, mask_mod=shown, signed_window=True,
                    **more)
    if page_table is not None:
        for name, x, instead in (("seqused_q", seqused_q, "cu_seqlens_q"), ("cu_seqlens_k", cu_seqlens_k, "seqused_k")):
            if x is not None:
                raise ValueError(f"{name}: expected None with page_table: {instead} tells the lengths")
        out, lse = cached(q, k, v, Place(used_k, pages=page_table), given, qv=qv_too, cu_seqlens_q=cu_seqlens_q,
                          max_seqlen_q=max_seqlen_q, num_splits=splits if num_splits != 1 else None)
        return out, _lse(lse, return_lse, qv)
    assert ends_k is not None
    rows, keys, values = (x if x.dim() == 3 else x.flatten(0, 1) for x in (q, k, v))
    qv_too = qv_too if qv_too is None or qv_too.dim() == 3 else qv_too.flatten(0, 1)
    longest = (q.shape[1] if cu_seqlens_q is None else max_seqlen_q, k.shape[1] if cu_seqlens_k is None else max_seqlen_k)
    out, lse = packed(rows, keys, values, (ends_q, ends_k), longest, given, (seqused_q, seqused_k), qv_too)
    if cu_seqlens_q is None:
        out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    return out, _lse(lse, return_lse, qv)


def flash_attn_combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None,
                       out_dtype: torch.dtype | None = None, cu_seqlens: Tensor | None = None, seqused: Tensor | None = None,
                       virtual_batch_idx: Tensor | None = None, return_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """As FlashAttention-3's; cu_seqlens, seqused and virtual_batch_idx, which say what need not be computed, have no effect."""
    merged, lse = combine(out_partial, lse_partial, out, out_dtype)
    return merged, lse if return_lse else None


def get_scheduler_metadata(max_seqlen_q: int, max_seqlen_k: int, nheads: int, nheads_kv: int, headdim: int, num_splits: int,
                           headdim_v: int | None = None, pack_gqa: bool | None = None, causal: bool = False,
                           window_size_left: int | None = None, window_size_right: int | None = None, seqlen_k_new: int = 0,
                           cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
                           cu_seqlens_k_new: Tensor | None = None, seqused_q: Tensor | None = None,
                           seqused_k: Tensor | None = None, leftpad_k: Tensor | None = None, seqlen_k_per_split: Any = None,
                           _arch: int | None = None) -> None:
    """None, which scheduler_metadata takes: nothing needs to be prepared."""
    hints(num_splits, pack_gqa)


def _queries(q: Tensor | None, k: Tensor | None, v: Tensor, qv: Tensor | None, gather_kv_indices: Any,
             score_mod_bwd: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k and qv, once those that stand for others are in their places."""
    if gather_kv_indices is not None:
        raise NotImplementedError("gather_kv_indices: expected None: mask_mod tells which keys a query sees")
    if score_mod_bwd is not None:
        raise ValueError("score_mod_bwd: expected None: the derivative follows from score_mod")
    if qv is not None and k is v:
        raise NotImplementedError("qv: expected k and v to be two tensors; for keys that are the values, q and k None")
    if q is None and k is None and qv is not None:
        return qv, v, None
    if q is None or k is None:
        raise ValueError(f"{'q' if q is None else 'k'}: expected a tensor, or q and k None with qv")
    return q, k, qv


def _ends(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """cu_seqlens of packed tensors, or of x [B, S, ...] as if it were."""
    if cu_seqlens is not None:
        return cu_seqlens
    if x.dim() != 4:
        raise ValueError(f"cu_seqlens: expected int32 [B + 1] for packed tensors, got None for {list(x.shape)}")
    return torch.arange(len(x) + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def _mods(score_mod: Any, mask_mod: Any, aux_tensors: Any, aux_scalars: Any,
          info: SeqlenInfo) -> tuple[ScoreMod | None, Mask | None]:
    """The functions as Tilewise's, which stay as they are. Their query index counts from the sequence's first query, with pages
    too, where that of Tilewise's own functions is a position.
    """
    if score_mod is None and mask_mod is None and not (aux_tensors is None and aux_scalars is None):
        raise ValueError("aux_tensors, aux_scalars: expected None without score_mod and mask_mod, which are given them")
    extra = (aux_tensors,) if aux_scalars is None else (aux_tensors, aux_scalars)

    def of_sequence(b) -> SeqlenInfo:
        return SeqlenInfo(*(x[b] if isinstance(x, Tensor) else x for x in info))

    def score(s, b, h, q_idx, kv_idx):
        return score_mod(s, b, h, q_idx, kv_idx, of_sequence(b), *extra)

    def mask(b, h, q_idx, kv_idx):
        return mask_mod(b, h, q_idx, kv_idx, of_sequence(b), *extra)

    for own, given in ((score, score_mod), (mask, mask_mod)):
        own.__name__ = own.__qualname__ = getattr(given, "__name__", own.__name__)
    if score_mod is not None and not isinstance(score_mod, ScoreMod):
        score_mod = ScoreMod(score.__name__, substitute(captured_score(score).expr, "p", Q))
    if mask_mod is not None and not isinstance(mask_mod, Mask):
        mask_mod = Mask(mask.__name__, substitute(captured_mask(mask).element, "p", Q), (), ())
    return score_mod, mask_mod


def _blocks(lists: Any, mask_mod: Mask | None) -> Mask:
    """The mask of BlockSparseTensorsTorch: mask_block_cnt [B, H, rows], mask_block_idx [.., blocks], full_block_.. likewise."""
    if lists.block_size is None:
        raise ValueError("block_sparse_tensors: expected block_size, (queries, keys) of a block, got None")
    full = None if lists.full_block_cnt is None else (lists.full_block_cnt, lists.full_block_idx)
    partial = lists.mask_block_cnt, lists.mask_block_idx
    return from_lists("block_sparse_tensors", partial, full, tuple(lists.block_size), mask_mod)


def _lse(lse: Tensor, wanted: bool, qv: Tensor | None) -> Tensor | None:
    if not wanted and not lse.requires_grad:
        return None
    return lse if qv is None else lse.transpose(-1, -2)
