"""FlashAttention-3 for Hopper GPUs (sm_90) in Gluon: TMA, asynchronous wgmma, specialised warps.

    forward_kernel.py, backward_kernel.py    the kernels          tiles.py          tiles in shared memory
    configs.py   their variants              launch.py            how they are called
    preprocess.py   for the backward         gluon_names.py    one set of names for Triton 3.6 to 3.9

It has run in a simulator of Hopper's asynchrony (`tests/support/hopper/`), but on no GPU yet: until it has, "auto" passes it
over.
"""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs
from tilewise.backends.gpu_math import NOT_INSTALLED, triton_version
from tilewise.backends.hopper.configs import choose, fitting, head_dims
from tilewise.problem import Operands, Problem

DTYPES = (torch.float16, torch.bfloat16)
VERSIONS = (3, 6), (3, 9)               # of Triton whose Gluon `gluon_names.py` bridges


def missing() -> str | None:
    """Why Gluon cannot be used at all; None: it can."""
    version = triton_version()
    if version is None:
        return NOT_INSTALLED
    text, numbers = version
    if not VERSIONS[0] <= numbers <= VERSIONS[1]:
        return f"triton {text} (its kernels are written for the Gluon of 3.6 to 3.9)"
    return None


def supports(problem: Problem) -> str | None:
    """None, or why these kernels cannot compute the problem."""
    if missing() is not None:
        return missing()
    if problem.device.type != "cuda" or torch.version.hip:
        return f"inputs are on {problem.device.type}; its kernels run on Hopper GPUs"
    major, minor = torch.cuda.get_device_capability(problem.device)
    if (major, minor) != (9, 0):
        return f"a GPU of capability {major}.{minor} (its kernels are for 9.0)"
    return unsupported(problem)


def unsupported(problem: Problem) -> str | None:
    """What these kernels lack for a problem, on any device."""
    absent = {
        f"{str(problem.dtype)[6:]} inputs (its kernels take fp16 and bf16)": problem.dtype not in DTYPES,
        too_wide("forward"): fitting("forward", problem) is None,
        f"gradients with {too_wide('backward')}": problem.differentiated and fitting("backward", problem) is None,
        "gradients with dropout": problem.differentiated and problem.dropout > 0,
        "a bias": problem.bias_shape is not None,
        "keys from a cache": problem.cached,
        "batch_invariant": problem.batch_invariant,
        "num_splits": problem.splits > 1,
        "tensors without rows or heads": 0 in (*problem.rows_q, *problem.rows_k, problem.heads, problem.batch),
        "rows that do not begin at multiples of 16 bytes, as TMA needs": not problem.aligned or any(
            dim % 8 for dim in (problem.head_dim, problem.head_dim_v)),
        "gradients of captured tensors": problem.learning,
        "deterministic gradients": problem.deterministic,
    }
    return next((reason for reason, applies in absent.items() if applies), None)


def too_wide(kernel: str) -> str:
    return f"head dims over {max(map(max, head_dims(kernel)))}"


def volunteers(problem: Problem) -> str | None:
    """As `supports`, for backend="auto"."""
    return supports(problem) or 'not yet run on a GPU: only backend="hopper" takes it'


def precision(problem: Problem) -> str:
    """How fp32 inputs are multiplied: none are taken."""
    return "ieee"


def tile_sizes(problem: Problem) -> tuple[int, int]:
    """(queries, keys) per tile of the forward kernel."""
    config = choose("forward", problem)
    return config.BLOCK_M, config.BLOCK_N


def splits(problem: Problem) -> int:
    """Shares of the keys, merged afterwards."""
    return 1


def workspace(problem: Problem) -> tuple[int, int]:
    """Bytes, forward and backward: lse; lse, also in base 2, delta and dQ in fp32."""
    statistics = 4 * problem.heads * problem.queries
    return statistics, (3 + problem.head_dim) * statistics


def forward(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    from tilewise.backends.hopper import launch
    return launch.forward(problem, operands)


def backward(problem: Problem, operands: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
             needs: Needs) -> Gradients:
    from tilewise.backends.hopper import launch
    return launch.backward(problem, operands, out, lse, dout, dlse, needs)
