"""Which tiles a kernel visits under a mask without intervals: per block of rows a list of columns' tiles.

A list is one int32 tensor. Its first 2 R + 1 entries are positions in the tensor itself, for R rows of tiles: row r has
its FULL tiles from entry 2 r, its PARTIAL ones from entry 2 r + 1, up to entry 2 r + 2; both in ascending order.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.trace.bounds import EMPTY, FULL, PARTIAL, tile_classes
from tilewise.trace.evaluate import leaf_values, slot_values
from tilewise.trace.graph import Graph
from tilewise.trace.memo import Memo, capturing

CAPACITY = 64 << 20                     # bytes up to which a list is as long as the grid, so that no one waits for its length


class TileList(NamedTuple):
    """tiles: as above; per_batch, per_head: whether each sequence, each head has rows of its own."""
    tiles: Tensor
    per_batch: bool
    per_head: bool


class Question(NamedTuple):
    """What a list depends on beside the captured tensors."""
    program: str
    mask: Graph                         # of the program
    ints: tuple[int, ...]
    floats: tuple[float, ...]
    batch: int
    heads: int
    lengths: tuple[int, int]            # queries, keys; of the longest sequence where they differ
    tile: tuple[int, int]               # likewise
    transposed: bool                    # rows are keys
    all_partial: bool                   # one ascending list
    device: torch.device


_lists = Memo()


def tile_list(question: Question, captured: Sequence[Tensor], rows: tuple[Tensor, Tensor] | None = None) -> TileList:
    """The list for a question, remembered for as long as no captured tensor is written to.

    rows: where the sequences' queries and keys lie (`sequences.py`), if they are of unequal length.
    """
    tensors = [*captured, *(rows or ())]
    found = _lists.find(question, tensors)
    if found is not None:
        return found
    if capturing(question.device):
        raise RuntimeError("mask: its tiles are not known yet and cannot be found while a CUDA graph is captured: call once "
                           "with the same mask and shapes before capturing")
    return _lists.keep(question, tensors, _build(question, captured, rows))


def on_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _build(question: Question, captured: Sequence[Tensor], rows: tuple[Tensor, Tensor] | None) -> TileList:
    _, mask, ints, floats, batch, heads, lengths, tile, transposed, all_partial, device = question
    own: tuple = lengths if rows is None else tuple(r[:, 2, None, None, None].long() for r in rows)
    values = leaf_values(slot_values(captured, ints, floats), batch, heads, own[0], own[1], device)
    classes = tile_classes(mask, (), values, batch, heads, lengths, tile, device, each=rows is not None)
    for axis, (n, size) in enumerate(zip(own, tile, strict=True)):
        first = torch.arange(classes.shape[2 + axis], device=device) * size
        first = first[:, None] if axis == 0 else first
        if axis == (0 if transposed else 1):    # full tiles are not checked for the end of the sequence
            classes = torch.where(first + size > n, classes.clamp(max=PARTIAL), classes)
        classes = torch.where(first >= n, EMPTY, classes)
    if transposed:
        classes = classes.mT
    cols = classes.shape[3]
    if all_partial:
        classes = classes.clamp(max=PARTIAL)
    kept = torch.stack([classes == FULL, classes == PARTIAL], 3).flatten(0, 3)          # [2 R, tiles in a row]
    head = len(kept) + 1
    starts = torch.zeros(head, dtype=torch.int32, device=device)
    starts[1:] = kept.sum(1).cumsum(0)
    if on_host(device) or 4 * classes.numel() > CAPACITY:
        columns = kept.nonzero()[:, 1].int()
    else:
        columns = torch.empty(classes.numel() + 1, dtype=torch.int32, device=device)    # the last entry takes what is not kept
        place = torch.where(kept, kept.flatten().cumsum(0).view_as(kept) - 1, classes.numel())
        columns[place] = torch.arange(cols, dtype=torch.int32, device=device).expand_as(kept)
    return TileList(torch.cat([starts + head, columns]), classes.shape[0] > 1, classes.shape[1] > 1)
