"""What masks of tensors look up: who is above whom in a tree, and where a document lies among the keys.

Made on the tensors' device, by sorting and searching: nothing waits for it but checks of what is on the CPU.
"""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise.trace.memo import readable


def check_parents(parents: Tensor) -> None:
    """Raises ValueError where a node [..., T] does not come after its parent, if that can be read at once."""
    if parents.shape[-1] == 0:
        raise ValueError(f"tree: parents: expected at least one node, got {list(parents.shape)}")
    if not readable(parents):
        return
    bad = ((parents < -1) | (parents >= torch.arange(parents.shape[-1]))).nonzero()
    if len(bad):
        first = bad[0].tolist()
        raise ValueError(f"tree: parents: expected an earlier node, or -1 for a root, got parents{first} = "
                         f"{int(parents[tuple(first)])}")


def ancestors(parents: Tensor) -> Tensor:
    """Whether node j is node i or above it: bool [..., i, j] from parents [..., i]. By doubling: log T steps."""
    nodes = parents.shape[-1]
    above = torch.where((parents >= 0) & (parents < torch.arange(nodes, device=parents.device)), parents, nodes).long()
    above = torch.nn.functional.pad(above, (0, 1), value=nodes)  # a node above all roots, which is an ancestor of none
    found = torch.eye(nodes + 1, nodes, dtype=torch.bool, device=parents.device).expand(*above.shape, nodes)
    for _ in range((nodes - 1).bit_length()):
        found = found | found.gather(-2, above[..., None].expand_as(found))
        above = above.gather(-1, above)
    return found[..., :nodes, :].contiguous()


def youngest(ancestors: Tensor) -> Tensor:
    """Of each node j of a tree the last node below it, or itself: int32 [..., j] from ancestors [..., i, j]."""
    nodes = torch.arange(ancestors.shape[-2], device=ancestors.device)[:, None]
    return torch.where(ancestors, nodes, 0).amax(-2).int()


def dense_ids(ids_q: Tensor, ids_k: Tensor) -> tuple[Tensor, Tensor]:
    """The ids renumbered from 0 in 32 bits, equal where they were equal; -1 where negative. Without a synchronisation."""
    if ids_q.shape[:-1] != ids_k.shape[:-1] or ids_q.device != ids_k.device:
        raise ValueError(f"documents: ids_k: expected ids_q's batch and device, {list(ids_q.shape[:-1])} on {ids_q.device}, "
                         f"got {list(ids_k.shape[:-1])} on {ids_k.device}")
    both = torch.cat([ids_q.long(), ids_k.long()], -1)
    ordered = both.sort(dim=-1).values
    rank = torch.zeros_like(both)
    rank[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).cumsum(-1)
    dense = rank.gather(-1, torch.searchsorted(ordered, both)) if both.shape[-1] else rank
    dense = torch.where(both < 0, -1, dense).int()
    return dense[..., :ids_q.shape[-1]].contiguous(), dense[..., ids_q.shape[-1]:].contiguous()


def document_intervals(ids: Tensor, other: Tensor) -> list[Tensor]:
    """For every token of `ids`: first and last token of its document in `other`, and the bounds of a run of it.

    Returns lo, hi, inner_lo, inner_hi, int32, each of ids' shape; lo > hi where there is none. Data-dependent but
    without a synchronisation: sorting and searching only.
    """
    n = other.shape[-1]
    if n == 0 or ids.shape[-1] == 0:
        lo = torch.zeros(ids.shape, dtype=torch.int32, device=ids.device)
        return [lo, lo - 1, lo, lo - 1]
    positions = torch.arange(n, device=other.device).expand(other.shape)
    ordered, order = other.sort(dim=-1, stable=True)
    wanted = ids.contiguous()
    first = torch.searchsorted(ordered.contiguous(), wanted)
    last = torch.searchsorted(ordered.contiguous(), wanted, right=True) - 1
    found = (last >= first) & (ids >= 0)
    lo = order.gather(-1, first.clamp(0, n - 1))
    hi = order.gather(-1, last.clamp(0, n - 1))
    # the last token of the run that each position belongs to: the position before the next change of id
    change = torch.ones_like(other, dtype=torch.bool)
    change[..., :-1] = other[..., 1:] != other[..., :-1]
    ends = torch.where(change, positions, n - 1).flip(-1).cummin(-1).values.flip(-1)
    run_end = ends.gather(-1, lo)
    bounds = torch.where(found, lo, n), torch.where(found, hi, -1), torch.where(found, lo, n), torch.where(found, run_end, -1)
    return [t.to(torch.int32) for t in bounds]
