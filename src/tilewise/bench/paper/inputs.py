"""Self-attention as FlashAttention times it: its sizes, its tensors, and what is right for a sample of its queries."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import tilewise as tw
from tilewise import rng
from tilewise.bench.gate import Expected, Found
from tilewise.bench.shapes import laid_bhsd

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]     # q, k, v, out [B, S, H, D]

SAMPLE = 128            # queries of the last sequence's last head whose results are checked
PADDED = 20             # keys at most that a sequence's padding hides
SEED = tw.Rng(20220527)


@dataclass(frozen=True)
class Setting:
    """q, k, v [batch, seqlen, heads, head_dim]. dropout: its probability; padding: sequence b has its first lengths[b] keys."""
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    dtype: str
    dropout: float = 0.0
    padding: bool = False

    @property
    def kind(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def tensor_bytes(self) -> int:
        """Of one tensor such as q."""
        return self.batch * self.seqlen * self.heads * self.head_dim * self.kind.itemsize

    @property
    def matrix_bytes(self) -> int:
        """Of one matrix of scores for all heads."""
        return self.batch * self.heads * self.seqlen**2 * self.kind.itemsize


class Inputs:
    """The tensors of a setting: q, k and v, which require gradients, dout, and lengths int32 [batch]."""

    def __init__(self, setting: Setting, device: torch.device, seed: int = 0):
        s, generator = setting, torch.Generator(device).manual_seed(seed)
        self.setting, self.device = setting, device
        q, k, v, dout = (torch.randn((s.batch, s.seqlen, s.heads, s.head_dim), generator=generator, device=device, dtype=s.kind)
                         for _ in range(4))
        self.leaves, self.dout = leaves(q, k, v), dout
        hidden = torch.randint(0, min(PADDED, s.seqlen - 1) + 1, (s.batch,), generator=generator, device=device)
        self.lengths = (s.seqlen - hidden).int()

    def like(self, setting: Setting | None = None, relaid: bool = False) -> Inputs:
        """The same numbers under another setting; relaid: each head's rows in one piece of memory."""
        same = object.__new__(Inputs)
        same.__dict__.update(vars(self) | {"setting": setting or self.setting})
        if relaid:
            q, k, v, same.dout = (laid_bhsd(x.detach()) for x in (*self.leaves, self.dout))
            same.leaves = leaves(q, k, v)
        return same

    @cached_property
    def rows(self) -> Tensor:
        """Which queries are checked, ascending."""
        chosen = torch.randperm(self.setting.seqlen, generator=torch.Generator().manual_seed(1))[:SAMPLE]
        return chosen.sort().values.to(self.device)

    @cached_property
    def sampled_dout(self) -> Tensor:
        """dout, 0 but for the queries that are checked."""
        dout = torch.zeros_like(self.dout)
        dout[-1, self.rows, -1] = self.dout[-1, self.rows, -1]
        return dout

    def expected(self, visible: Tensor | None = None) -> Expected:
        """What is right: standard attention in fp64, and the same in the setting's dtype.

        visible [queries checked, seqlen]: a further mask.
        """
        q, k, v = (x[-1].detach() for x in self.leaves)
        truth, standard = (self.standard(dtype, visible) for dtype in (torch.float64, self.setting.kind))
        return Expected(truth, standard, (q[None, self.rows, -1:], k[None, :, -1:], v[None, :, -1:]))

    def standard(self, dtype: torch.dtype, visible: Tensor | None = None) -> Found:
        """Standard attention of the queries that are checked, in a dtype, softmax in fp32 at least."""
        q, k, v = (x[-1, :, -1].detach().to(dtype) for x in self.leaves)
        q, k, v = (x.requires_grad_() for x in (q[self.rows], k, v))
        s = (q @ k.mT) * self.setting.head_dim ** -0.5
        seen = self.visible() if visible is None else self.visible() & visible
        p = torch.softmax(torch.where(seen, s, -torch.inf).to(torch.promote_types(dtype, torch.float32)), -1)
        if self.setting.dropout:
            p = torch.where(self.kept(), p, 0.0) * rng.rescale(rng.threshold(self.setting.dropout))
        out = p.to(dtype) @ v
        return named(out, torch.autograd.grad(out, (q, k, v), self.dout[-1, self.rows, -1].to(dtype)))

    def visible(self) -> Tensor:
        """Which keys the queries checked see: [queries, seqlen]."""
        s, cols = self.setting, torch.arange(self.setting.seqlen, device=self.device)
        seen = (cols < self.lengths[-1]) if s.padding else cols >= 0
        return seen.expand(len(self.rows), -1)

    def kept(self) -> Tensor:
        """Which of their probabilities our dropout keeps."""
        s, cols = self.setting, torch.arange(self.setting.seqlen, device=self.device)
        sequence, head = (torch.tensor(n - 1, device=self.device) for n in (s.batch, s.heads))
        return rng.keep(SEED.tensor(self.device), rng.threshold(s.dropout), sequence, head, s.heads, self.rows[:, None], cols)

    def sampled(self, attend: Attend) -> Found:
        """The same by a method, of the whole problem with `sampled_dout`."""
        out = attend(*self.leaves)
        dq, dk, dv = (x[-1, :, -1] for x in torch.autograd.grad(out, self.leaves, self.sampled_dout))
        return named(out[-1, self.rows, -1], (dq[self.rows], dk, dv))


def leaves(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def named(out: Tensor, gradients: tuple[Tensor, ...]) -> Found:
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
