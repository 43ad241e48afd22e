"""The front door: these docstrings are the manual."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewise import ops
from tilewise.masks import Mask
from tilewise.plan import Plan, plan
from tilewise.problem import make
from tilewise.rng import Rng
from tilewise.score_mods import Mods


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Mask | Callable | Tensor | None = None,
              score_mod: Mods = None, bias: Tensor | None = None,
              sinks: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0, return_lse: bool = False,
              rng: Rng | None = None, deterministic: bool | None = None, batch_invariant: bool = False,
              layout: str = "bshd", backend: str = "auto") -> Any:
    """Exact attention, softmax(scale * q k^T + ...) v, in memory linear in the sequence lengths.

    FlashAttention (Dao et al. 2022) with the schedule of FlashAttention-2 (Dao 2023). For query i and key j:

        s = scale * q_i . k_j -> score_mod -> + bias -> mask -> softmax, a sink in its denominator -> dropout -> @ v

    Args:
        q: [B, S_q, H, D] (layout="bshd") or [B, H, S_q, D] (layout="bhsd"); fp16, bf16, fp32 or fp64. Any strides with a
            contiguous last dimension; nothing is copied.
        k: like q with S_k keys and H_kv heads; H_kv divides H and query head h reads key head h // (H // H_kv)
            (grouped-query attention; H_kv = 1 is multi-query).
        v: like k; its head dim D_v may differ. D and D_v are 1 to 512.
        causal: query i sees keys j <= i + S_k - S_q (aligned bottom-right). Combines with `mask` by &.
        mask: which keys a query sees: `tw.causal()`, `tw.window(left, right)`, `tw.prefix(n)`, `tw.documents(ids)`,
            `tw.key_lengths(n)`, `tw.chunked(size)`, `tw.block_mask(layout)`, any function mask_mod(b, h, q_idx, kv_idx)
            (`tw.mask_mod`), their combinations with & | ~, or a boolean tensor that broadcasts to [B, H, S_q, S_k] (True:
            visible).
        score_mod: `tw.softcap(c)`, `tw.alibi(slopes)`, any function score_mod(score, b, h, q_idx, kv_idx)
            (`tw.score_mod`), or a sequence of them, applied in order.
        bias: added to the scores; floating, broadcasts to [B, H, S_q, S_k]; differentiable. -inf hides a key.
        sinks: [H], one logit per query head in the softmax denominator only; differentiable.
        scale: factor of the products, default D ** -0.5.
        dropout_p: in [0, 1), on the probabilities, after lse is taken.
        return_lse: also return the log-sum-exp of each row's scores.
        rng: where dropout's bits come from; default: drawn from the device's default generator. The same `tw.Rng` drops the
            same elements on every backend.
        deterministic: whether gradients must be bitwise repeatable (the forward always is). Default:
            `torch.are_deterministic_algorithms_enabled()`.
        batch_invariant: a row's bits do not depend on which other queries and sequences share the call.
        layout: "bshd" or "bhsd".
        backend: "auto", "triton", "tiled" or "reference"; a backend named runs or raises.

    Returns:
        out [B, S_q, H, D_v] (or [B, H, S_q, D_v]) in q's dtype; with return_lse, (out, lse), lse [B, H, S_q] in fp32
        (fp64 for fp64), natural logarithm, differentiable. A row that sees no key gives out 0, lse -inf (with a sink: the
        sink) and gradients 0.

    Under autocast, fp32 inputs are cast to the autocast dtype.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what was expected and what came.
        NotImplementedError: the named backend cannot compute this.
    """
    q, k, v = autocast(q, k, v)
    problem, operands = make(q, k, v, causal=causal, mask=mask, score_mod=score_mod, bias=bias, sinks=sinks, scale=scale,
                             dropout_p=dropout_p, rng=rng, deterministic=deterministic, batch_invariant=batch_invariant,
                             layout=layout)
    out, lse = ops.attention(problem, operands, backend)
    if layout == "bshd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def explain(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", layout: str = "bshd", **options) -> Plan:
    """What `attention` with the same arguments would do: a `Plan`, to print or to read.

    It names the backend and why not the ones before it, tile sizes and how many tiles the mask leaves, FLOPs, bytes from and
    to memory, and memory beside inputs and outputs. Nothing is computed. Options and errors are those of `attention`.
    """
    options.pop("return_lse", None)
    if options.get("rng") is None:
        options["rng"] = Rng(0)  # nothing is drawn: the generator stays where it is
    problem, operands = make(*autocast(q, k, v), layout=layout, **options)
    return plan(problem, operands, backend)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """fp32 tensors in the autocast dtype, where autocast is on for their device."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in tensors)
