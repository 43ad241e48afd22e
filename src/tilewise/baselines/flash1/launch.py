"""Launches of the kernels: what is allocated, what they are told."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from tilewise.backends.gpu_math.arguments import padded
from tilewise.backends.gpu_math.entry import entry, flatten
from tilewise.backends.gpu_math.launches import start
from tilewise.baselines.flash1 import kernels
from tilewise.baselines.flash1.algorithms import State
from tilewise.baselines.flash1.blocks import Blocks, block_form
from tilewise.problem import Operands, Problem

WARPS, MAX_HEAD_DIM = 8, 256
Run = Callable[[Any, Problem, Mapping[str, Any]], None]


def run(kernel: Any, problem: Problem, values: Mapping[str, Any]) -> None:
    """Launches a kernel, one program per head."""
    start(entry(kernel, problem.program), (problem.batch * problem.heads,), flatten(kernel, problem.program, values),
          problem.device, num_warps=WARPS, num_stages=1)


def forward(problem: Problem, x: Operands, blocks: Blocks, run: Run = run) -> State:
    """O in fp32, l, m."""
    of_rows = problem.batch, problem.heads, problem.seqlen_q
    O = torch.zeros((*of_rows, problem.head_dim_v), device=problem.device)      # Algorithm 2, line 3
    state = State(O, torch.zeros(of_rows, device=problem.device), torch.full(of_rows, -torch.inf, device=problem.device))
    if x.q.numel() and x.k.numel():
        run(kernels.forward, problem, arguments(problem, x, state, blocks))
    return state


def backward(problem: Problem, x: Operands, state: State, dO: Tensor, blocks: Blocks,
             run: Run = run) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV."""
    dQ = torch.zeros(x.q.shape, device=problem.device)                          # Algorithm 4, line 5
    dK, dV = (torch.zeros(X.shape, dtype=problem.dtype, device=problem.device) for X in (x.k, x.v))
    if x.q.numel() and x.k.numel():
        run(kernels.backward, problem, arguments(problem, x, state, blocks) | dict(dO=dO.contiguous(), dQ=dQ, dK=dK, dV=dV))
    return dQ.to(problem.dtype), dK, dV


def arguments(problem: Problem, x: Operands, state: State, blocks: Blocks) -> dict[str, Any]:
    """What both kernels are told. Inputs that are not matrices in one piece, as those of layout "bshd" with several heads, are
    copied: with strides of their own the kernels would not fit into registers."""
    M = block_form(problem, x, blocks)
    return dict(
        Q=x.q.contiguous(), K=x.k.contiguous(), V=x.v.contiguous(), O=state.O.contiguous(), l=state.l, m=state.m, M=M,
        RNG=x.rng, scale=problem.scale, heads=problem.heads, nq=problem.seqlen_q, nk=problem.seqlen_k, dropout=problem.dropout,
        captured=tuple(x.captured), ints=tuple(x.ints), floats=tuple(x.floats), PER_BATCH=M is not None and M.shape[0] > 1,
        PER_HEAD=M is not None and M.shape[1] > 1, DROPOUT=problem.dropout > 0,
        PRECISION="tf32" if problem.precision == "tf32" else "ieee", D=problem.head_dim, DV=problem.head_dim_v, BR=blocks.Br,
        BC=blocks.Bc, BLOCK_D=padded(problem.head_dim), BLOCK_DV=padded(problem.head_dim_v))


def missing(problem: Problem) -> str | None:
    """Why the kernels cannot compute a problem; None: they can."""
    if problem.dtype == torch.float64:
        return "fp64 inputs (its kernels take fp16, bf16 and fp32)"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"head dims over {MAX_HEAD_DIM}"
    if problem.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"inputs are on {problem.device.type}; Triton kernels run on GPUs"
    return None
