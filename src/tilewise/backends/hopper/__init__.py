"""FlashAttention-3 for Hopper GPUs (sm_90) in Gluon: TMA, asynchronous wgmma, specialised warps.

    forward_kernel.py                  attention
    backward_kernel.py                 gradients, walking from the keys
    query_gradients_kernel.py          dQ by itself, walking from the queries
    decode_kernel.py, merge_kernel.py  few queries of a cache
    preprocess.py   for the backward   dropout.py, tiles.py, pieces.py   what they share
    narrow.py, turned_values.py        what fp8 inputs change of the forward
    configs.py   their variants        launch.py, decoding.py            how they are called
    gluon_names.py                     one set of names for Triton 3.6 to 3.9

It has run in a simulator of Hopper's asynchrony (`tests/support/hopper/`), but on no GPU yet: until it has, "auto" passes it
over.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewise.backends import Gradients, Needs
from tilewise.backends.gpu_math import NOT_INSTALLED, triton_version
from tilewise.backends.gpu_math.splits import DECODE_ROWS, decodes, few_queries
from tilewise.kv_cache import Stored
from tilewise.problem import Operands, Problem
from tilewise.rotary import Rotary

DTYPES = (torch.float16, torch.bfloat16)
FP8 = True                              # it multiplies fp8 inputs as they are
VERSIONS = (3, 6), (3, 9)               # of Triton whose Gluon `gluon_names.py` bridges
MAX_HEAD_DIM = 256
LEAST_PIECE = 8                         # rows of a page that TMA copies at once: as many as a swizzle spans


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
    rows_k = () if problem.cached else problem.rows_k       # memory of a cache there is always
    of_16_bytes = 16 if problem.quantized or problem.stored is not None else 8
    absent = {
        f"{str(problem.dtype)[6:]} inputs (its kernels take fp16 and bf16)": problem.dtype not in DTYPES,
        "values that are a part of keys": problem.shared,
        f"head dims over {MAX_HEAD_DIM}": max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM,
        "a bias": problem.bias_shape is not None,
        "dropout of fp8 inputs": problem.quantized and problem.dropout > 0,
        "dropout over keys from a cache": problem.cached and problem.dropout > 0,
        f"keys from a cache for more than {DECODE_ROWS} queries of a group": problem.cached and not few_queries(problem),
        "keys from a cache, with a mask without intervals": problem.cached and problem.graphs.listed,
        f"pages of {problem.page_size} keys, no multiple of {LEAST_PIECE}": bool((problem.page_size or 0) % LEAST_PIECE),
        "batch_invariant": problem.batch_invariant,
        "statistics of rows and keys": problem.statistics != "",
        "num_splits": problem.splits > 1 and not by_decoding(problem),
        "tensors without rows or heads": 0 in (*problem.rows_q, *rows_k, problem.heads, problem.batch),
        "rows that do not begin at multiples of 16 bytes, as TMA needs": not problem.aligned or any(
            dim % of_16_bytes for dim in (problem.head_dim, problem.head_dim_v)),
        "gradients of captured tensors": problem.learning,
    }
    return next((reason for reason, applies in absent.items() if applies), None)


def by_decoding(problem: Problem) -> bool:
    """Whether the kernel for few queries serves a problem; it knows neither dropout nor queries in fp8."""
    return decodes(problem) and problem.dropout == 0 and not problem.quantized


def volunteers(problem: Problem) -> str | None:
    """As `supports`, for backend="auto"."""
    return supports(problem) or 'not yet run on a GPU: only backend="hopper" takes it'


def precision(problem: Problem) -> str:
    """How fp32 inputs are multiplied: none are taken."""
    return "ieee"


def tile_sizes(problem: Problem) -> tuple[int, int]:
    """(queries, keys) per tile of the forward kernel."""
    from tilewise.backends.hopper import configs, decoding
    config = decoding.chosen(problem) if by_decoding(problem) else configs.choose(configs.forward(problem), problem)
    return config.BLOCK_M, config.BLOCK_N


def repeatable(problem: Problem) -> bool:
    """Whether gradients have the same bits each time: not where dQ is added in any order."""
    from tilewise.backends.hopper.configs import ADDED, passes
    return passes(problem) not in ADDED


def splits(problem: Problem) -> int:
    """Shares of the keys, merged afterwards."""
    from tilewise.backends.hopper import decoding
    return decoding.splits(problem) if by_decoding(problem) else 1


def workspace(problem: Problem) -> tuple[int, int]:
    """Bytes, forward and backward: lse and the parts of a split; lse, also in base 2, delta and, where it is added in any
    order, dQ in fp32. Of fp8 inputs: lse and the values, transposed; there is no backward."""
    statistics = 4 * problem.heads * problem.queries
    if problem.quantized:
        from tilewise.backends.hopper import launch
        return statistics + math.prod(launch.turned_shape(problem, tile_sizes(problem)[1])), 0
    parts = splits(problem)
    return (statistics + (parts * statistics * (1 + problem.head_dim_v) if parts > 1 else 0),
            (3 + (0 if repeatable(problem) else problem.head_dim)) * statistics)


def forward(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    from tilewise.backends.hopper import decoding, launch
    return (decoding if by_decoding(problem) else launch).forward(problem, operands)


def write(stored: Stored, new: Tensor, k_new: Tensor, v_new: Tensor | None, q: Tensor | None, q_rows: Tensor | None,
          rotary: Rotary | None) -> Tensor | None:
    """`kv_cache.write` in one launch."""
    from tilewise.backends.gpu_math import append
    return append.write(stored, new, k_new, v_new, q, q_rows, rotary)


def backward(problem: Problem, operands: Operands, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
             needs: Needs) -> Gradients:
    from tilewise.backends.hopper import launch
    return launch.backward(problem, operands, out, lse, dout, dlse, needs)
