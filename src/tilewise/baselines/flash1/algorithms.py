"""FlashAttention (Dao et al. 2022), Algorithms 1, 2, 4 and 5 in torch, line by line, for all sequences and heads at once.

Names are the paper's: N x d matrices Q, K, V, O and vectors l, m lie in slow memory, blocks Q_i, K_j, S are on chip, tau is the
scale, R the state of the random generator, M which blocks are not masked away. `read` takes a block from slow memory where the
paper loads it, `write` puts it back. Numbers in comments are lines of Algorithm 2 in the forward, of Algorithm 4 in the
backward.

Two guards are not in the paper, for rows of which every score so far is -inf: their maximum is subtracted as 0, their sum l is
divided by as 1. O, l, m and dQ are fp32 in slow memory (fp64 for fp64 inputs): rounded at every step to 16 bits, the error of O
would grow with Tc.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise import rng
from tilewise.baselines.flash1.blocks import Blocks, block_form, leaves
from tilewise.problem import Operands, Problem
from tilewise.trace.bounds import EMPTY
from tilewise.trace.evaluate import evaluate


class State(NamedTuple):
    """What the forward keeps in slow memory: O [B, H, S_q, D_v], row sums l and row maxima m [B, H, S_q]."""
    O: Tensor
    l: Tensor
    m: Tensor


class Grid:
    """Where blocks lie, and what mask and dropout do to one."""

    def __init__(self, problem: Problem, x: Operands, blocks: Blocks):
        self.problem, self.rng, self.blocks = problem, x.rng, blocks
        self.Tr, self.Tc = blocks.grid(problem.seqlen_q, problem.seqlen_k)
        self.leaves = leaves(problem, x)
        M = block_form(problem, x, blocks)
        self.M = None if M is None else (M != EMPTY).flatten(0, 1).any(0).tolist()

    def rows(self, i: int) -> slice:
        return slice(i * self.blocks.Br, min((i + 1) * self.blocks.Br, self.problem.seqlen_q))

    def cols(self, j: int) -> slice:
        return slice(j * self.blocks.Bc, min((j + 1) * self.blocks.Bc, self.problem.seqlen_k))

    def masked_away(self, i: int, j: int) -> bool:
        """M_ij = 0, for all sequences and heads."""
        return self.M is not None and not self.M[i][j]

    def indices(self, i: int, j: int) -> dict[str, Tensor]:
        rows, cols, device = self.rows(i), self.cols(j), self.problem.device
        return dict(q=torch.arange(rows.start, rows.stop, device=device)[:, None],
                    k=torch.arange(cols.start, cols.stop, device=device))

    def mask(self, S: Tensor, i: int, j: int) -> Tensor:
        """-inf where a score is hidden."""
        mask = self.problem.graphs.mask
        if mask is None:
            return S
        return torch.where(torch.as_tensor(evaluate(mask, self.leaves | self.indices(i, j)), device=S.device), S, -torch.inf)

    def dropout_mask(self, i: int, j: int) -> Tensor | float:
        """Z_ij: 1 / (1 - p) where an element is kept and 0 where not, drawn anew from R; 1 without dropout."""
        if self.rng is None:
            return 1.0
        t, at = self.problem.dropout, self.leaves | self.indices(i, j)
        kept = rng.keep(self.rng, t, at["b"], at["h"], self.problem.heads, at["q"], at["k"])
        return kept.to(at["float"]) * rng.rescale(t)


def forward(problem: Problem, x: Operands, blocks: Blocks) -> State:
    """Algorithm 2; with a mask, Algorithm 5; Algorithm 1 is the same with tau = 1 and neither mask nor dropout."""
    *_, state = after_each_block(problem, x, blocks)
    return state


def after_each_block(problem: Problem, x: Operands, blocks: Blocks) -> Iterator[State]:
    """The state after 0, 1, .. Tc blocks of keys: O is exact attention over the keys so far (proof of Theorem 1). The same
    tensors each time, which the next step writes to."""
    Q, K, V, tau, wide = x.q, x.k, x.v, problem.scale, torch.promote_types(problem.dtype, torch.float32)
    grid = Grid(problem, x, blocks)                                             # 1, 2, 4, 5
    O = Q.new_zeros((*Q.shape[:3], V.shape[3]), dtype=wide)                     # 3
    l, m = Q.new_zeros(Q.shape[:3], dtype=wide), Q.new_full(Q.shape[:3], -torch.inf, dtype=wide)
    yield State(O, l, m)
    for j in range(grid.Tc):                                                    # 6
        K_j, V_j = (read(X, grid.cols(j)) for X in (K, V))                      # 7
        for i in range(grid.Tr):                                                # 8
            if grid.masked_away(i, j):                                          # Algorithm 5, 9
                continue
            rows = grid.rows(i)
            Q_i, O_i, l_i, m_i = (read(X, rows) for X in (Q, O, l, m))          # 9
            S = tau * (Q_i @ K_j.mT)                                            # 10
            S = grid.mask(S, i, j)                                              # 11
            m_ij = S.amax(-1)                                                   # 12
            P = torch.exp(S - finite(m_ij)[..., None])
            l_ij = P.sum(-1)
            m_new = torch.maximum(m_i, m_ij)                                    # 13
            old, new = torch.exp(m_i - finite(m_new)), torch.exp(m_ij - finite(m_new))
            l_new = old * l_i + new * l_ij
            P = P * grid.dropout_mask(i, j)                                     # 14
            write(O, rows, ((l_i * old)[..., None] * O_i + new[..., None] * (P @ V_j)) / divisor(l_new)[..., None])     # 15
            write(l, rows, l_new)                                               # 16
            write(m, rows, m_new)
        yield State(O, l, m)


def backward(problem: Problem, x: Operands, state: State, dO: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 4: dQ, dK and dV; O may be rounded to the inputs' dtype."""
    (Q, K, V), (O, l, m), tau = x[:3], state, problem.scale
    grid = Grid(problem, x, blocks)                                             # 1 to 4
    dQ, dK, dV = (torch.zeros(X.shape, dtype=l.dtype, device=X.device) for X in (Q, K, V))                              # 5
    for j in range(grid.Tc):                                                    # 6
        K_j, V_j = (read(X, grid.cols(j)) for X in (K, V))                      # 7
        dK_j, dV_j = torch.zeros_like(K_j), torch.zeros_like(V_j)               # 8
        for i in range(grid.Tr):                                                # 9
            if grid.masked_away(i, j):
                continue
            rows = grid.rows(i)
            Q_i, O_i, dO_i, dQ_i, l_i, m_i = (read(X, rows) for X in (Q, O, dO, dQ, l, m))                              # 10
            S = tau * (Q_i @ K_j.mT)                                            # 11
            S = grid.mask(S, i, j)                                              # 12
            P = torch.exp(S - finite(m_i)[..., None]) / divisor(l_i)[..., None] # 13
            Z = grid.dropout_mask(i, j)                                         # 14
            dV_j += (P * Z).mT @ dO_i                                           # 15, 16
            dP = (dO_i @ V_j.mT) * Z                                            # 17, 18
            D_i = (dO_i * O_i).sum(-1)                                          # 19
            dS = P * (dP - D_i[..., None])                                      # 20
            write(dQ, rows, dQ_i + tau * (dS @ K_j))                            # 21
            dK_j += tau * (dS.mT @ Q_i)                                         # 22
        write(dK, grid.cols(j), dK_j)                                           # 24
        write(dV, grid.cols(j), dV_j)
    return dQ.to(Q.dtype), dK.to(Q.dtype), dV.to(Q.dtype)                       # 26


def read(X: Tensor, rows: slice) -> Tensor:
    """Rows [B, H, rows, ..] of a matrix or vector, to compute with in fp32 (fp64)."""
    return X[:, :, rows].to(torch.promote_types(X.dtype, torch.float32))


def write(X: Tensor, rows: slice, X_i: Tensor) -> None:
    X[:, :, rows] = X_i


def finite(m: Tensor) -> Tensor:
    """A maximum that can be subtracted: -inf - -inf is NaN."""
    return torch.where(m == -torch.inf, 0.0, m)


def divisor(l: Tensor) -> Tensor:
    """A sum that can be divided by."""
    return torch.where(l == 0, 1.0, l)
