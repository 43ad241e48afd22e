"""flash-attn 2's forward and backward as two calls without autograd, which programs import that share a sequence out among
devices (ring attention, context parallelism):

    out, softmax_lse, _, rng_state = _flash_attn_forward(q, k_block, v_block, ...)      for each block of keys, then merged
    _flash_attn_backward(dout, q, k_block, v_block, out, softmax_lse, dq, dk, dv, ..., rng_state)

`out` and `softmax_lse` of the backward may be those of attention to more keys than it is given: the gradients are then this
block's part of the whole (FlashAttention, Algorithm 4: P = exp(S - lse), D = rowsum(dO * O)).

Arguments, their order and results are those of flash-attn 2.8; `flash_attn_interface` says what they mean. Beyond: backend. The
functions are undecorated, since those libraries read their defaults by `inspect.getfullargspec`.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise import backends, calls, found, plan
from tilewise.backends import Needs
from tilewise.compat.flash_calls import integer, rows_contiguous
from tilewise.compat.flash_options import options
from tilewise.kv_cache import check_tensor
from tilewise.problem import DENSE, Layout, Operands, Problem
from tilewise.rng import Rng
from tilewise.sequences import packed_rows

Three = tuple[Tensor, Tensor, Tensor]


def flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool,
                       window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
                       alibi_slopes: Tensor | None = None, return_softmax: bool = False, *,
                       backend: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [B, S_q, H, D_v], softmax_lse [B, H, S_q], empty, rng_state int64 [3]) of q, k, v [B, S, H, D]."""
    given = _options(dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes, backend)
    return _forward(q, k, v, given, DENSE, return_softmax)


def flash_attn_varlen_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                              max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, causal: bool,
                              window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
                              alibi_slopes: Tensor | None = None, return_softmax: bool = False,
                              block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
                              seqused_k: Tensor | None = None, zero_tensors: bool = False, *,
                              backend: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of packed q, k, v [total, H, D]; softmax_lse [H, total_q]. zero_tensors: nothing is left unwritten anyway."""
    for name, x in (("block_table", block_table), ("leftpad_k", leftpad_k)):
        if x is not None:
            raise NotImplementedError(f"{name}: expected None: flash_attn_varlen_func and flash_attn_with_kvcache take it")
    given = _options(dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes, backend)
    where = _packed(q, k, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), seqused_k)
    return _forward(q, k, v, given, where, return_softmax)


def flash_attn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
                        dv: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool, window_size_left: int,
                        window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
                        rng_state: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Writes dq, dk and dv; returns rowsum(dout * out), fp32 [B, H, S_q]."""
    given = _options(dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes, backend,
                     deterministic)
    return _backward((q, k, v), given, DENSE, (out, softmax_lse, dout), (dq, dk, dv), rng_state)


def flash_attn_varlen_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor,
                               dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                               max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, causal: bool,
                               window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
                               deterministic: bool, rng_state: Tensor | None = None, zero_tensors: bool = False, *,
                               backend: str = "auto") -> Tensor:
    """The same of packed tensors; softmax_lse and the result [H, total_q]."""
    given = _options(dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes, backend,
                     deterministic)
    where = _packed(q, k, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), None)
    return _backward((q, k, v), given, where, (out, softmax_lse, dout), (dq, dk, dv), rng_state)


def _options(dropout_p: float, softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float,
             alibi_slopes: Tensor | None, backend: str, deterministic: bool = False) -> dict[str, Any]:
    return options(dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
                   alibi_slopes=alibi_slopes, deterministic=deterministic, backend=backend)


def _packed(q: Tensor, k: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[Any, Any], seqused_k: Tensor | None) -> Layout:
    q_rows, longest_q = packed_rows("q", ends[0], None, len(q), integer(longest[0]), q.device, False)
    k_rows, longest_k = packed_rows("k", ends[1], seqused_k, len(k), integer(longest[1]), q.device, False)
    if len(q_rows) != len(k_rows):
        raise ValueError(f"cu_seqlens_k: expected as many sequences as cu_seqlens_q ({len(q_rows)}), got {len(k_rows)}")
    return Layout(q_rows, k_rows, max_seqlen_q=longest_q, max_seqlen_k=longest_k)


def _described(tensors: Three, given: dict[str, Any], where: Layout,
               rng: Rng | None) -> tuple[Problem, Operands, str]:
    own = {name: value for name, value in given.items() if name != "backend"}
    q, k, v = map(rows_contiguous, tensors)
    problem, x = calls.described(q, k, v, calls.Options(**own, rng=rng), where)
    return problem, x, plan.choose(problem, given["backend"])


@torch.no_grad()
def _forward(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any], where: Layout,
             return_softmax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if return_softmax:
        raise NotImplementedError("return_softmax: expected False: return_attn_probs of flash_attn_func gives S_dmask")
    problem, x, backend = _described((q, k, v), given, where, None)
    out, lse, _ = found.through_ops(problem, x, backend)
    state = torch.zeros(3, dtype=torch.int64, device=q.device) if x.rng is None else x.rng
    return out, torch.where(lse == -torch.inf, torch.inf, lse), q.new_empty(0), state


@torch.no_grad()
def _backward(tensors: Three, given: dict[str, Any], where: Layout, of_forward: Three,
              into: Three, rng_state: Tensor | None) -> Tensor:
    problem, x, backend = _described(tensors, given, where, Rng(0))     # nothing is drawn
    if problem.dropout:
        check_tensor("rng_state", rng_state, (3,), (torch.int64,), x.q.device)
        x = x._replace(rng=rng_state)
    out, lse, dout = map(rows_contiguous, of_forward)
    q, _, v = tensors
    packed = where is not DENSE
    for name, x_given in (("out", out), ("dout", dout)):
        check_tensor(name, x_given, (*q.shape[:-1], v.shape[-1]), (q.dtype,), q.device)
    rows = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    check_tensor("softmax_lse", lse, rows, (torch.float32, torch.float64), q.device)
    for name, buffer, like in zip(("dq", "dk", "dv"), into, tensors, strict=True):
        check_tensor(name, buffer, tuple(like.shape), (like.dtype,), like.device)
    module = backends.load(backend)
    if not hasattr(module, "backward"):
        raise NotImplementedError(f"backend={backend!r} has no backward of its own: autograd derives it from its forward")
    lse = torch.where(lse == torch.inf, -torch.inf, lse)
    gradients = module.backward(problem, x, found.heads_first(out, "bshd"), lse[None] if packed else lse,
                                found.heads_first(dout, "bshd"), None, Needs(False, False))
    for buffer, gradient in zip(into, gradients, strict=False):
        buffer.copy_(found.given_order(gradient, "bshd", packed))
    return (dout.float() * out.float()).sum(-1).movedim(-1, -2).contiguous()
