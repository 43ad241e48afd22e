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
from tilewise.backends.triton import backward_kernels, forward_kernel, launch, tiles
from tilewise.backends.triton.configs import ARCHITECTURES, HEAD_DIMS, WIDTHS, Config, choose, missing
from tilewise.backends.triton.entry import entry, flatten, source_of
from tilewise.block_sparse import block_mask
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


# The programs compiled for each kind of row: one for all kernels, then "tables" for `summed_gradient`.
VARIANTS = {"plain": ("",), "listed": ("",), "rich": ("", "tables")}


def shipped() -> Iterator[Case]:
    """The cases of each row of the table, on its architecture."""
    for arch in ARCHITECTURES:
        for width in WIDTHS:
            for head_dim in HEAD_DIMS:
                for features, variants in VARIANTS.items():
                    if missing(example(width, head_dim, features)[0], arch) is None:
                        for variant in variants:
                            yield from cases(arch, width, head_dim, features, variant)


def cases(arch: str, width: str, head_dim: int, features: str, variant: str = "",
          config: Config | None = None) -> Iterator[Case]:
    """The kernels of one forward and backward pass; `config` overrides the table."""
    recorded: list[tuple[Any, Problem, Mapping[str, Any]]] = []
    problem, x = example(width, head_dim, features, variant)

    def record(kernel, problem, programs, values):
        if variant != "tables" or kernel.fn.__name__ == "summed_gradient":
            recorded.append((kernel, problem, values))

    out, lse = launch.forward(problem, x, run=record)
    needs = backends.Needs(x.bias is not None, x.sinks is not None, tuple(t.is_floating_point() for t in x.captured))
    launch.backward(problem, x, out, lse, out, lse, needs, run=record)
    for kernel, of, values in recorded:
        if features == "listed" and kernel.fn.__name__ == "preprocess":
            continue
        found = config or choose(launch.config_name(kernel, values), of, arch)
        yield _case(kernel, of, values, arch, f"{width} {features} {variant}".strip(), found, width != "ieee")


@functools.cache
def example(width: str, head_dim: int, features: str, variant: str = "") -> tuple[Problem, Operands]:
    """A problem that is "plain": causal; "listed": sparse in blocks; "rich": two intervals, score functions, bias, sinks and
    dropout, or as "tables" relative positions and a table read by any index."""
    dtype, precision = WIDTHS[width]
    q = torch.zeros(2, 32, 2, head_dim, dtype=dtype)
    table, ids = torch.zeros(2, 63), torch.zeros(32, dtype=torch.int32)
    programs: dict[str, dict[str, Any]] = {
        "plain": dict(causal=True),
        "listed": dict(mask=block_mask(torch.ones(2, 2, 2, dtype=torch.bool), block_size=16)),
        "rich": dict(mask=masks.causal() | masks.prefix(torch.zeros(2, dtype=torch.int32)), sinks=torch.zeros(2),
                     score_mod=[score_mods.alibi(torch.zeros(2)), score_mods.softcap(30.0)],
                     bias=torch.zeros(2, 32, 32, dtype=dtype), dropout_p=0.1, rng=Rng(0)),
        "rich tables": dict(causal=True, score_mod=lambda s, b, h, i, j: s + table[h, i - j + 31] + table[h, ids[i] + ids[j]]),
    }
    problem, x = make(q, q, q, **programs[f"{features} {variant}".strip()])
    settings = problem.settings._replace(precision=precision)
    return Problem(**{**problem.__dict__, "settings": settings}), x


def _case(kernel: Any, problem: Problem, values: Mapping[str, Any], arch: str, row: str, config: Config,
          tensor_cores: bool) -> Case:
    flat = flatten(kernel, problem.program, {**values, **launch.settled(problem, values, config)})
    # strides of real tensors: as aligned as the inputs' rows
    flat["ALIGN"] = 16
    point = entry(kernel, problem.program, values.get("LOOKUP"))
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
    text = repr((sources_hash(), source_of(kernel, problem.program, values.get("LOOKUP")), sorted(signature.items()),
                 sorted(constants.items(), key=str), config, arch))
    pattern = values.get("PATTERN", "direct")
    label = launch.config_name(kernel, values) + ("" if pattern == "direct" else f" {pattern}")
    return Case(f"{label} d{problem.head_dim} {row}",
                "forward" if name == "forward" else "backward", arch, point, signature, constants, config.num_warps,
                config.num_stages, tensor_cores=name != "preprocess" and tensor_cores,
                key=hashlib.sha256(text.encode()).hexdigest()[:16])


@functools.cache
def sources_hash() -> str:
    """Of every kernel source and of Triton's version."""
    import triton
    text = triton.__version__ + "".join(inspect.getsource(module) for module in SOURCES)
    return hashlib.sha256(text.encode()).hexdigest()
