"""Who takes part in FlashAttention's benchmark: each method makes, from a setting's inputs, a function out = attend(q, k, v).

A method that cannot do a setting raises NotImplementedError with the reason. Everyone has what serves him best: masks and lists
of blocks are built before the clock runs.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

import tilewise as tw
from tilewise import backends
from tilewise.bench.paper.inputs import SEED, Attend, Inputs, Setting
from tilewise.bench.peers import NO_GRADIENTS
from tilewise.bench.suite import Wanted
from tilewise.problem import make

BLOCK = 64              # rows and columns of a block of the butterfly
MATRICES = 5            # scores, probabilities, what dropout leaves of them, and gradients
COMPRESSED = 8, 256     # FlashAttention, appendix E.6: a row keeps an eighth of its keys, at most 256


class Method(NamedTuple):
    """prepare: makes the function for some inputs. matrices: of scores that forward and backward hold at once.

    own_dropout: its random bits are not ours. sparse: only the butterfly's blocks count. wants_bhsd: in memory, each head's
    rows in one piece.
    """
    name: str
    prepare: Callable[[Inputs], Attend]
    matrices: int = 0
    own_dropout: bool = False
    sparse: bool = False
    wants_bhsd: bool = False


def methods(setting: Setting, wanted: Wanted) -> list[Method]:
    """Ours dense and block-sparse, then what a user of PyTorch has. "sdpa" falls back to matrices for dropout on a CPU."""
    falls_back = wanted.device.type != "cuda" and setting.dropout > 0
    return [*ours(setting, wanted), Method("tilewise block-sparse", block_sparse, sparse=True),
            Method("standard", standard, MATRICES, own_dropout=True, wants_bhsd=True),
            Method("sdpa", sdpa, MATRICES * falls_back, own_dropout=True, wants_bhsd=True),
            Method("flex", flex, wants_bhsd=True)]


def ours(setting: Setting, wanted: Wanted) -> list[Method]:
    """"tilewise", on the backend that backend="auto" takes; and those that are asked for, such as "tilewise hopper"."""
    q = torch.empty(1, 16, 1, setting.head_dim, dtype=setting.kind, device=wanted.device)
    problem, _ = make(q, q, q, dropout_p=setting.dropout, rng=SEED)
    serving = next(name for name in backends.AUTO if backends.load(name).volunteers(problem) is None)
    asked = [name for name in wanted.also if name != serving and backends.load(name).supports(problem) is None]
    return [Method("tilewise", partial(on_backend, serving)),
            *(Method(f"tilewise {name}", partial(on_backend, name)) for name in asked)]


def on_backend(backend: str, x: Inputs) -> Attend:
    mask = tw.key_lengths(x.lengths) if x.setting.padding else None
    rng = SEED if x.setting.dropout else None
    return partial(tw.attention, mask=mask, dropout_p=x.setting.dropout, rng=rng, backend=backend)


def butterfly(seqlen: int) -> Tensor:
    """The fixed butterfly over blocks that keeps as many keys as the paper's budget allows, a row's own block at least.

    seqlen: a power of two, BLOCK at least.
    """
    blocks = max(1, seqlen // BLOCK)
    share, most = COMPRESSED
    kept = max(1, min(seqlen // share, most) // BLOCK)
    return tw.patterns.butterfly(blocks, factors=min(kept - 1, blocks.bit_length() - 1))


def block_sparse(x: Inputs) -> Attend:
    """Block-sparse FlashAttention."""
    mask: tw.Mask = tw.block_mask(butterfly(x.setting.seqlen).to(x.device), block_size=BLOCK)
    if x.setting.padding:
        mask = mask & tw.key_lengths(x.lengths)
    return partial(tw.attention, mask=mask, dropout_p=x.setting.dropout, rng=SEED if x.setting.dropout else None)


def standard(x: Inputs) -> Attend:
    """Standard attention as PyTorch's users write it: the papers' "PyTorch"."""
    s, cols = x.setting, torch.arange(x.setting.seqlen, device=x.device)
    hidden = (cols >= x.lengths[:, None])[:, None, None] if s.padding else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        scores = (q * s.head_dim ** -0.5) @ k.mT
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return (dropout(torch.softmax(scores, -1), s.dropout) @ v).transpose(1, 2)

    return attend


def sdpa(x: Inputs) -> Attend:
    """torch's scaled_dot_product_attention, which chooses among its kernels."""
    s = x.setting
    mask = (torch.arange(s.seqlen, device=x.device) < x.lengths[:, None])[:, None, None] if s.padding else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return scaled_dot_product_attention(q, k, v, mask, s.dropout).transpose(1, 2)

    return attend


def flex(x: Inputs) -> Attend:
    """FlexAttention, compiled."""
    s, lengths = x.setting, x.lengths
    if x.device.type != "cuda":
        raise NotImplementedError(NO_GRADIENTS)
    if s.dropout:
        raise NotImplementedError("it has no dropout")
    attention, block_mask = compiled_flex()
    mask = None
    if s.padding:
        mask = block_mask(lambda b, h, q, k: k < lengths[b], s.batch, None, s.seqlen, s.seqlen, device=x.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return attention(q, k, v, block_mask=mask).transpose(1, 2)

    return attend


@cache
def compiled_flex() -> tuple[Any, Any]:
    """flex_attention and create_block_mask: uncompiled, the latter holds whole masks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask)
