"""fp8 inputs (float8_e4m3fn) with scales, and the same problem in bf16 for backends that do not multiply them as they are.

A number is what is stored times its scale. Scales are fp32 [H_kv] or [B, H_kv], positive; a query head has that of its key head:

    s = scale * q_scale * k_scale * (q8 . k8)        out = v_scale * (p @ v8)

In bf16 every stored number is exact; the scales of q and k multiply the score before anything else does, that of v the output.
"""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tilewise.trace.derive import multiplied
from tilewise.trace.memo import readable

if TYPE_CHECKING:
    from tilewise.problem import Operands, Problem

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max          # 448; there are no infinities
WIDE = torch.bfloat16                   # of results, and of copies


def checked_scale(name: str, scale: Tensor | None, dtype: torch.dtype, batch: int, kv_heads: int,
                  device: torch.device) -> Tensor | None:
    """A scale as [B, H_kv]. Raises TypeError or ValueError naming it."""
    if scale is None:
        return None
    if dtype != FP8:
        raise ValueError(f"{name}: expected None: only float8_e4m3fn tensors come with scales, not {dtype}")
    shapes = ((kv_heads,), (batch, kv_heads))
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.shape not in shapes:
        got = f"{scale.dtype} {list(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"{name}: expected a float32 tensor [H_kv] = [{kv_heads}] or [B, H_kv] = [{batch}, {kv_heads}], "
                        f"got {got}")
    if scale.device != device:
        raise ValueError(f"{name}: expected q's device {device}, got {scale.device}")
    if readable(scale) and not bool(((scale > 0) & (scale < torch.inf)).all()):
        raise ValueError(f"{name}: expected positive finite numbers, got {scale.tolist()}")
    return scale.expand(batch, kv_heads)


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
