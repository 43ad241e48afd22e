"""Who takes part: each is a function of q, k, v [1, S, H, D] that returns out [1, S_q, H, D] and lse [1, H, S_q] or None."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw
from tilewise import backends
from tilewise.bench.numerics.inputs import Setting
from tilewise.bench.peers import CUDA_ONLY, OF_GPUS, SDPA, function_of
from tilewise.problem import make

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
STANDARD = "standard"


class Method(NamedTuple):
    """attend: None, and the reason, if it cannot."""
    name: str
    attend: Attend | None
    reason: str = ""


def methods(setting: Setting, device: torch.device) -> list[Method]:
    """Our backends, in the order of backend="auto", then peers, then standard attention in the same dtype."""
    return [*(ours(name, setting, device) for name in backends.AUTO), *(sdpa(name, setting, device) for name in SDPA),
            flash_attn(setting, device), Method(STANDARD, partial(on_backend, "reference", setting.causal))]


def ours(backend: str, setting: Setting, device: torch.device) -> Method:
    q, k = (torch.empty(1, n, setting.heads, setting.head_dim, dtype=getattr(torch, setting.dtype), device=device)
            for n in (setting.seqlen_q, setting.seqlen_k))
    reason = backends.load(backend).supports(make(q, k, k, causal=setting.causal)[0])
    name = f"{backend} (interpreter)" if backend == "triton" and device.type != "cuda" and reason is None else backend
    return Method(name, None, reason) if reason else Method(name, partial(on_backend, backend, setting.causal))


def on_backend(backend: str, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    return tw.attention(q, k, v, causal=causal, return_lse=True, backend=backend)


def sdpa(name: str, setting: Setting, device: torch.device) -> Method:
    if device.type != "cuda" and name in OF_GPUS:
        return Method(name, None, CUDA_ONLY)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        from torch.nn.attention.bias import causal_lower_right
        square = setting.seqlen_q == setting.seqlen_k
        mask = causal_lower_right(setting.seqlen_q, setting.seqlen_k) if setting.causal and not square else None
        with sdpa_kernel(SDPA[name]):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=setting.causal and square)
        return out.transpose(1, 2), None

    return Method(name, attend)


def flash_attn(setting: Setting, device: torch.device) -> Method:
    """FlashAttention-2 of Dao-AILab."""
    function, reason = function_of("flash_attn", "flash_attn_func", device)
    if function is None:
        return Method("flash_attn", None, reason)
    return Method("flash_attn", lambda q, k, v: (function(q, k, v, causal=setting.causal), None))
