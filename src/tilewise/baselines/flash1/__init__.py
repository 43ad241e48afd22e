"""FlashAttention as first published (Dao et al. 2022, arXiv 2205.14135): the outer loop is over keys and values, the inner
one over queries, and O, l and m are read and written at every step: the order that FlashAttention-2 turned round
(`docs/algorithm.md`).

    algorithms.py   Algorithms 1, 2, 4 and 5 in torch, line by line
    kernels.py      the same as two Triton kernels, one program per head; `launch.py`, `aot.py`
    blocks.py       block sizes from the size of fast memory; the block form of a mask

For study: what the traffic model counts and what benchmarks name "FlashAttention (2022)". `tilewise.attention` is for use.
"""
from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewise.baselines.flash1 import algorithms
from tilewise.baselines.flash1.algorithms import State
from tilewise.baselines.flash1.blocks import SRAM_OF_A100, Blocks, in_registers, of_kernels, of_memory
from tilewise.baselines.flash1.blocks import published as published
from tilewise.masks import Mask
from tilewise.problem import Operands, Problem, make
from tilewise.rng import Rng

BACKENDS = ("torch", "triton")


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Callable | Tensor | None = None, dropout_p: float = 0.0,
              rng: Rng | None = None, scale: float | None = None, block_sizes: tuple[int, int] | None = None,
              sram: int | None = None, layout: str = "bshd", return_l_m: bool = False,
              backend: str = "torch") -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """softmax(scale q k^T, masked) v by Algorithm 2, with a mask by Algorithm 5; gradients of q, k and v by Algorithm 4.

    q, k, v      as in `tilewise.attention`: [batch, seqlen, heads, head_dim], or [batch, heads, seqlen, head_dim] with
                 layout="bhsd"; as many heads in k and v as in q, as in the paper; fp16, bf16, fp32, and fp64 in torch
    mask         as in `tilewise.attention`: None, a mask such as `tw.causal() & tw.key_lengths(n)` or `tw.block_mask(layout)`,
                 a function or a boolean tensor. Blocks that it hides are skipped, elements are looked at in the others
    dropout_p, rng, scale   as in `tilewise.attention`: the same bits are dropped
    block_sizes  (Br, Bc): queries and keys of a block; in Triton powers of two from 16 and 32
    sram         M of Algorithm 1, line 1, in elements: Bc = ceil(M / 4d), Br = min(Bc, d); in Triton rounded down to powers
                 of two. Neither: in torch M is that of an A100 (192 KB); in Triton blocks are those of the paper's CUDA kernels
                 (`published(d)`), in the backward smaller ones that fit into registers (`in_registers`)
    return_l_m   also return l and m, fp32 (fp64 for fp64) [B, H, S_q]: the sum of exp(s - m) of each row and its largest score,
                 without gradient; 0 and -inf for a row without keys
    backend      "torch": on any device; "triton": on GPUs, and in Triton's interpreter

    Returns out in q's dtype and layout, or (out, l, m). Raises TypeError or ValueError naming a wrong argument, and
    NotImplementedError for grouped heads and what a backend cannot compute.
    """
    problem, x = make(q, k, v, mask=mask, dropout_p=dropout_p, rng=rng, scale=scale, layout=layout)
    how = _backend(problem, backend)
    out, l, m = _FlashAttention1.apply(x.q, x.k, x.v, problem, x, _blocks(problem, block_sizes, sram, backend), how)
    out = out.transpose(1, 2) if layout == "bshd" else out
    return (out, l, m) if return_l_m else out


def after_each_block(q: Tensor, k: Tensor, v: Tensor, *, block_sizes: tuple[int, int] | None = None, sram: int | None = None,
                     **options):
    """Iterates over the forward of `attention` in torch: State(O, l, m), [B, H, S_q, ..] in fp32 (fp64), before the first block
    of keys and after each. The tensors are the same each time, and written to by the next step."""
    problem, x = make(q, k, v, **options)
    _backend(problem, "torch")
    return algorithms.after_each_block(problem, x, _blocks(problem, block_sizes, sram, "torch")[0])


def _backend(problem: Problem, backend: str) -> ModuleType:
    """The module whose `forward` and `backward` compute."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if problem.group != 1:
        raise NotImplementedError(f"flash1 cannot compute this: {problem.kv_heads} key heads for {problem.heads} query heads "
                                  "(the paper has as many of both)")
    if backend == "torch":
        return algorithms
    from tilewise.backends.gpu_math import NOT_INSTALLED, triton_version
    if triton_version() is None:
        raise NotImplementedError(f"flash1 cannot compute this in Triton: {NOT_INSTALLED}")
    from tilewise.baselines.flash1 import launch
    reason = launch.missing(problem)
    if reason is not None:
        raise NotImplementedError(f"flash1 cannot compute this in Triton: {reason}")
    return launch


def _blocks(problem: Problem, block_sizes: tuple[int, int] | None, sram: int | None, backend: str) -> tuple[Blocks, Blocks]:
    """Of the forward and of the backward."""
    d, itemsize = max(problem.head_dim, problem.head_dim_v), problem.dtype.itemsize
    if block_sizes is not None:
        if sram is not None:
            raise ValueError("sram: expected None with block_sizes, which it would determine")
        return (_checked(block_sizes, backend),) * 2
    if sram is not None and (isinstance(sram, bool) or not isinstance(sram, int) or sram < 1):
        raise ValueError(f"sram: expected None or a number of elements >= 1, got {sram!r}")
    if backend == "torch":
        return (of_memory(SRAM_OF_A100 // itemsize if sram is None else sram, d),) * 2
    if sram is not None:
        return (of_kernels(of_memory(sram, d)),) * 2
    major = torch.cuda.get_device_capability(problem.device)[0] if problem.device.type == "cuda" else 9
    return in_registers(d, itemsize, major)


def _checked(block_sizes: tuple[int, int], backend: str) -> Blocks:
    sizes = tuple(block_sizes) if isinstance(block_sizes, (tuple, list)) else ()
    if len(sizes) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"block_sizes: expected (queries, keys), two integers >= 1, got {block_sizes!r}")
    blocks = Blocks(*sizes)
    if backend == "triton" and of_kernels(blocks) != blocks:
        raise ValueError(f"block_sizes: expected powers of two, at least 16 queries and 32 keys, in Triton, got {sizes}")
    return blocks


class _FlashAttention1(torch.autograd.Function):
    """Saved for the backward: Q, K, V, O, l, m and the state R of the generator (the mask's tensors too)."""

    @staticmethod
    def forward(ctx, q, k, v, problem: Problem, x: Operands, blocks: tuple[Blocks, Blocks], how: ModuleType):
        state = how.forward(problem, x, blocks[0])
        out = problem.new_q(problem.head_dim_v).copy_(state.O)
        ctx.save_for_backward(q, k, v, out, state.l, state.m, x.rng, *x.captured)
        ctx.problem, ctx.blocks, ctx.how, ctx.numbers = problem, blocks, how, (x.ints, x.floats)
        ctx.mark_non_differentiable(state.l, state.m)
        return out, state.l, state.m

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *_):
        q, k, v, out, l, m, rng, *captured = ctx.saved_tensors
        ints, floats = ctx.numbers
        x = Operands(q, k, v, rng=rng, captured=captured, ints=ints, floats=floats)
        return *ctx.how.backward(ctx.problem, x, State(out, l, m), dout, ctx.blocks[1]), None, None, None, None
