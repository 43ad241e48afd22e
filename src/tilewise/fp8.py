"""fp8 (float8_e4m3fn) and its scales: a number is what is stored times its scale."""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise.trace.memo import readable

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max          # 448; there are no infinities
WIDE = torch.bfloat16                   # holds every number of fp8 exactly: of results, and of copies


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
