"""flash_attn.bert_padding: from padded batches to packed ones and back, in terms of `tw.unpad` and `tw.pad`."""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise.packing import cu_seqlens, pad, unpad

__all__ = ["index_first_axis", "index_first_axis_residual", "index_put_first_axis", "pad_input", "unpad_input",
           "unpad_input_for_concatenated_sequences"]


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None) \
        -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of hidden_states [B, S, ...], packed: (tokens [total, ...], indices int64 [total] into [B * S], cu_seqlens
    int32 [B + 1], the longest length, seqused int32 [B]).

    attention_mask [B, S]: nonzero for tokens. unused_mask [B, S]: nonzero for places that are kept although they hold none:
    cu_seqlens counts them, seqused does not. Waits for the device.
    """
    tokens = attention_mask != 0
    kept = tokens if unused_mask is None else tokens | (unused_mask != 0)
    found = unpad(hidden_states, kept)
    return found.packed, found.indices, found.cu_seqlens, found.max_seqlen, tokens.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(hidden_states: Tensor, attention_mask_in_length: Tensor) \
        -> tuple[Tensor, Tensor, Tensor, int]:
    """As `unpad_input`, without seqused, where a row holds several sequences: attention_mask_in_length [B, S] has their
    lengths, in order, then 0."""
    found = unpad(hidden_states, attention_mask_in_length.sum(-1))
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0]
    return found.packed, found.indices, cu_seqlens(lengths.int()), max(lengths.tolist(), default=0)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """[batch, seqlen, ...] with hidden_states [total, ...] at indices, and 0 elsewhere."""
    return pad(hidden_states, indices, batch, seqlen)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices], along the first dimension."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """[first_axis_dim, ...] with values at indices, and 0 elsewhere."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(input[indices], input)."""
    return input.index_select(0, indices), input
