"""Attention over part of the keys, and how parts are merged.

(out, lse) says all about attention over a set of keys: two disjoint sets merge as

    lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

which is associative and commutative, with the empty state (0, -inf) as its neutral element. It is FlashAttention's
online softmax (Dao et al. 2022, section 3.1) seen from outside, and what Flash-Decoding does after its split.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionState:
    """Result of attention over some keys.

    out: [..., S_q, D_v], heads before rows as in `attention(..., layout="bhsd")`; lse: [..., S_q], natural log, -inf for a row
    that saw no key (its out is 0).
    has_sink: whether lse counts a sink; such a state cannot be merged any more.
    """
    out: Tensor
    lse: Tensor
    has_sink: bool = False

    def __post_init__(self):
        if self.out.shape[:-1] != self.lse.shape:
            raise ValueError(f"lse: expected shape {list(self.out.shape[:-1])} (out's without its last dimension), "
                             f"got {list(self.lse.shape)}")

    @staticmethod
    def empty(*shape: int, dtype=torch.float32, device=None) -> AttentionState:
        """The neutral element, out of the given shape [..., S_q, D_v]."""
        return AttentionState(torch.zeros(shape, dtype=dtype, device=device),
                              torch.full(shape[:-1], -torch.inf, dtype=torch.float32, device=device))

    def merge(self, other: AttentionState) -> AttentionState:
        """Attention over the union of two disjoint sets of keys. Differentiable."""
        return merge_states([self, other])

    def with_sink(self, sinks: Tensor) -> AttentionState:
        """Adds one logit per head to the softmax denominator, after the last merge. sinks: [H], out: [B, H, S_q, D_v]."""
        if self.has_sink:
            raise ValueError("with_sink: this state has a sink already")
        lse = log_sum_exp(torch.stack([self.lse, sinks.to(self.lse.dtype)[:, None].expand_as(self.lse)]))
        weight = exp_difference(self.lse, lse)
        return AttentionState((self.out * weight[..., None]).to(self.out.dtype), lse, has_sink=True)


def merge_states(states: Sequence[AttentionState]) -> AttentionState:
    """Merges any number of states over disjoint sets of keys. Differentiable; fp32 inside (fp64 for fp64)."""
    if not states:
        raise ValueError("states: expected at least one, got none")
    for state in states:
        if state.has_sink:
            raise ValueError("states: expected states without a sink: call with_sink once, after the last merge")
        if state.out.shape != states[0].out.shape:
            raise ValueError(f"states: expected equal shapes, got {list(states[0].out.shape)} and {list(state.out.shape)}")
    lses = torch.stack([state.lse for state in states])
    lse = log_sum_exp(lses)
    weights = exp_difference(lses, lse)
    out = sum(state.out * w[..., None] for state, w in zip(states, weights, strict=True))
    return AttentionState(out.to(states[0].out.dtype), lse)


def log_sum_exp(x: Tensor) -> Tensor:
    """log(sum(exp(x))) over the first dimension; where all are -inf, -inf with gradient 0 (torch.logsumexp's is NaN)."""
    largest = x.detach().amax(0)
    pivot = torch.where(largest == -torch.inf, 0.0, largest)
    total = torch.exp(x - pivot).sum(0)
    return torch.where(total == 0, -torch.inf, pivot + torch.log(torch.where(total == 0, 1.0, total)))


def exp_difference(a: Tensor, b: Tensor) -> Tensor:
    """exp(a - b), 0 where a is -inf, also when b is."""
    empty = a == -torch.inf
    return torch.where(empty, 0.0, torch.exp(torch.where(empty, 0.0, a) - torch.where(empty & (b == -torch.inf), 0.0, b)))


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """d loss / d sinks [H], from lse [B, H, S_q] (sink included) and delta = rowsum(dO * O) - dlse."""
    probability = exp_difference(sinks.to(lse.dtype)[:, None].expand_as(lse), lse)
    return -torch.where(lse == -torch.inf, 0.0, probability * delta).sum((0, 2)).to(sinks.dtype)  # -inf: no sequence's row


def sink_gradient_tangent(sinks: Tensor, tangent: Tensor, lse: Tensor, lse_tangent: Tensor, delta: Tensor,
                          delta_tangent: Tensor) -> Tensor:
    """The derivative of `sink_gradient` in a direction of sinks, lse and delta."""
    probability = exp_difference(sinks.to(lse.dtype)[:, None].expand_as(lse), lse)
    change = (tangent.to(lse.dtype)[:, None] - lse_tangent) * delta + delta_tangent
    return -torch.where(lse == -torch.inf, 0.0, probability * change).sum((0, 2)).to(sinks.dtype)  # -inf: no sequence's row
