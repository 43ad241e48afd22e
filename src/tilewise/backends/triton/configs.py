"""Tile sizes of the shipped kernels: data, in `configs.tsv` beside this file.

A row of the table says: this kernel, for inputs of this width on this architecture, head dims up to `head_dim` (the larger of
D and D_v) and these features, works on BLOCK_M queries x BLOCK_N keys per tile with so many warps and pipeline stages.

    width      "16" (fp16, bf16), "ieee" or "tf32" (fp32 by the precision of its products)
    features   "plain"; "rich": with score function, bias or dropout, which take registers; "listed": plain with a list of
               tiles, where "rich", which also serves it, will not do
    kernel     as `forward_row` calls it; "forward entropy": in its place where the entropy is asked for and takes registers
               that the kernel does not have

Every row compiles without register spills and inside the shared memory of its architecture (`results/gates.json`); where no
row exists nothing is shipped: of forward mode and second derivatives (`missing_tangents`) less than of the rest. BLOCK_N is
a multiple of 32, as dropout's bits want. Rows were chosen by that and by size, not yet by measured speed.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tilewise.backends.gpu_math.splits import decodes, few_queries
from tilewise.problem import Problem

TABLE = Path(__file__).with_name("configs.tsv")
COLUMNS = ("kernel", "width", "arch", "head_dim", "features", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
WIDTHS = {"16": (torch.bfloat16, "ieee"), "ieee": (torch.float32, "ieee"), "tf32": (torch.float32, "tf32")}
HEAD_DIMS = (64, 128, 256, 512, 576)    # the last for keys of which values are a part, in a cache


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


INTERPRETER = Config(32, 32, 4, 1)


class Key(NamedTuple):
    kernel: str
    width: str
    arch: str
    head_dim: int
    features: str


@functools.cache
def table() -> dict[Key, Config]:
    rows = {}
    for line in TABLE.read_text().splitlines()[1:]:
        kernel, width, arch, head_dim, features, *config = line.split("\t")
        rows[Key(kernel, width, arch, int(head_dim), features)] = Config(*map(int, config))
    return rows


def key(kernel: str, problem: Problem, arch: str) -> Key:
    """The row that a kernel of a problem asks for."""
    dim = max(problem.head_dim, problem.head_dim_v)
    width = "16" if problem.dtype != torch.float32 else precision(problem)
    if problem.graphs.score is not None or problem.bias_shape is not None or problem.dropout > 0:
        features = "rich"
    else:
        features = "listed" if problem.graphs.listed else "plain"
    return Key(kernel, width, arch, min(d for d in HEAD_DIMS if d >= dim), features)


def choose(kernel: str, problem: Problem, arch: str) -> Config:
    """The configuration of a kernel for a problem; KeyError where none is shipped."""
    if arch == "interpreter":
        return INTERPRETER
    rows, wanted = table(), key(kernel, problem, arch)
    wanted = wanted if wanted in rows else wanted._replace(features="rich")
    own = wanted._replace(kernel=f"{kernel} entropy")
    return rows[own if "entropy" in problem.statistics and own in rows else wanted]


SPAN = 1024                             # keys in a span of batch_invariant


def forward_row(problem: Problem) -> str:
    """What the table calls the forward kernel: by what is compiled into it, and by how many queries it works on."""
    if problem.batch_invariant:
        return "invariant"
    if decodes(problem):
        return "decode"
    return "prefill" if problem.cached else "forward"


def span_of(problem: Problem, config: Config) -> int:
    """Tiles in a span; 0: all keys are one."""
    return max(1, SPAN // config.BLOCK_N) if problem.batch_invariant and not problem.graphs.listed else 0


def missing(problem: Problem, arch: str) -> str | None:
    """What is not shipped for a problem on an architecture; None: all its kernels are."""
    if arch not in (*ARCHITECTURES, "interpreter"):
        return f"no kernels are shipped for {arch}"
    if problem.head_dim > 512 and not problem.shared:
        return "head dims over 512 but where values are stored as a part of keys"
    if problem.stored is not None and problem.head_dim > 256:
        return "caches in fp8 with head dims over 256"
    return not_shipped(needed(problem), problem, arch)


def not_shipped(kernels: Sequence[str], problem: Problem, arch: str) -> str | None:
    """Which of the kernels has no row for a problem; None: all have."""
    for kernel in kernels:
        try:
            choose(kernel, problem, arch)
        except KeyError:
            wanted = key(kernel, problem, arch)
            below = max((d for d in HEAD_DIMS if d < wanted.head_dim), default=0)
            inputs = "16 bits" if wanted.width == "16" else f"fp32 ({wanted.width})"
            return f"no {kernel} kernel is shipped for {arch}, head dims over {below}, {inputs}, {wanted.features}"
    return None


def missing_tangents(problem: Problem, arch: str) -> str | None:
    """What is not shipped for a problem's forward mode and second derivatives; None: all kernels are."""
    problem = of_directions(problem)
    kernels = ("tangent", "query_gradient_tangents", "key_gradient_tangents dk", "key_gradient_tangents dv")
    return not_shipped([*kernels, *([] if problem.bias_shape is None else ["bias_gradient_tangent"])], problem, arch)


def of_directions(problem: Problem) -> Problem:
    """The problem as its derivatives are computed: fp32 products by IEEE rules, also where tf32 is allowed, which spills."""
    return replace(problem, settings=problem.settings._replace(precision="ieee"))


def needed(problem: Problem) -> list[str]:
    """The kernels of a forward pass, and of a backward pass where there is one."""
    of_keys = ["key_mass"] if "key_mass" in problem.statistics else []
    if problem.cached:
        return [forward_row(problem), "merge", *of_keys]
    return [forward_row(problem), *(["merge"] if few_queries(problem) else []), *of_keys, "preprocess",
            *("key_gradients" + part for part in parts(problem)), "query_gradients",
            *(["summed_gradient"] if problem.bias_shape is not None or problem.graphs.learned else [])]


def parts(problem: Problem) -> tuple[str, ...]:
    """The passes of the dK, dV kernel: two where both accumulators do not fit into registers together."""
    return ("",) if max(problem.head_dim, problem.head_dim_v) <= 128 else (" dk", " dv")


def precision(problem: Problem) -> str:
    """Of fp32 products: "high" asks for at least tf32x3, whose kernels spill registers, and gets IEEE."""
    return "tf32" if problem.precision == "tf32" else "ieee"


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture whose rows serve a device; "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    return {8: "sm_89", 9: "sm_90", 10: "sm_100", 12: "sm_89"}.get(major, f"sm_{major}{minor}")
