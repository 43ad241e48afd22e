"""What transformers calls to make a mask: index functions and padding become a `tw.Mask`, nothing of size N² is built."""
from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tilewise import masks
from tilewise.compat.transformers.bands import Bound, conditions
from tilewise.masks import LAST_QUERY, NQ, ZERO, B, Band, K, Mask, exact
from tilewise.trace.capture import mask_graph
from tilewise.trace.graph import Captured, load, where


def causal(b, h, q_idx, kv_idx):
    """A key at the query's position or before."""
    return kv_idx <= q_idx


@torch.compiler.disable
def index_mask(*, batch_size: int, kv_length: int, q_length: int | None = None, q_offset: int | Tensor = 0,
               kv_offset: int | Tensor = 0, cache_position: Tensor | None = None, mask_function: Callable = causal,
               attention_mask: Tensor | None = None, device: torch.device | str | None = None, **_: Any) -> AttentionMask:
    """The mask of one forward pass, as transformers' AttentionMaskInterface asks for it.

    Key j at position j + kv_offset is visible to query i at position i + q_offset where mask_function(batch_idx, head_idx,
    position of i, position of j) is True and attention_mask [B, positions] is not 0; positions beyond it are padding.

    q_length, q_offset, device: in transformers 5; before, cache_position [q_length] tells all three. Other arguments are about
    dense masks and have nothing to act on.

    Raises CaptureError where mask_function is no function of indices (`tw.mask_mod`).
    """
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    if q_length is None:
        raise TypeError("q_length: expected it, or cache_position, got neither")
    first_q, first_k = int(q_offset), int(kv_offset)    # a static cache counts in place: its tensor is read before it moves on

    @functools.wraps(mask_function)
    def shifted(b, h, q_idx, kv_idx):
        return mask_function(b, h, q_idx + first_q, kv_idx + first_k)

    parts, functions = [], []
    for condition in conditions(mask_graph(shifted)):
        if not isinstance(condition, Bound):
            functions.append(condition)
        elif not condition.always(q_length, kv_length):
            parts.append(masks.causal() if condition.causal(q_length, kv_length) else condition.mask())
    if functions:
        parts.append(Mask("function", functools.reduce(operator.and_, functions), (), ()))
    if attention_mask is not None:
        tokens = attention_mask[:, first_k:first_k + kv_length].to(device=device, dtype=torch.bool)
        tokens = torch.nn.functional.pad(tokens, (0, kv_length - tokens.shape[1]))
        if not tokens.all():
            parts.append(key_padding(tokens))
    whole = functools.reduce(operator.and_, parts) if parts else None
    return AttentionMask(whole, (batch_size, 1, q_length, kv_length), torch.device("cpu" if device is None else device))


def key_padding(tokens: Tensor) -> Mask:
    """Keys j with tokens[b, j]; tokens: boolean [B, S_k], padding anywhere."""
    count, last_key = tokens.sum(-1), tokens.shape[1] - 1
    first = torch.where(count > 0, tokens.int().argmax(-1), last_key + 1)
    last = torch.where(count > 0, last_key - tokens.flip(-1).int().argmax(-1), -1)
    whole = last - first == count - 1
    lo, hi, inner_hi = (load(Captured(x.int(), "attention_mask"), B) for x in (first, last, torch.where(whole, last, -1)))
    visible = load(Captured(tokens, "attention_mask"), B, K)
    return Mask("padding", visible, (Band(lo, hi, lo, inner_hi),), (exact(where(visible, ZERO, NQ), LAST_QUERY),))


class AttentionMask(BlockMask):
    """A mask on its way through a model: [B, 1, S_q, S_k] in shape, a `tw.Mask` (None: everything is visible) in content.

    transformers passes on as given what is a tensor or a BlockMask of four dimensions. Whoever wants a dense mask of it calls
    `to_dense`; what tensors do beside is not there, and raises.
    """

    def __init__(self, mask: Mask | None, shape: tuple[int, int, int, int], device: torch.device):
        self.mask, self.device = mask, device   # and nothing of what a BlockMask holds: its lists of blocks are not made
        self._shape = torch.Size(shape)

    shape = property(lambda self: self._shape)
    ndim = 4

    def dim(self) -> int:
        return 4

    def contiguous(self) -> AttentionMask:
        return self

    def to(self, device: torch.device | str, **_: Any) -> AttentionMask:
        """With its tensors on another device."""
        device = torch.device(device)
        if device == self.device:
            return self
        return AttentionMask(None if self.mask is None else self.mask.to(device), self.shape, device)

    def to_dense(self) -> Tensor:
        """Boolean [B, 1, S_q, S_k], of size N²."""
        batch, _, nq, nk = self.shape
        return (masks.full() if self.mask is None else self.mask).dense(batch, 1, nq, nk, self.device)

    def __getitem__(self, index: Any) -> AttentionMask:
        raise TypeError("a Tilewise mask has no elements: call to_dense() for a boolean tensor [B, 1, S_q, S_k]")

    def __repr__(self) -> str:
        return f"AttentionMask({'everything' if self.mask is None else self.mask}, {list(self.shape)}, {self.device})"

    __str__ = __repr__
