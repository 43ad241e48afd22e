"""Native kernels for CPUs: FlashAttention-2 in C++, compiled at first use by the machine's own compiler.

    kernels/       the C++ source, in vector extensions that GCC and Clang share     compiler.py   builds and keeps it
    launch.py      what a kernel is told                                             sizes.py      how work is cut
    gradients.py   the backward pass's calls                                         tangents.py   those of forward mode, and
    threads.py     PyTorch's own threads                                                           of the backward's derivative
    append.py      new keys and values                                               layouts.py    reads how tensors lie
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs, Tangents
from tilewise.backends.cpu import compiler, gradients, launch, sizes, tangents, threads
from tilewise.backends.cpu.append import prepared_append, write
from tilewise.backends.cpu.layouts import reader as layout_reader
from tilewise.problem import Operands, Problem
from tilewise.statistics import Statistics

__all__ = ["backward", "backward_tangent", "forward", "forward_with_statistics", "layout_reader", "precision", "prepared",
           "prepared_append", "prepared_backward", "repeatable", "splits", "supports", "supports_tangents", "tangent",
           "tile_sizes", "volunteers", "workspace", "write"]


def supports(problem: Problem) -> str | None:
    """None, or why these kernels cannot compute the problem."""
    if problem.device.type != "cpu":
        return f"inputs are on {problem.device.type}; its kernels run on CPUs"
    if problem.dtype == torch.float64:
        return "fp64 inputs (its kernels take fp16, bf16 and fp32)"
    if not compiler.compiler():
        return f"no C++ compiler ({', '.join(compiler.COMPILERS)} or the one that CXX names) builds its kernels"
    if threads.entry() is None:
        return "PyTorch has no OpenMP runtime whose threads its kernels could use"
    return None


volunteers = supports


def precision(problem: Problem) -> str:
    """How fp32 inputs are multiplied."""
    return "ieee"


def tile_sizes(problem: Problem) -> tuple[int, int]:
    """(queries, keys) per tile, forward."""
    return sizes.rows(problem), sizes.PANEL


def repeatable(problem: Problem) -> bool:
    """Whether gradients have the same bits each time."""
    return True


def splits(problem: Problem) -> int:
    """Shares of the keys, merged afterwards."""
    return sizes.splits(problem)


def workspace(problem: Problem) -> tuple[int, int]:
    """Bytes, forward and backward."""
    return sizes.workspace(problem)


def forward(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    return launch.forward(problem, operands)


def prepared(problem: Problem, operands: Operands, out: Tensor) -> Callable[..., None]:
    return launch.prepared(problem, operands, out)


def prepared_backward(problem: Problem, operands: Operands, out: Tensor, dout: Tensor) -> Callable[..., None] | None:
    return gradients.prepared(problem, operands, out, dout)


def forward_with_statistics(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor, Statistics]:
    return launch.forward_with_statistics(problem, operands)


def backward(problem: Problem, operands: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
             needs: Needs) -> Gradients:
    return gradients.backward(problem, operands, out, lse, dout, dlse, needs)


def supports_tangents(problem: Problem) -> str | None:
    """None, or why `tangent` and `backward_tangent` cannot compute the problem."""
    return "keys from a cache, which is for inference" if problem.cached else None


def tangent(problem: Problem, operands: Operands, direction: Tangents, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return tangents.tangent(problem, operands, direction, out, lse)


def backward_tangent(problem: Problem, operands: Operands, direction: Tangents, out: Tensor, lse: Tensor, out_tangent: Tensor,
                     lse_tangent: Tensor, dout: Tensor, dlse: Tensor | None, needs: Needs) -> Gradients:
    return tangents.backward_tangent(problem, operands, direction, out, lse, out_tangent, lse_tangent, dout, dlse, needs)
