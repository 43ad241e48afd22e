"""Problems of fp8 inputs as problems of copies in bf16, for backends that do not multiply fp8.

Scales are [B, H_kv], positive; a query head has that of its key head:

    s = scale * q_scale * k_scale * (q8 . k8)        out = v_scale * (p @ v8)

In bf16 every stored number is exact; the scales of q and k multiply the score before anything else does, that of v the output.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tilewise.fp8 import WIDE
from tilewise.problem import Operands, Problem
from tilewise.trace.derive import multiplied


def widened(problem: Problem, x: Operands) -> tuple[Problem, Operands]:
    """The problem of copies in bf16, whose output lacks v's scale (`rescaled`)."""
    captured, ints, text = list(x.captured), list(x.ints), problem.program
    factor = x.q_scale if x.k_scale is None else x.k_scale if x.q_scale is None else x.q_scale * x.k_scale
    if factor is not None:
        text = multiplied(text, len(captured), len(ints))
        captured.append(of_query_heads(problem, factor))
        ints += captured[-1].stride()
    return (replace(problem, quantized=False, settings=problem.settings._replace(program=text)),
            x._replace(q=x.q.to(WIDE), k=x.k.to(WIDE), v=x.v.to(WIDE), q_scale=None, k_scale=None, v_scale=None,
                       captured=captured, ints=ints))


def copied(x: Operands) -> int:
    """Bytes of those copies."""
    return WIDE.itemsize * (x.q.numel() + x.k.numel() + x.v.numel())


def rescaled(problem: Problem, x: Operands, out: Tensor) -> Tensor:
    """out [.., H, rows, D_v] times v's scale."""
    if x.v_scale is None:
        return out
    factor = of_query_heads(problem, x.v_scale)                             # [B, H]
    if x.q_rows is None:
        return (out * factor[:, :, None, None]).to(out.dtype)
    sequence = torch.bucketize(torch.arange(out.shape[2], device=out.device), x.q_rows[:, 1].contiguous(), right=True) - 1
    return (out * factor[sequence.clamp(min=0)].T[None, :, :, None]).to(out.dtype)


def of_query_heads(problem: Problem, scale: Tensor) -> Tensor:
    """[B, H] of [B, H_kv]."""
    return scale.repeat_interleave(problem.group, 1)
