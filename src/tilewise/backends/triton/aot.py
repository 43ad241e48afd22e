"""Every shipped kernel configuration as a case to compile without a GPU (`tilewise.inspect`).

The cases come from the code that launches: a recorder stands in for `launch.run`.
"""
from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tilewise import backends, masks, score_mods
from tilewise.backends.gpu_math import elementary, masking, philox, scoring, softmax
from tilewise.backends.triton import backward_kernels, configs, forward_kernel, launch, tiles
from tilewise.backends.triton.configs import ARCHITECTURES, Config, choose
from tilewise.backends.triton.entry import entry, flatten, source_of
from tilewise.problem import Operands, Problem, make
from tilewise.rng import Rng

SOURCES = (elementary, masking, philox, scoring, softmax, backward_kernels, forward_kernel, tiles)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.bool: "i1"}


@dataclass(frozen=True)
class Case:
    """See `tilewise.inspect.KernelCase`."""
    name: str
    direction: str
    arch: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    key: str
    unaligned: frozenset[str] = frozenset()


def shipped() -> Iterator[Case]:
    """All cases: kernels x architectures x head dims x dtypes x features."""
    for arch in ARCHITECTURES:
        for dtype, precision in configs.widths(arch):
            for head_dim in configs.HEAD_DIMS:
                for features in ("causal", "rich"):
                    yield from cases(arch, dtype, precision, head_dim, features)


def cases(arch: str, dtype: torch.dtype, precision: str, head_dim: int, features: str,
          config: Config | None = None) -> Iterator[Case]:
    """The kernels of one forward and backward pass; `config` overrides the table."""
    recorded: list[tuple[Any, Problem, Mapping[str, Any]]] = []
    problem, x = example(dtype, precision, head_dim, features)

    def record(kernel, problem, programs, values):
        recorded.append((kernel, problem, values))

    out, lse = launch.forward(problem, x, run=record)
    launch.backward(problem, x, out, lse, out, lse, backends.Needs(x.bias is not None, x.sinks is not None), run=record)
    for kernel, of, values in recorded:
        name = kernel.fn.__name__
        yield _case(kernel, of, values, arch, features, config or choose(name, of, arch))


@functools.cache
def example(dtype: torch.dtype, precision: str, head_dim: int, features: str) -> tuple[Problem, Operands]:
    """A problem whose program is "causal", or "rich": two intervals, score functions, bias, sinks and dropout."""
    q = torch.zeros(2, 32, 2, head_dim, dtype=dtype)
    if features == "causal":
        problem, x = make(q, q, q, causal=True)
    else:
        problem, x = make(
            q, q, q, mask=masks.causal() | masks.prefix(torch.zeros(2, dtype=torch.int32)), sinks=torch.zeros(2),
            score_mod=[score_mods.alibi(torch.zeros(2)), score_mods.softcap(30.0)], bias=torch.zeros(2, 32, 32, dtype=dtype),
            dropout_p=0.1, rng=Rng(0))
    settings = problem.settings._replace(precision=precision)
    return Problem(**{**problem.__dict__, "settings": settings}), x


def _case(kernel: Any, problem: Problem, values: Mapping[str, Any], arch: str, features: str, config: Config) -> Case:
    flat = flatten(kernel, problem.program, {**values, **launch.constants(problem, config), "QUERIES": None})
    # strides of real tensors: as aligned as the inputs' rows
    flat["ALIGN"] = 16
    point = entry(kernel, problem.program)
    annotations = point.fn.__annotations__
    constants, signature = {}, {}
    for name, value in flat.items():
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(annotations.get(name), str):
            signature[name] = annotations[name]
        else:
            constants[name] = value
    name = kernel.fn.__name__
    part = "" if values.get("PART", "both") == "both" else f" {values['PART']}"
    width = TYPES[problem.dtype] if problem.dtype != torch.float32 else f"fp32 {problem.precision}"
    text = repr((sources_hash(), source_of(kernel, problem.program), sorted(signature.items()),
                 sorted(constants.items(), key=str), config, arch))
    return Case(f"{name}{part} d{problem.head_dim} {width} {features}", "forward" if name == "forward" else "backward", arch, point,
                signature, constants, config.num_warps, config.num_stages,
                tensor_cores=problem.precision != "ieee" or (problem.dtype != torch.float32 and name != "preprocess"),
                key=hashlib.sha256(text.encode()).hexdigest()[:16])


@functools.cache
def sources_hash() -> str:
    """Of every kernel source and of Triton's version."""
    import triton
    text = triton.__version__ + "".join(inspect.getsource(module) for module in SOURCES)
    return hashlib.sha256(text.encode()).hexdigest()
