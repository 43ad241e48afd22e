"""Attention on DTensors: each device computes its own sequences or heads, and nothing is sent.

q, k and v may be sharded over batch (data parallelism), over heads (tensor parallelism), or both on a mesh of several
dimensions. Sequences and heads are independent, so each device's part is a problem of its own: what belongs to others is
sliced off bias, sinks and captured tensors. Gradients of what all devices share are left to be summed, as `Partial`.
"""
from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.problem import Operands, Problem, describe

BATCH, HEADS = 0, 1
DIMENSIONS = ("the batch", "heads", "the sequence", "head_dim")


def sharded(*tensors: Tensor) -> bool:
    """Whether one of them is a DTensor; torch.distributed.tensor need not be imported for that."""
    return any(type(x).__name__ == "DTensor" for x in tensors)


class Part(NamedTuple):
    """This device's sequences and heads."""
    mesh: Any
    placements: tuple               # of q
    first: tuple[int, int]          # sequence, head
    size: tuple[int, int]

    def of(self, name: str, x: Tensor, axes: dict[int, int]) -> Tensor:
        """The part of x, whose dimensions `axes` (dimension of x: BATCH or HEADS) are sliced like q's."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
        if isinstance(x, DTensor):
            if x.device_mesh != self.mesh:
                raise ValueError(f"{name}: expected q's device mesh {self.mesh}, got {x.device_mesh}")
            placements, gradients = [], []
            for of_q in self.placements:
                axis = next((a for a, d in axes.items() if of_q == Shard(d)), None)
                placements.append(Replicate() if axis is None else Shard(axis))
                gradients.append(Replicate() if of_q == Replicate() else Partial())
            if list(x.placements) == placements:
                whole = [g if p == Replicate() else p for p, g in zip(placements, gradients, strict=True)]
                return x.to_local(grad_placements=whole)
            if any(p != Replicate() for p in x.placements):
                raise ValueError(f"{name}: expected placements {placements} or replicated, got {list(x.placements)}")
            x = x.to_local(grad_placements=gradients)
        elif x.requires_grad:
            raise TypeError(f"{name}: expected a DTensor like q, which adds up the devices' gradients, got a plain tensor")
        for axis, of_q in axes.items():
            x = x.narrow(axis, self.first[of_q], self.size[of_q])
        return x


def local(problem: Problem, x: Operands) -> tuple[Problem, Operands, Part]:
    """This device's part of a problem. Raises TypeError, ValueError or NotImplementedError for placements that need others'."""
    part = _part(problem, x)
    q = part.of("q", x.q, {BATCH: BATCH, HEADS: HEADS})
    k, v = (_keys(name, t, part) for name, t in (("k", x.k), ("v", x.v)))
    bias = x.bias
    if bias is not None:
        bias = part.of("bias", bias, {axis: axis for axis in (BATCH, HEADS) if bias.shape[axis] > 1})
    sinks = None if x.sinks is None else part.of("sinks", x.sinks, {0: HEADS})
    captured = []
    by_batch, by_head = (_looked_up(problem.program, leaf, size != whole) for leaf, size, whole in
                         zip("bh", part.size, (problem.batch, problem.heads), strict=True))
    for slot, tensor in enumerate(x.captured):
        axes = {axis: d for d, places in ((BATCH, by_batch), (HEADS, by_head)) for s, axis in places if s == slot}
        captured.append(part.of(f"captured tensor {list(tensor.shape)}", tensor, axes))
    rng = x.rng
    if rng is not None:
        if part.size[HEADS] != problem.heads:
            raise NotImplementedError("dropout_p: expected 0 with heads on several devices, which would draw each other's bits")
        rng = rng.clone()
        rng[2] += part.first[BATCH]
    operands = x._replace(q=q, k=k, v=v, bias=bias, sinks=sinks, rng=rng, captured=captured)
    return describe(operands, problem.settings), operands, part


def whole(problem: Problem, part: Part, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The devices' results as DTensors placed as q."""
    from torch.distributed.tensor import DTensor
    like = replace(problem, device=torch.device("meta"))
    return tuple(DTensor.from_local(t, part.mesh, part.placements, run_check=False, shape=w.shape, stride=w.stride())
                 for t, w in ((out, like.new_q(problem.head_dim_v)), (lse, like.new_lse())))  # type: ignore[return-value]


def _part(problem: Problem, x: Operands) -> Part:
    from torch.distributed.tensor import DTensor, Replicate, Shard
    for name, t in (("q", x.q), ("k", x.k), ("v", x.v)):
        if not isinstance(t, DTensor):
            raise TypeError(f"{name}: expected a DTensor like the others of q, k and v, got a plain tensor")
        for p in t.placements:
            if p not in (Replicate(), Shard(BATCH), Shard(HEADS)):
                got = f"sharded over {DIMENSIONS[p.dim]}, which needs redistributing before" if isinstance(p, Shard) else str(p)
                raise ValueError(f"{name}: expected a DTensor sharded over the batch or heads, or replicated, got one {got}")
    if problem.unequal:
        raise NotImplementedError("q: expected plain tensors for packed sequences and caches, got a DTensor")
    q: Any = x.q
    mesh, placements = q.device_mesh, tuple(q.placements)
    devices = math.prod([size for size, p in zip(mesh.shape, placements, strict=True) if p == Shard(HEADS)])
    for name, heads in (("q", problem.heads), ("k", problem.kv_heads)):
        if heads % devices and (name == "q" or heads > 1):
            raise ValueError(f"{name}: expected a number of heads that the {devices} devices share evenly, got {heads}")
    first, size = [0, 0], [problem.batch, problem.heads]
    for of_mesh, p in enumerate(placements):
        if isinstance(p, Shard):  # as DTensor cuts: even chunks, of which the last may be shorter, or empty
            chunk = -(-size[p.dim] // mesh.shape[of_mesh])
            start = min(chunk * mesh.get_coordinate()[of_mesh], size[p.dim])
            first[p.dim], size[p.dim] = first[p.dim] + start, min(chunk, size[p.dim] - start)
    return Part(mesh, placements, (first[0], first[1]), (size[0], size[1]))


def _keys(name: str, x: Any, part: Part) -> Tensor:
    """k or v: placed as q, or a single head on all the devices that share q's heads."""
    return part.of(name, x, {BATCH: BATCH} if x.shape[HEADS] == 1 else {BATCH: BATCH, HEADS: HEADS})


def _looked_up(text: str, leaf: str, split: bool) -> list[tuple[int, int]]:
    """(slot, dimension) of the captured tensors that a program indexes by the leaf b or h; elsewhere it may not stand."""
    lines, *groups = text.split("|")        # not parsed: torch.compile traces this
    found, elsewhere = [], any(leaf in group.split(" ") for group in groups)
    for line in lines.split(";"):
        op, *args = line.split(" ")
        if op == "load":
            found += [(int(args[0][2:]), axis) for axis, index in enumerate(args[1::2]) if index == leaf]
        else:
            elsewhere |= leaf in args
    if elsewhere and split:
        raise NotImplementedError(f"mask, score_mod: expected functions that use {leaf} only to index tensors where "
                                  f"{DIMENSIONS['bh'.index(leaf)]} is on several devices")
    return found
