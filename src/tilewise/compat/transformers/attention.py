"""The attention function that models of transformers call."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from tilewise import masks
from tilewise.api import attention, attention_varlen
from tilewise.compat.flex import from_torch
from tilewise.compat.transformers.masking import AttentionMask
from tilewise.masks import Mask
from tilewise.score_mods import softcap as capped
from tilewise.trace.memo import Memo

# What other implementations act on and this one does not; models pass on much else that no attention function looks at.
REFUSED = {
    "cache": "the paged cache of continuous batching", "block_table": "a paged cache", "head_mask": "a mask over heads",
    "layer_head_mask": "a mask over heads", "indices": "keys chosen by an indexer",
    "block_indices": "blocks of keys chosen by an indexer", "sinks": "sinks under this name (s_aux is known)"}


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                      attention_mask: AttentionMask | BlockMask | Tensor | None, scaling: float | None = None,
                      dropout: float = 0.0, *, is_causal: bool | None = None, sliding_window: int | None = None,
                      softcap: float | None = None, s_aux: Tensor | None = None, position_bias: Tensor | None = None,
                      cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
                      output_attentions: bool | None = None, deterministic: bool | None = None, backend: str = "auto",
                      **others: Any) -> tuple[Tensor, None]:
    """(out [B, S_q, H, D_v], None) of query [B, H, S_q, D], key [B, H_kv, S_k, D] and value [B, H_kv, S_k, D_v].

    attention_mask: made by `masking.index_mask`; or a boolean tensor (True: visible) or a floating one (added to the
        scores) that broadcasts to [B, H, S_q, S_k]; or torch's BlockMask. It says all about who sees whom: is_causal and
        sliding_window count without it only.
    is_causal: default module.is_causal. sliding_window: keys that a query sees, itself included; to each side if not causal.
    softcap: `tw.softcap`. s_aux: [H], sinks. position_bias: `tw.attention`'s bias.
    cu_seq_lens_q, cu_seq_lens_k: [sequences + 1]: sequences packed in a batch of one, which do not see each other.

    Raises:
        NotImplementedError: output_attentions, or an argument that changes attention in a way this function does not know.
        ValueError, TypeError: a mask is not as described.
    """
    if output_attentions or getattr(getattr(module, "config", None), "output_attentions", False):
        raise NotImplementedError("output_attentions: the probabilities are never in memory as a whole: load the model with "
                                  'attn_implementation="eager" to look at them')
    for name, what in REFUSED.items():
        if others.get(name) is not None:
            raise NotImplementedError(f"{name}: {what}, which attn_implementation=\"tilewise\" does not know")
    q, k, v = (x.transpose(1, 2) if x.stride(-1) == 1 else x.transpose(1, 2).contiguous() for x in (query, key, value))
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    ends = _ends(cu_seq_lens_q, cu_seq_lens_k, shape)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = dict(score_mod=None if softcap is None else capped(softcap), sinks=s_aux, scale=scaling,
                                   dropout_p=dropout, deterministic=deterministic, backend=backend)
    if ends is not None and attention_mask is None and position_bias is None:
        mask = _near(causal, sliding_window)
        return attention_varlen(q[0], k[0], v[0], *ends, causal=causal, mask=mask, **options)[None], None
    mask, bias = _mask_and_bias(attention_mask, shape, query.device)
    if attention_mask is None:
        mask = _implied(causal, sliding_window, shape)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    if ends is not None:
        own = _apart(ends, shape)
        mask = own if mask is None else mask & own
    return attention(q, k, v, mask=mask, bias=bias, **options), None


def _mask_and_bias(given: Any, shape: tuple[int, int, int, int], device: torch.device) -> tuple[Mask | None, Tensor | None]:
    """Of an attention_mask: who sees whom, and what is added to the scores."""
    if given is None:
        return None, None
    if isinstance(given, AttentionMask):
        if given.shape[0] not in (1, shape[0]) or given.shape[2:] != shape[2:]:
            raise ValueError(f"attention_mask: expected one of [B, 1, S_q, S_k] = {[shape[0], 1, *shape[2:]]}, got {given}")
        return given.to(device).mask, None
    if isinstance(given, BlockMask):
        return from_torch(given), None
    if not isinstance(given, Tensor) or given.dim() != 4 or not (given.dtype == torch.bool or given.is_floating_point()):
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"attention_mask: expected a boolean or floating tensor that broadcasts to [B, H, S_q, S_k] = "
                        f"{list(shape)}, or a mask made by transformers, got {got}")
    return (masks.from_tensor(given), None) if given.dtype == torch.bool else (None, given)


def _implied(causal: bool, sliding_window: int | None, shape: tuple[int, int, int, int]) -> Mask | None:
    """Who sees whom where the model gave no mask."""
    *_, nq, nk = shape
    if sliding_window is not None and nk <= sliding_window:
        sliding_window = None
    if nq not in (1, nk) and (causal or sliding_window is not None):
        raise ValueError(f"attention_mask: expected a mask where {nq} queries meet {nk} keys, causal or in a window: without "
                         "one it is not said which key stands at the first query")
    if sliding_window is None:
        return masks.causal() if causal and nq > 1 else None
    return _near(causal, sliding_window)


def _near(causal: bool, sliding_window: int | None) -> Mask | None:
    return None if sliding_window is None else masks.window(sliding_window - 1, 0 if causal else sliding_window - 1)


def _ends(cu_q: Tensor | None, cu_k: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor] | None:
    """Where packed sequences end, in queries and in keys."""
    if cu_q is None:
        return None
    if shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: expected packed sequences in a batch of 1, got a batch of {shape[0]}")
    return cu_q, cu_q if cu_k is None else cu_k


_documents = Memo()


def _apart(ends: tuple[Tensor, Tensor], shape: tuple[int, int, int, int]) -> Mask:
    """Packed sequences as documents; the same mask for all layers of a forward pass."""
    def ids(ends: Tensor, n: int) -> Tensor:
        return torch.searchsorted(ends, torch.arange(n, device=ends.device, dtype=ends.dtype), right=True)

    return _documents.get(shape[2:], ends, lambda: masks.documents(*map(ids, ends, shape[2:])))
