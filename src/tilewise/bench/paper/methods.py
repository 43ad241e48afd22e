"""Who takes part in the papers' benchmarks: each method makes, from a setting's inputs, a function out = attend(q, k, v).

A method that cannot do a setting raises NotImplementedError with the reason. Everyone has what serves him best: masks and lists
of blocks are built before the clock runs.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

import tilewise as tw
from tilewise import backends
from tilewise.bench import peers
from tilewise.bench.paper.inputs import SEED, Attend, Inputs, Setting
from tilewise.problem import make

BLOCK = 64              # rows and columns of a block of the butterfly
COMPRESSED = 8, 256     # FlashAttention, appendix E.6: a row keeps an eighth of its keys, at most 256


class Method(NamedTuple):
    """prepare: makes the function for some inputs. matrices: of scores that forward and backward hold at once.

    own_dropout: its random bits are not ours; sparse: only the butterfly's blocks count.
    """
    name: str
    prepare: Callable[[Inputs], Attend]
    matrices: int = 0
    own_dropout: bool = False
    sparse: bool = False


def ours(setting: Setting, device: torch.device) -> list[Method]:
    """"tilewise", the backend that backend="auto" takes, and our others that can: "tilewise hopper" and the like.

    `tiled` is left out where there are kernels.
    """
    q = torch.empty(1, 16, 1, setting.head_dim, dtype=setting.kind, device=device)
    problem, _ = make(q, q, q, causal=setting.causal, dropout_p=setting.dropout, rng=SEED)
    willing = [name for name in backends.AUTO if backends.load(name).volunteers(problem) is None]
    able = [name for name in backends.AUTO if name not in willing and backends.load(name).supports(problem) is None]
    first, *others = (name for name in [*willing, *able] if name != "tiled" or willing == ["tiled"])
    return [Method("tilewise", partial(on_backend, first)),
            *(Method(f"tilewise {name}", partial(on_backend, name)) for name in others)]


def on_backend(backend: str, x: Inputs) -> Attend:
    mask = tw.key_lengths(x.lengths) if x.setting.padding else None
    return partial(tw.attention, causal=x.setting.causal, mask=mask, dropout_p=x.setting.dropout,
                   rng=SEED if x.setting.dropout else None, backend=backend)


def butterfly(seqlen: int) -> Tensor:
    """The fixed butterfly over blocks that keeps as many keys as the paper's budget allows, its own block at least."""
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
    hidden = cols[:, None] < cols if s.causal else None
    if s.padding:
        hidden = (cols >= x.lengths[:, None])[:, None, None]

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
        return scaled_dot_product_attention(q, k, v, mask, s.dropout, s.causal).transpose(1, 2)

    return attend


def flex(x: Inputs) -> Attend:
    """FlexAttention, compiled."""
    s, lengths = x.setting, x.lengths
    if x.device.type != "cuda":
        raise NotImplementedError("compiled for the CPU it has no gradients")
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


def from_peer(peer: peers.Contender) -> Method:
    """Another implementation of plain attention."""
    def prepare(x: Inputs) -> Attend:
        attend = peer.attend
        if attend is None:
            raise NotImplementedError(peer.reason)
        return lambda q, k, v: attend(q, k, v, x.setting.causal)

    return Method(peer.name, prepare, 5 if peer.dense else 0)


STANDARD = Method("standard", standard, 5, own_dropout=True)


def of_flash_attention(setting: Setting, device: torch.device) -> list[Method]:
    """Ours dense and block-sparse, then what a user of PyTorch has."""
    falls_back = device.type != "cuda" and setting.dropout > 0      # to matrices
    return [*ours(setting, device), Method("tilewise block-sparse", block_sparse, sparse=True), STANDARD,
            Method("sdpa", sdpa, 5 if falls_back else 0, own_dropout=True), Method("flex", flex)]


def of_flash_attention_2(setting: Setting, device: torch.device) -> list[Method]:
    """Ours, and all peers that compute plain attention."""
    others: Sequence[peers.Contender] = peers.discover(device)
    return [*ours(setting, device), *(from_peer(peer) for peer in others if peer.name != STANDARD.name), STANDARD]
