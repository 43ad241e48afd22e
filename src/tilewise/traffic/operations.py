"""Torch operations counted one by one: bytes that each reads and writes, and memory in use, on tensors without memory.

    with Counting() as counted:
        standard(q, k, v, dout)         # tensors on torch's "meta" device
    counted.read, counted.written, counted.peak

An operation reads its inputs from slow memory and writes its results there, as eager kernels do. Views move nothing; a
dimension that is expanded counts once. Sizes alone decide, so any size can be counted on any machine.
"""
from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tilewise.costs import PLAIN, Extras, Sizes


class Counting(TorchDispatchMode):
    """bytes read and written by operation; in_use, peak: bytes of the tensors that are there, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.in_use = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        results = [t for t in tree_iter(result) if isinstance(t, Tensor)]
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):
            self.read[name] = self.read.get(name, 0) + sum(map(size, inputs))
            self.written[name] = self.written.get(name, 0) + sum(map(size, results))
        for t in results:
            self.hold(t)
        return result

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.in_use += storage.nbytes()
            self.peak = max(self.peak, self.in_use)
            weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())

    def release(self, storage: int, nbytes: int) -> None:
        self.known.discard(storage)
        self.in_use -= nbytes

    @property
    def total(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's own elements."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.itemsize


def counted_standard(s: Sizes, extras: Extras = PLAIN, backward: bool = True) -> Counting:
    """Standard attention (Algorithm 0), and its backward pass by autograd (Algorithm 3), counted.

    The mask, if any, is one of padding: [batch, 1, 1, S_k], boolean or of q's dtype.
    """
    dtype = {2: torch.float16, 4: torch.float32, 8: torch.float64}[s.itemsize]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    with Counting() as counted:
        counted.read, counted.written = {}, {}
        of = s.batch * s.heads
        q, k, v = empty(of, s.seqlen_q, s.head_dim), empty(of, s.seqlen_k, s.head_dim), empty(of, s.seqlen_k, s.head_dim_v)
        dout = torch.empty((of, s.seqlen_q, s.head_dim_v), dtype=dtype, device="meta")
        mask = torch.empty((s.batch, 1, 1, s.seqlen_k), dtype=torch.bool if extras.mask == "fill" else dtype, device="meta")
        counted.read, counted.written = {}, {}          # inputs are there before
        out = standard(q, k, v, mask, s.batch, extras)
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)
    return counted


def standard(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, batch: int, extras: Extras) -> Tensor:
    """q, k, v [batch * heads, S, D]. Every line but views is an operation of its own, as before attention was fused."""
    scores = torch.bmm(q, k.transpose(1, 2))
    if extras.scale:
        scores = scores * q.shape[-1] ** -0.5
    if extras.mask:
        by_sequence = scores.view(batch, -1, *scores.shape[1:])
        hidden = by_sequence.masked_fill(mask, -torch.inf) if extras.mask == "fill" else by_sequence + mask
        scores = hidden.view_as(scores)
        del by_sequence, hidden
    p = torch.softmax(scores, -1)
    del scores
    if extras.dropout:
        p, _ = torch.native_dropout(p, 0.1, True)
    return torch.bmm(p, v)
