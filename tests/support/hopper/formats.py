"""Number formats: values are computed in fp32 (or the integer type itself) and rounded to their type after every operation."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl

# torch type, Triton type, how elements lie in memory, what they are computed in
_TABLE = [(torch.bfloat16, tl.bfloat16, np.uint16, np.float32), (torch.float16, tl.float16, np.uint16, np.float32),
          (torch.float8_e4m3fn, tl.float8e4nv, np.uint8, np.float32), (torch.float8_e5m2, tl.float8e5, np.uint8, np.float32),
          (torch.float32, tl.float32, np.float32, np.float32), (torch.float64, tl.float64, np.float64, np.float64),
          (torch.bool, tl.int1, np.bool_, np.bool_),
          *((getattr(torch, name), getattr(tl, name), getattr(np, name), getattr(np, name)) for name in (
              "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"))]
FROM_TORCH = {of_torch: dtype for of_torch, dtype, _, _ in _TABLE}
STORED = {dtype: np.dtype(stored) for _, dtype, stored, _ in _TABLE}
COMPUTED = {dtype: np.dtype(computed) for _, dtype, _, computed in _TABLE}
NARROW = {dtype: of_torch for of_torch, dtype, stored, computed in _TABLE if np.dtype(stored).kind != np.dtype(computed).kind}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


def _narrowed(values: np.ndarray, dtype: Any) -> torch.Tensor:
    if dtype in LARGEST:    # conversions on the device saturate
        values = np.clip(values, -LARGEST[dtype], LARGEST[dtype])
    return torch.from_numpy(np.array(values, np.float32, order="C")).to(NARROW[dtype])


def rounded(values: Any, dtype: Any) -> np.ndarray:
    """`values` as numbers of a type, in the type that it is computed in."""
    if dtype in NARROW:
        return _narrowed(values, dtype).float().numpy()
    return np.asarray(values).astype(COMPUTED[dtype], copy=False)


def encode(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers of a type as they lie in memory."""
    if dtype not in NARROW:
        return values.astype(STORED[dtype], copy=False)
    return _narrowed(values, dtype).view(torch.int16 if STORED[dtype].itemsize == 2 else torch.int8).numpy().view(STORED[dtype])


def decode(stored: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers from memory; always a copy."""
    if dtype == tl.bfloat16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype not in NARROW:
        return stored.astype(COMPUTED[dtype])
    signed = np.array(stored, order="C").view(f"int{8 * stored.itemsize}")
    return torch.from_numpy(signed).view(NARROW[dtype]).float().numpy()
