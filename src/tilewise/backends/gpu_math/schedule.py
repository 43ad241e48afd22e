"""The order of work for sequences of unequal length: one item per block of rows, so that no program finds nothing to do."""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise.trace.memo import Memo

_schedules = Memo()


def schedule(rows: Tensor, others: Tensor, most: int, block: int, rows_per_row: int = 1) -> Tensor:
    """int32 [items, 2]: the sequence and block of each item, those of the sequence with the longest keys first.

    Under a causal mask a sequence's later blocks are the longer ones: they come first. What takes longest then starts first,
    and the device is not left waiting for it at the end. No value is read on the host: there are as many items as `most` rows
    in all can need, the last of them of sequence -1.

    rows, others: [B, 3], of the sequences' rows that are cut into blocks, and of what each of them is to be walked against.
    rows_per_row: rows of a block for each row of a sequence.
    """
    return _schedules.get((most, block, rows_per_row), (rows, others),
                          lambda: _build(rows[:, 2], others[:, 2], most, block, rows_per_row))


def _build(lengths: Tensor, others: Tensor, most: int, block: int, rows_per_row: int) -> Tensor:
    batch, device = len(lengths), lengths.device
    order = torch.argsort(others, descending=True, stable=True)
    ends = ((lengths[order].long() * rows_per_row + block - 1) // block).cumsum(0)
    items = torch.arange(most * rows_per_row // block + batch, device=device)
    place = torch.searchsorted(ends, items, right=True)
    inside = place.clamp(max=batch - 1)
    there = place < batch
    return torch.stack([torch.where(there, order[inside], -1), torch.where(there, ends[inside] - 1 - items, 0)], 1).int()
