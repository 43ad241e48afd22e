"""Every shipped variant as a case to compile without a GPU (`tilewise.inspect`), as `triton/aot.py` has its own."""
from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tilewise import masks, score_mods
from tilewise.backends import Needs
from tilewise.backends.gpu_math import elementary, gradients, masking, philox, places, preprocess, rows, scoring, softmax
from tilewise.backends.gpu_math.cases import Case, key, sources_hash, typed
from tilewise.backends.gpu_math.entry import entry, flatten, source_of
from tilewise.backends.hopper import (
    backward_kernel,
    backward_producer,
    configs,
    decode_kernel,
    decoding,
    dropout,
    forward_kernel,
    gluon_names,
    launch,
    merge_kernel,
    messages,
    narrow,
    pieces,
    products,
    turned_values,
)
from tilewise.backends.hopper import preprocess as with_lse
from tilewise.backends.hopper import query_gradients_kernel as queries_kernel
from tilewise.backends.hopper import tiles as shared_tiles
from tilewise.block_sparse import block_mask
from tilewise.fp8 import FP8
from tilewise.kv_cache import KVCache
from tilewise.paged_cache import PagedKVCache
from tilewise.problem import Layout, Operands, Problem, make, make_unequal
from tilewise.rng import Rng

ARCH = "sm_90"
SOURCES = (elementary, gradients, masking, philox, places, preprocess, rows, scoring, softmax, backward_kernel,
           backward_producer, decode_kernel, dropout, forward_kernel, gluon_names, merge_kernel, messages, narrow, pieces,
           products, queries_kernel, shared_tiles, turned_values, with_lse)
N = 256
DIRECTIONS = {"forward": "forward", "turn_values": "forward", "query_gradients": "dq", "decode": "decode", "merge": "decode"}


def problems(dtype: torch.dtype, head_dim: int, head_dim_v: int) -> Iterator[tuple[str, Problem, Operands]]:
    """What is compiled for a row of the table: "full", "causal", "listed", "packed"; with score functions and sinks, "rich";
    "dropout"."""
    q, v = (torch.zeros(2, N, 2, dim, dtype=dtype) for dim in (head_dim, head_dim_v))
    sequences = torch.zeros(2, 3, dtype=torch.int32)
    sparse = block_mask(torch.ones(2, 4, 4, dtype=torch.bool), block_size=64)
    score = [score_mods.alibi(torch.zeros(2)), score_mods.softcap(30.0)]
    two_intervals = masks.causal() | masks.prefix(torch.zeros(2, dtype=torch.int32))
    programs: dict[str, dict[str, Any]] = {
        "full": {}, "causal": dict(causal=True), "listed": dict(mask=sparse),
        "rich": dict(mask=two_intervals, score_mod=score, sinks=torch.zeros(2)),
        "dropout": dict(causal=True, dropout_p=0.1, rng=Rng(0))}
    for name, options in programs.items():
        yield name, *make(q, q, v, **options)
    packed, packed_v = (x.flatten(0, 1)[None].transpose(1, 2) for x in (q, v))
    where = Layout(sequences, sequences, max_seqlen_q=N, max_seqlen_k=N)
    yield "packed", *make_unequal(where, packed, packed, packed_v, causal=True)


def shipped(dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> Iterator[Case]:
    """The cases of each row of the table; fp16 compiles to the same counts as bf16."""
    for dtype in dtypes:
        for dims in configs.head_dims("forward"):
            for name, problem, x in problems(dtype, *dims):
                yield from cases(name, problem, x)
        for head_dim, _ in configs.head_dims("decode"):
            for name, problem, x in cached(dtype, head_dim):
                yield from decode_cases(name, problem, x)
    for dims in configs.head_dims("forward fp8"):
        for name, problem, x in problems(FP8, *dims):
            if not problem.dropout:
                yield from narrow_cases(name, problem, x)


def narrow_cases(name: str, problem: Problem, x: Operands) -> Iterator[Case]:
    """The kernels of a forward pass of fp8 inputs; values are turned alike in all programs."""
    recorded: list[Case] = []

    def record(kernel, problem, programs, values, warps):
        recorded.append(case(f"fp8 {name}", kernel, problem, values, warps))

    launch.forward(problem, x, start=record)
    return (case for case in recorded if case.kernel.fn.__name__ != "turn_values_entry" or name in ("full", "packed"))


def cached(dtype: torch.dtype, head_dim: int) -> Iterator[tuple[str, Problem, Operands]]:
    """What is compiled of decoding: a cache in one piece, in pages, in pages in fp8; "rich" as above."""
    q = torch.zeros(2, 4, 1, head_dim, dtype=dtype)
    score = [score_mods.alibi(torch.zeros(4)), score_mods.softcap(30.0)]
    two_intervals = masks.causal() | masks.prefix(torch.zeros(2, dtype=torch.int32))
    causal: dict[str, Any] = dict(causal=True)
    rich: dict[str, Any] = dict(mask=two_intervals, score_mod=score, sinks=torch.zeros(4))
    for kind, stored in (("", None), ("pages", dtype), ("fp8", torch.float8_e4m3fn)):
        if stored is None:
            kv = KVCache(2, N, 2, head_dim, dtype=dtype).stored()
        else:
            pages = PagedKVCache(4, 16, 2, head_dim, max_sequences=2, dtype=stored)
            kv = pages.stored([pages.new(), pages.new()])
        where = Layout(None, kv.rows, kv.pages, kv.k_scale, kv.v_scale, 0, N, cached=True)
        yield kind, *make_unequal(where, q, kv.k, kv.v, num_splits=2, **causal)
        if kind != "pages":
            yield f"{kind} rich".strip(), *make_unequal(where, q, kv.k, kv.v, **rich)


def decode_cases(name: str, problem: Problem, x: Operands) -> Iterator[Case]:
    """The kernels of a problem with few queries, as `decoding` calls them."""
    recorded: list[Case] = []

    def record(kernel, problem, programs, values, warps):
        recorded.append(case(name, kernel, problem, values, warps))

    decoding.forward(problem, x, start=record)
    return (case for case in recorded if case.kernel.fn.__name__ != "merge_entry" or name == "pages")


def cases(name: str, problem: Problem, x: Operands) -> Iterator[Case]:
    """The kernels of a problem, as `launch` calls them, with dQ added in any order and always in the same."""
    recorded: dict[str, Case] = {}

    def record(kernel, problem, programs, values, warps):
        one = case(name, kernel, problem, values, warps)
        recorded.setdefault(one.name, one)

    out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
    launch.forward(problem, x, start=record)
    for deterministic in (False, True):
        asked = replace(problem, settings=problem.settings._replace(deterministic=deterministic))
        launch.backward(asked, x, out, lse, out, lse, Needs(False, x.sinks is not None), start=record)
    return (case for case in recorded.values() if case.kernel.fn.__name__ != "preprocess_entry" or name == "packed")


def case(name: str, kernel: Any, problem: Problem, values: Mapping[str, Any], warps: int) -> Case:
    flat = flatten(kernel, problem.program, values) | {"ALIGN": 16}
    point, called = entry(kernel, problem.program), kernel.fn.__name__
    of_fp8 = {name: x for name, x in flat.items() if hasattr(x, "block_shape") and x.base.dtype == FP8}
    signature, constants = typed(point, {name: x for name, x in flat.items() if name not in of_fp8})
    signature |= {name: f"tensordesc<fp8e4nv{x.block_shape},{x.layout!r}>" for name, x in of_fp8.items()}
    maxnreg = values.get("maxnreg")
    dims = "x".join(str(d) for d in dict.fromkeys((problem.head_dim, problem.head_dim_v)))
    return Case(" ".join(["hopper", called, *values.get("PART", "").split(), f"d{dims}", name]).strip(),
                DIRECTIONS.get(called, "backward"), ARCH, point, signature, constants, warps, 1,
                called not in ("preprocess", "merge", "turn_values"),
                key(sources(), source_of(kernel, problem.program), sorted(signature.items()),
                    sorted(constants.items(), key=str), warps, maxnreg), maxnreg=maxnreg)


@functools.cache
def sources() -> str:
    return sources_hash(SOURCES)
