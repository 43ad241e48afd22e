"""JAX's attention as a function of torch tensors. Memory is shared, nothing is copied; both wait for each other."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor


def attend(implementation: str, device: torch.device) -> tuple[Callable[[Tensor, Tensor, Tensor, bool], Tensor] | None, str]:
    """jax.nn.dot_product_attention, or why there is none. implementation: "cudnn" or "xla"."""
    if importlib.util.find_spec("jax") is None:
        return None, "it is not installed"
    try:
        import jax
        jax.devices("gpu" if device.type == "cuda" else "cpu")
    except Exception as error:  # an installation for another machine fails in many ways
        return None, f"{type(error).__name__}: {error}"[:200]
    return lambda q, k, v, causal: Shared.apply(q, k, v, causal, implementation), ""


@cache
def compiled(implementation: str, causal: bool) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """out; out with its pullback; the pullback's gradients."""
    import jax

    forward = partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    return (jax.jit(forward), jax.jit(lambda q, k, v: jax.vjp(forward, q, k, v)),
            jax.jit(lambda pullback, dout: pullback(dout)))


class Shared(torch.autograd.Function):
    """The forward and backward pass on tensors that both libraries see."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, implementation: str) -> Tensor:
        alone, with_pullback, ctx.gradients = compiled(implementation, causal)
        if any(ctx.needs_input_grad):
            out, ctx.pullback = with_pullback(*map(to_jax, (q, k, v)))
        else:
            out = alone(*map(to_jax, (q, k, v)))
        return to_torch(out)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        return (*map(to_torch, ctx.gradients(ctx.pullback, to_jax(douts[0]))), None, None)


def to_jax(x: Tensor) -> Any:
    import jax

    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return jax.dlpack.from_dlpack(x.detach().contiguous())


def to_torch(x: Any) -> Tensor:
    return torch.from_dlpack(x.block_until_ready())
