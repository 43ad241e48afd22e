"""Standard attention, dense: the specification of what every backend computes, and the baseline they are measured against.

    s = scale * q k^T -> score function -> + bias -> mask -> p = softmax(s, sink in the denominator) -> dropout -> p v

Scores and probabilities are whole N x N matrices in the inputs' dtype, the softmax is computed in fp32 (fp64 for fp64),
as in any implementation by matrices. Gradients of any order come from autograd.
"""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise import rng
from tilewise.kv_cache import write as write
from tilewise.problem import Operands, Problem
from tilewise.sequences import over_sequences, statistics_of_sequences
from tilewise.state import AttentionState, exp_difference, merge_states
from tilewise.statistics import Statistics
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


def repeatable(problem: Problem) -> bool:
    """Whether gradients have the same bits each time."""
    return True


def splits(problem: Problem) -> int:
    """Shares of the keys."""
    return max(1, problem.splits)


def attention(problem: Problem, x: Operands) -> tuple[Tensor, Tensor]:
    """out [B, H, S_q, D_v] in q's dtype and lse [B, H, S_q] in fp32 (fp64 for fp64)."""
    if problem.unequal:
        return over_sequences(attention, problem, x)
    wide = torch.promote_types(problem.dtype, torch.float32)
    leaves = index_leaves(problem, x)
    s, v, idle = scores(problem, x, leaves)
    kept = None if x.rng is None else rng.keep(x.rng, problem.dropout, leaves["b"], leaves["h"], problem.heads,
                                               leaves["q"] + problem.row, leaves["k"])
    size = max(1, -(-problem.seqlen_k // max(1, problem.splits)))
    states = []
    for first in range(0, max(1, problem.seqlen_k), size):              # one, or Flash-Decoding's splits of the keys
        own = slice(first, first + size)
        p, lse = softmax(s[..., own].to(wide))
        if kept is not None:
            p = torch.where(kept[..., own], p, 0.0) * rng.rescale(problem.dropout)
        states.append(AttentionState(p.to(problem.dtype) @ v[:, :, own], lse))
    state = states[0] if len(states) == 1 else merge_states(states)
    if idle is not None:
        state = AttentionState(torch.where(idle, 0.0, state.out), state.lse)
    if x.sinks is not None:
        state = state.with_sink(x.sinks)
    return state.out, state.lse


def scores(problem: Problem, x: Operands, leaves: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """Finished scores [B, H, S_q, S_k], -inf where hidden; values, one for each query head; which queries see no key."""
    q, k, v = x.q, *(t.repeat_interleave(problem.group, dim=1) for t in (x.k, x.v))
    idle = None
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
    return s if problem.graphs.mask is None else torch.where(visible, s, -torch.inf), v, idle


def attention_with_statistics(problem: Problem, x: Operands) -> tuple[Tensor, Tensor, Statistics]:
    """out, lse and what `problem.statistics` names."""
    out, lse = attention(problem, x)
    with torch.no_grad():
        return out, lse, statistics(problem, x, lse)


def statistics(problem: Problem, x: Operands, lse: Tensor) -> Statistics:
    """Their definition, from the matrix of probabilities."""
    if problem.unequal:
        return statistics_of_sequences(statistics, problem, x, lse)
    s = scores(problem, x, index_leaves(problem, x))[0].to(lse.dtype)
    p, of_keys = softmax(s)
    found = problem.new_statistics()
    if found.max_score is not None and problem.seqlen_k:
        found = found._replace(max_score=s.amax(-1))
    if found.entropy is not None:
        found = found._replace(entropy=torch.special.entr(p).sum(-1))
    if found.key_mass is not None:
        found = found._replace(key_mass=(p * exp_difference(of_keys, lse)[..., None]).sum(-2))
    return found


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
                         problem.seqlen_q, problem.seqlen_k, problem.device, problem.first)
    return values | dict(q=torch.arange(problem.seqlen_q, device=problem.device)[:, None],
                         k=torch.arange(problem.seqlen_k, device=problem.device))
