"""Other implementations of attention that this machine has, each as one function.

Found at run time; what is absent says why. All take q [B, S, H, D], k and v [B, S, H_kv, D] and whether the mask is causal
(S_q = S_k), and return [B, S, H, D].
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

SDPA = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa math": SDPBackend.MATH}


class Contender(NamedTuple):
    """An implementation, or why it is absent.

    dense: it holds whole matrices of scores; compiles: for each shape anew, or on first use.
    """
    name: str
    attend: Attend | None
    reason: str = ""
    dense: bool = False
    compiles: bool = False


def ours(backend: str) -> Contender:
    """Tilewise on one of its backends."""
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return tw.attention(q, k, v, causal=causal, backend=backend)

    return Contender(backend, attend, compiles=backend != "tiled")


def discover(device: torch.device) -> list[Contender]:
    """All peers on a device, standard attention last."""
    return [*(_sdpa(name, backend, device) for name, backend in SDPA.items()), _flex(device), _flash_attn(device),
            ours("reference")._replace(name="standard", dense=True, compiles=False)]


def _sdpa(name: str, backend: SDPBackend, device: torch.device) -> Contender:
    if device.type != "cuda" and backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        return Contender(name, None, "it runs on CUDA only")

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return Contender(name, attend, dense=backend == SDPBackend.MATH)


def _flex(device: torch.device) -> Contender:
    return flex() if device.type == "cuda" else Contender("flex", None, "compiled for the CPU it has no gradients")


def flex() -> Contender:
    """FlexAttention, compiled."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        return Contender("flex", None, str(error))
    compiled = torch.compile(flex_attention, dynamic=False)

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx >= kv_idx

    @functools.lru_cache(maxsize=16)
    def block_mask(rows: int, cols: int, where: torch.device):
        return create_block_mask(visible, None, None, rows, cols, device=where)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        mask = block_mask(q.shape[1], k.shape[1], q.device) if causal else None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return Contender("flex", attend, compiles=True)


def _flash_attn(device: torch.device) -> Contender:
    if device.type != "cuda":
        return Contender("flash_attn", None, "it runs on CUDA only")
    if importlib.util.find_spec("flash_attn") is None:
        return Contender("flash_attn", None, "it is not installed")
    try:
        function = importlib.import_module("flash_attn").flash_attn_func
    except Exception as error:  # a wheel built for another torch fails in many ways
        return Contender("flash_attn", None, f"{type(error).__name__}: {error}"[:200])
    return Contender("flash_attn", lambda q, k, v, causal: function(q, k, v, causal=causal))
