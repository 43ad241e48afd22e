"""The kernels as cases to compile without a GPU (`tilewise.inspect`)."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tilewise.backends.gpu_math import gradients, philox, rows, scoring, softmax
from tilewise.backends.gpu_math.cases import Case, key, sources_hash, typed
from tilewise.backends.gpu_math.entry import entry, flatten, source_of
from tilewise.baselines.flash1 import kernels, launch
from tilewise.baselines.flash1.blocks import Blocks, in_registers
from tilewise.masks import Mask
from tilewise.problem import make
from tilewise.rng import Rng

TARGETS = {"sm_80": 8, "sm_90": 9}      # major compute capabilities
SOURCES = (gradients, philox, rows, scoring, softmax, kernels)


def cases(arch: str, dtype: torch.dtype, head_dim: int, *, mask: Mask | None = None, dropout_p: float = 0.1,
          blocks: Blocks | None = None) -> Iterator[Case]:
    """Forward and backward, by default in the blocks that a call has. arch: a key of `TARGETS`."""
    of_forward, of_backward = (blocks, blocks) if blocks else in_registers(head_dim, dtype.itemsize, TARGETS[arch])
    q = torch.zeros(2, 64, 2, head_dim, dtype=dtype)
    problem, x = make(q, q, q, mask=mask, dropout_p=dropout_p, rng=Rng(0))
    recorded: list[tuple[Any, Mapping[str, Any]]] = []

    def record(kernel, problem, values):
        recorded.append((kernel, values))

    state = launch.forward(problem, x, of_forward, run=record)
    launch.backward(problem, x, state._replace(O=x.q), x.q, of_backward, run=record)
    for kernel, values in recorded:
        name = kernel.fn.__name__
        point, flat = entry(kernel, problem.program), flatten(kernel, problem.program, values)
        signature, constants = typed(point, flat)
        of_code = key(sources_hash(SOURCES), source_of(kernel, problem.program), sorted(signature.items()),
                      sorted(constants.items(), key=str), launch.WARPS, arch)
        yield Case(f"flash1 {name} d{head_dim} {dtype}", name, arch, point, signature, constants, launch.WARPS, 1,
                   dtype != torch.float32, of_code)
