"""Standard attention, dense: the specification of what every backend computes, and the baseline they are measured against.

    s = scale * q k^T -> score function -> + bias -> mask -> p = softmax(s, sink in the denominator) -> dropout -> p v

Scores and probabilities are whole N x N matrices in the inputs' dtype, the softmax is computed in fp32 (fp64 for fp64),
as in any implementation by matrices. Gradients of any order come from autograd.
"""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise import rng
from tilewise.problem import Operands, Problem
from tilewise.state import AttentionState
from tilewise.trace.evaluate import evaluate, leaf_values, slot_values


def supports(problem: Problem) -> str | None:
    """None: every problem that passes the input checks, on any device."""
    return None


def tile_sizes(problem: Problem) -> tuple[int, int]:
    """One tile: the whole matrix."""
    return max(1, problem.seqlen_q), max(1, problem.seqlen_k)


def precision(problem: Problem) -> str:
    """How fp32 inputs are multiplied: as torch does on this device."""
    return problem.precision


def workspace(problem: Problem) -> tuple[int, int]:
    """Bytes of the matrices of scores and probabilities, and of their gradients."""
    matrix = problem.batch * problem.heads * problem.seqlen_q * problem.seqlen_k * torch.finfo(problem.dtype).bits // 8
    return 2 * matrix, 4 * matrix


def attention(problem: Problem, x: Operands) -> tuple[Tensor, Tensor]:
    """out [B, H, S_q, D_v] in q's dtype and lse [B, H, S_q] in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(problem.dtype, torch.float32)
    q, k, v = x.q, *(t.repeat_interleave(problem.group, dim=1) for t in (x.k, x.v))
    leaves = index_leaves(problem, x)
    if problem.graphs.mask is not None:
        visible = torch.as_tensor(evaluate(problem.graphs.mask, leaves), device=q.device)
        visible = visible.expand(*visible.shape[:-2], problem.seqlen_q, problem.seqlen_k)
        idle = ~visible.any(-1)[..., None]   # queries without keys and keys without queries may be padding, which may
        hidden = ~visible.any(-2)[..., None] # hold anything: they come into no product
        q, k, v = torch.where(idle, 0.0, q), torch.where(hidden, 0.0, k), torch.where(hidden, 0.0, v)
    s = (q @ k.mT) * problem.scale
    if problem.graphs.score is not None:
        s = evaluate(problem.graphs.score, leaves | {"s": s}).to(problem.dtype)
    if x.bias is not None:
        s = (s + x.bias).to(problem.dtype)
    if problem.graphs.mask is not None:
        s = torch.where(visible, s, -torch.inf)
    p, lse = softmax(s.to(wide))
    if x.rng is not None:
        kept = rng.keep(x.rng, problem.dropout, leaves["b"], leaves["h"], problem.heads, leaves["q"], leaves["k"])
        p = torch.where(kept, p, 0.0) * rng.rescale(problem.dropout)
    out = p.to(problem.dtype) @ v
    state = AttentionState(out if problem.graphs.mask is None else torch.where(idle, 0.0, out), lse)
    if x.sinks is not None:
        state = state.with_sink(x.sinks)
    return state.out, state.lse


def softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise softmax and its log-sum-exp; a row of -inf gives zeros and -inf, with gradient zero."""
    if s.shape[-1] == 0:
        return s, torch.full(s.shape[:-1], -torch.inf, dtype=s.dtype, device=s.device)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    safe = torch.where(empty, 0.0, s)
    lse = torch.logsumexp(safe, -1, keepdim=True)
    p = torch.where(empty, 0.0, torch.exp(safe - lse))
    return p, torch.where(empty, -torch.inf, lse)[..., 0]


def index_leaves(problem: Problem, x: Operands) -> dict:
    """Values of a program's leaves over the whole score matrix."""
    values = leaf_values(slot_values(x.captured, x.ints, x.floats, problem.dtype), problem.batch, problem.heads,
                         problem.seqlen_q, problem.seqlen_k, problem.device)
    return values | dict(q=torch.arange(problem.seqlen_q, device=problem.device)[:, None],
                         k=torch.arange(problem.seqlen_k, device=problem.device))
