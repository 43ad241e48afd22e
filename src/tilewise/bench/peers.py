"""Other implementations of attention that this machine has, each as one function.

Found at run time; what is absent says why. All take q [B, S, H, D], k and v [B, S, H_kv, D] and whether the mask is causal
(S_q = S_k), and return [B, S, H, D].
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw
from tilewise.bench import jax_peer

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

CUDA_ONLY = "it runs on CUDA only"
NO_GRADIENTS = "compiled for the CPU it has no gradients"
SDPA = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa math": SDPBackend.MATH}
OF_GPUS = "sdpa cudnn", "sdpa efficient"
DAO_AI_LAB = {"flash_attn": "flash_attn", "flash_attn 3": "flash_attn_interface", "flash_attn 4": "flash_attn.cute"}


class Contender(NamedTuple):
    """An implementation, or why it is absent.

    dense: it holds whole matrices of scores. compiles: for each shape anew, or on first use. wants_bhsd: in memory, each head's
    rows in one piece. no_gradients: why it has none.
    """
    name: str
    attend: Attend | None
    reason: str = ""
    dense: bool = False
    compiles: bool = False
    wants_bhsd: bool = False
    no_gradients: str = ""


def ours(backend: str) -> Contender:
    """Tilewise on one of its backends."""
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return tw.attention(q, k, v, causal=causal, backend=backend)

    return Contender(backend, attend, compiles=backend != "tiled")


def standard() -> Contender:
    """Standard attention: score matrices in memory."""
    return ours("reference")._replace(name="standard", dense=True, compiles=False)


def discover(device: torch.device) -> list[Contender]:
    """All peers on a device, standard attention last."""
    found = [*(sdpa(name, backend, device) for name, backend in SDPA.items()), flex(device)]
    found += [flash_attn(name, module, device) for name, module in DAO_AI_LAB.items()]
    return [*found, xformers(device), jax(device), standard()]


def function_of(module: str, name: str, device: torch.device) -> tuple[Callable[..., Any] | None, str]:
    """A function of a CUDA library, or why there is none."""
    if device.type != "cuda":
        return None, CUDA_ONLY
    try:
        if importlib.util.find_spec(module) is None:
            return None, "it is not installed"
        return getattr(importlib.import_module(module), name), ""
    except ModuleNotFoundError as error:        # the parent of a module, or what it needs
        return None, "it is not installed" if (error.name or "") in module else str(error)
    except Exception as error:  # a wheel built for another torch fails in many ways
        return None, f"{type(error).__name__}: {error}"[:200]


def sdpa(name: str, backend: SDPBackend, device: torch.device) -> Contender:
    if device.type != "cuda" and name in OF_GPUS:
        return Contender(name, None, CUDA_ONLY)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return Contender(name, attend, dense=backend == SDPBackend.MATH, wants_bhsd=True)


def flex(device: torch.device) -> Contender:
    """FlexAttention, compiled; on a CPU it refuses inputs that require gradients."""
    found = flex_attend(device), flex_attend(device, lambda b, h, q, k: q >= k)
    return Contender("flex", lambda q, k, v, causal: found[causal](q, k, v), compiles=True, wants_bhsd=True,
                     no_gradients="" if device.type == "cuda" else NO_GRADIENTS)


def flex_attend(device: torch.device, mask: Callable | None = None, score: Callable | None = None) -> Callable[..., Tensor]:
    """FlexAttention of q, k, v [B, S, H, D] with functions of the indices; the block mask is made once."""
    from torch.nn.attention.flex_attention import create_block_mask

    @functools.lru_cache(maxsize=16)
    def block_mask(rows: int, cols: int):
        return None if mask is None else create_block_mask(mask, None, None, rows, cols, device=str(device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = block_mask(q.shape[1], k.shape[1])
        q, k, v = (x.transpose(1, 2) if device.type == "cuda" else x.detach().transpose(1, 2) for x in (q, k, v))
        out = compiled_flex()(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return attend


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flash_attn(name: str, module: str, device: torch.device) -> Contender:
    """FlashAttention of Dao-AILab, generations 2, 3 and 4; later ones return (out, lse)."""
    function, reason = function_of(module, "flash_attn_func", device)
    if function is None:
        return Contender(name, None, reason)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        found = function(q, k, v, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    return Contender(name, attend, compiles=module.endswith("cute"))


def xformers(device: torch.device) -> Contender:
    """Grouped heads are an axis of their own, along which k and v are expanded."""
    function, reason = function_of("xformers.ops", "memory_efficient_attention", device)
    lower, _ = function_of("xformers.ops", "LowerTriangularMask", device)
    if function is None or lower is None:
        return Contender("xformers", None, reason)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        bias, group = lower() if causal else None, q.shape[2] // k.shape[2]
        if group == 1:
            return function(q, k, v, attn_bias=bias)
        k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
        return function(q.unflatten(2, (-1, group)), k, v, attn_bias=bias).flatten(2, 3)

    return Contender("xformers", attend)


def jax(device: torch.device) -> Contender:
    """jax.nn.dot_product_attention: cuDNN's kernels on a GPU, XLA's code, with score matrices, on a CPU."""
    on_gpu = device.type == "cuda"
    name = "jax cudnn" if on_gpu else "jax"
    attend, reason = jax_peer.attend("cudnn" if on_gpu else "xla", device)
    return Contender(name, attend, reason, dense=not on_gpu, compiles=True)
