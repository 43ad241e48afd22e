"""Portable GPU kernels in Triton: FlashAttention-2 for NVIDIA GPUs from sm_80 and AMD's gfx942.

Kernels: `forward_kernel.py`, `backward_kernels.py`, `key_mass_kernel.py`, and of derivatives in a direction
`tangent_kernel.py`, `backward_tangent_kernels.py`; tile sizes: `configs.py`; how they are called: `launch.py`, `tangents.py`.
"""
from __future__ import annotations

import torch

from tilewise.backends.gpu_math import NOT_INSTALLED, triton_version
from tilewise.problem import Problem


def missing() -> str | None:
    """Why Triton cannot be used at all; None: it can."""
    version = triton_version()
    if version is None:
        return NOT_INSTALLED
    text, numbers = version
    return None if numbers >= (3, 6) else f"triton {text} is older than 3.6"


def supports(problem: Problem) -> str | None:
    """None, or why these kernels cannot compute the problem."""
    if missing() is not None:
        return missing()
    if problem.dtype == torch.float64:
        return "fp64 inputs (its kernels take fp16, bf16 and fp32)"
    if problem.device.type != "cuda" and not interpreting():
        return f"inputs are on {problem.device.type}; Triton kernels run on GPUs"
    if "entropy" in problem.statistics and (problem.cached or problem.batch_invariant):
        return "the entropy of rows over keys from a cache, or batch-invariant: its kernels would spill registers"
    from tilewise.backends.triton import configs
    return configs.missing(problem, configs.architecture(problem.device))


def volunteers(problem: Problem) -> str | None:
    """As `supports`, for backend="auto": the interpreter is for tests."""
    if problem.device.type != "cuda":
        return f"inputs are on {problem.device.type}; Triton kernels run on GPUs"
    return supports(problem)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    import triton
    return triton.knobs.runtime.interpret


def tile_sizes(problem: Problem) -> tuple[int, int]:
    """(queries, keys) per tile of the forward kernel."""
    from tilewise.backends.triton.configs import architecture, choose, forward_row
    config = choose(forward_row(problem), problem, architecture(problem.device))
    return config.BLOCK_M, config.BLOCK_N


def workspace(problem: Problem) -> tuple[int, int]:
    """Bytes, forward and backward: lse and the parts of a split; lse and delta."""
    statistics = 4 * problem.heads * problem.queries
    parts = splits(problem)
    return statistics + (parts * statistics * (1 + problem.head_dim_v) if parts > 1 else 0), 2 * statistics


def repeatable(problem: Problem) -> bool:
    """Whether gradients have the same bits each time."""
    return True


def splits(problem: Problem) -> int:
    """Shares of the keys, merged afterwards."""
    from tilewise.backends.triton import configs, launch
    config = configs.choose(configs.forward_row(problem), problem, configs.architecture(problem.device))
    return launch.splits_of(problem, config)


def precision(problem: Problem) -> str:
    """How fp32 inputs are multiplied."""
    from tilewise.backends.triton import configs
    return configs.precision(problem)


def forward(problem, operands):
    from tilewise.backends.triton import launch
    return launch.forward(problem, operands)


def prepared(problem, operands, out):
    from tilewise.backends.triton import launch
    return launch.prepared(problem, operands, out)


def prepared_backward(problem, operands, out, dout):
    from tilewise.backends.triton import launch
    return launch.prepared_backward(problem, operands, out, dout)


def forward_with_statistics(problem, operands):
    from tilewise.backends.triton import launch
    return launch.forward_with_statistics(problem, operands)


def supports_tangents(problem: Problem) -> str | None:
    """None, or why `tangent` and `backward_tangent` cannot compute the problem."""
    from tilewise.backends.triton import configs
    return configs.missing_tangents(problem, configs.architecture(problem.device))


def tangent(problem, operands, tangents, out, lse):
    from tilewise.backends.triton import tangents as launch
    return launch.tangent(problem, operands, tangents, out, lse)


def backward_tangent(problem, operands, tangents, out, lse, out_tangent, lse_tangent, dout, dlse, needs):
    from tilewise.backends.triton import tangents as launch
    return launch.backward_tangent(problem, operands, tangents, out, lse, out_tangent, lse_tangent, dout, dlse, needs)


def write(stored, new, k_new, v_new, q, q_rows, rotary):
    """`kv_cache.write` in one launch."""
    from tilewise.backends.gpu_math import append
    return append.write(stored, new, k_new, v_new, q, q_rows, rotary)


def backward(problem, operands, out, lse, dout, dlse, needs):
    from tilewise.backends.triton import launch
    return launch.backward(problem, operands, out, lse, dout, dlse, needs)
