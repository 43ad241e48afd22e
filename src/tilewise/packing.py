"""Packed batches: sequences of unequal length one after another, without padding.

    packed        [total, ...]: the tokens of sequence b are packed[cu_seqlens[b]:cu_seqlens[b + 1]]
    cu_seqlens    int32 [B + 1], from 0 to total

Differentiable in the tokens. What must read a length waits for the device, and says so.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.trace.memo import readable

INTEGERS = (torch.int32, torch.int64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, *INTEGERS)


class Unpadded(NamedTuple):
    """packed [total, ...]; indices int64 [total]: the place b * S + s of each token; cu_seqlens int32 [B + 1]; max_seqlen."""
    packed: Tensor
    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def cu_seqlens(lengths: Tensor) -> Tensor:
    """Where sequences of these lengths [B] begin and end: int32 [B + 1]. Negative lengths raise on the CPU."""
    _check("lengths", lengths, "int32 or int64 [B]", lambda x: x.dtype in INTEGERS and x.dim() == 1)
    if readable(lengths) and (lengths < 0).any():
        raise ValueError(f"lengths: expected values >= 0, got {int(lengths.min())}")
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors [S_b, ...] as packed [total, ...] and cu_seqlens. Sequences may be empty, but there must be one."""
    sequences = list(sequences)
    if not sequences:
        raise ValueError("sequences: expected at least one tensor, got none")
    first = sequences[0]
    _check("sequences[0]", first, "[S_b, ...]", lambda x: x.dim() >= 1)
    for b, x in enumerate(sequences):
        _check(f"sequences[{b}]", x, f"{first.dtype} [S_b, {', '.join(map(str, first.shape[1:]))}] as the first",
               lambda x: x.dim() >= 1 and x.dtype == first.dtype and x.shape[1:] == first.shape[1:])
    packed = torch.cat(sequences)
    return packed, cu_seqlens(torch.tensor([len(x) for x in sequences], device=packed.device))


def unpack(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """The sequences of a packed batch, as views [S_b, ...] into it. Reads their lengths: waits for the device."""
    _check("packed", packed, "[total, ...]", lambda x: x.dim() >= 1)
    _check("cu_seqlens", cu_seqlens, "int32 or int64 [B + 1]", lambda x: x.dtype in INTEGERS and x.dim() == 1 and len(x))
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != len(packed) or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens: expected offsets that rise from 0 to {len(packed)}, got {ends[0]} to {ends[-1]} with a "
                         f"least step of {min(lengths, default=0)}")
    return packed.split(lengths) if lengths else ()


def unpad(x: Tensor, tokens: Tensor) -> Unpadded:
    """The tokens of a padded batch x [B, S, ...], packed in their order. Waits for the device.

    tokens: how many of each sequence are, an integer tensor [B], with the padding behind them; or which are, a mask [B, S],
        boolean or of 0 and 1, with padding anywhere.
    """
    _check("x", x, "[B, S, ...]", lambda x: x.dim() >= 2)
    batch, seqlen = x.shape[:2]
    _check("tokens", tokens, f"lengths, int32 or int64 [{batch}], or a mask, boolean or integer [{batch}, {seqlen}]",
           lambda t: (t.dtype in INTEGERS and t.shape == (batch,)) or (t.dtype in MASKS and t.shape == (batch, seqlen)))
    most = seqlen if tokens.dim() == 1 else 1
    low, high = (int(t) for t in tokens.aminmax()) if tokens.numel() and tokens.dtype != torch.bool else (0, 0)
    if low < 0 or high > most:
        raise ValueError(f"tokens: expected values from 0 to {most}, got values from {low} to {high}")
    mask = torch.arange(seqlen, device=tokens.device) < tokens[:, None] if tokens.dim() == 1 else tokens.bool()
    lengths, indices = mask.sum(-1), mask.flatten().nonzero().flatten()
    return Unpadded(x.flatten(0, 1).index_select(0, indices), indices, cu_seqlens(lengths), max(lengths.tolist(), default=0))


def pad(packed: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """[batch, seqlen, ...] with packed [total, ...] at `indices` and 0 elsewhere: what `unpad` took apart.

    indices: int64 [total], each b * seqlen + s, none twice (range checked where they are on the CPU).
    """
    _check("packed", packed, "[total, ...]", lambda x: x.dim() >= 1)
    _check("indices", indices, f"int64 [{len(packed)}]", lambda x: x.dtype == torch.int64 and x.shape == packed.shape[:1])
    places = batch * seqlen
    if readable(indices) and ((indices < 0) | (indices >= places)).any():
        raise ValueError(f"indices: expected places in {batch} sequences of {seqlen}, 0 to {places - 1}, got "
                         f"{int(indices.min())} to {int(indices.max())}")
    return packed.new_zeros(places, *packed.shape[1:]).index_copy(0, indices, packed).unflatten(0, (batch, seqlen))


def from_nested(x: Tensor, name: str = "x") -> tuple[Tensor, Tensor, int]:
    """A torch.jagged nested tensor [B, j, ...] as packed [total, ...], not copied, cu_seqlens and max_seqlen (may wait).

    name: what errors call it.
    """
    nested = _jagged(name, x)
    offsets = nested.offsets()
    return nested.values(), offsets.to(torch.int32), nested._get_max_seqlen() if len(offsets) > 1 else 0


def to_nested(values: Tensor, like: Tensor) -> Tensor:
    """values [total, ...] as a torch.jagged nested tensor [B, j, ...], not copied, j being that of `like`."""
    nested = _jagged("like", like)
    total = nested.values().shape[:1]
    _check("values", values, f"[{total[0]}, ...], as many tokens as like has", lambda x: x.shape[:1] == total)
    return torch.nested.nested_tensor_from_jagged(values, nested.offsets(), min_seqlen=nested._maybe_min_seqlen,
                                                  max_seqlen=nested._maybe_max_seqlen)


def _jagged(name: str, x: Any) -> Any:
    _check(name, x, "a nested tensor of torch.jagged layout", lambda x: x.is_nested)
    convert = f"call torch.nested.as_nested_tensor(list({name}.unbind()), layout=torch.jagged)"
    if x.layout != torch.jagged:
        raise ValueError(f"{name}: expected a nested tensor of torch.jagged layout, got {x.layout}: {convert}")
    if x._ragged_idx != 1:
        raise ValueError(f"{name}: expected sequences along dimension 1, [B, j, ...], got {x._ragged_idx}: call "
                         f"{name}.transpose(1, {x._ragged_idx})")
    if x.lengths() is not None:
        raise ValueError(f"{name}: expected sequences without gaps, got lengths, as of torch.nested.narrow: {convert}")
    return x


def _check(name: str, x: Any, expected: str, fits: Callable[[Tensor], Any]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    if not fits(x):
        raise ValueError(f"{name}: expected {expected}, got {x.dtype} {list(x.shape)}")
