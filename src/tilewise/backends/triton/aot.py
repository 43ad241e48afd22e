"""Every shipped kernel configuration as a case to compile without a GPU (`tilewise.inspect`).

The cases come from the code that launches: a recorder stands in for `launch.run`.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

from tilewise import backends, masks, score_mods
from tilewise.backends.gpu_math import (
    append,
    append_kernel,
    elementary,
    gradients,
    masking,
    philox,
    places,
    preprocess,
    rows,
    scoring,
    softmax,
    statistics,
)
from tilewise.backends.gpu_math import tangents as of_tiles
from tilewise.backends.gpu_math.cases import Case, key, sources_hash, typed
from tilewise.backends.gpu_math.entry import entry, flatten, source_of
from tilewise.backends.gpu_math.splits import DECODE_ROWS
from tilewise.backends.triton import (
    backward_kernels,
    backward_tangent_kernels,
    forward_kernel,
    key_mass_kernel,
    launch,
    tangent_kernel,
    tangents,
)
from tilewise.backends.triton.configs import ARCHITECTURES, HEAD_DIMS, WIDTHS, Config, choose, missing, missing_tangents
from tilewise.block_sparse import block_mask
from tilewise.kv_cache import KVCache
from tilewise.paged_cache import PagedKVCache
from tilewise.problem import MAX_HEAD_DIM, Layout, Operands, Problem, make, make_unequal
from tilewise.rng import Rng
from tilewise.rotary import Rotary
from tilewise.statistics import Statistics

SOURCES = (elementary, gradients, masking, philox, places, preprocess, rows, scoring, softmax, statistics, append_kernel,
           backward_kernels, forward_kernel, key_mass_kernel)
OF_TANGENTS = (*SOURCES, of_tiles, tangent_kernel, backward_tangent_kernels)

# What is compiled for each kind of row: a forward and a backward pass, of equal sequences ("") or packed ones, which takes more
# registers; `summed_gradient` alone ("tables"); forward passes alone, from a cache, batch-invariant or with statistics.
CACHED = ("decode", "decode pages", "prefill pages", "invariant pages")
STATISTICS = ("statistics packed", "statistics prefill pages")
VARIANTS = {"plain": ("", "packed", "invariant", *CACHED[:3], *STATISTICS), "listed": ("", "statistics"),
            "rich": ("packed", "tables", *CACHED[1:], *STATISTICS)}
OF_DIRECTIONS = {"plain": "packed", "listed": "", "rich": "packed"}       # forward mode and second derivatives
ONLY = {"preprocess": ("plain", "rich packed"), "merge": ("plain decode", "rich decode pages"),
        "key_mass": tuple(f"{row} {variant}" for row, variants in VARIANTS.items() for variant in variants
                          if variant in ("statistics", "statistics packed", "statistics prefill pages"))}


def shipped() -> Iterator[Case]:
    """The cases of each row of the table, on its architecture."""
    for arch in ARCHITECTURES:
        for width in WIDTHS:
            for head_dim in HEAD_DIMS:
                for features, variants in VARIANTS.items():
                    for variant in variants:
                        if head_dim <= MAX_HEAD_DIM or variant.removeprefix("statistics ") in CACHED:
                            if missing(example(width, head_dim, features, variant)[0], arch) is None:
                                yield from cases(arch, width, head_dim, features, variant)
                    if head_dim <= MAX_HEAD_DIM:
                        yield from of_tangents(arch, width, head_dim, features)
        for head_dim in HEAD_DIMS:
            yield from of_append(arch, head_dim)


def cases(arch: str, width: str, head_dim: int, features: str, variant: str = "",
          config: Config | None = None) -> Iterator[Case]:
    """The kernels of a variant; `config` overrides the table."""
    recorded: list[tuple[Any, Problem, Mapping[str, Any]]] = []
    problem, x = example(width, head_dim, features, variant)
    label = f"{features} {variant}".strip()

    def record(kernel, problem, programs, values):
        name = kernel.fn.__name__
        alone = {"tables": "summed_gradient", "statistics prefill pages": "key_mass"}.get(variant, name)
        if label in ONLY.get(name, (label,)) and name == alone:
            recorded.append((kernel, problem, values))

    out, lse, _found = launch.forward_with_statistics(problem, x, run=record)
    if not problem.cached and not problem.batch_invariant and not problem.statistics:
        needs = backends.Needs(x.bias is not None, x.sinks is not None, tuple(t.is_floating_point() for t in x.captured))
        launch.backward(problem, x, out, lse, out, lse, needs, run=record)
    for kernel, of, values in recorded:
        found = config or choose(launch.config_name(kernel, values), of, arch)
        yield _case(kernel, of, values, arch, f"{width} {label}", found, width != "ieee")


def of_tangents(arch: str, width: str, head_dim: int, features: str, config: Config | None = None) -> Iterator[Case]:
    """The kernels of forward mode and second derivatives, where they are shipped."""
    variant = OF_DIRECTIONS[features]
    problem, x = example(width, head_dim, features, variant)
    if width == "tf32" or (config is None and missing_tangents(problem, arch) is not None):
        return
    problem, x = problem.curved(x)
    recorded: list[tuple[Any, Problem, Mapping[str, Any]]] = []

    def record(kernel, problem, programs, values):
        recorded.append((kernel, problem, values))

    u, out, lse = backends.Tangents(*x[:5]), problem.new_q(problem.head_dim_v), problem.new_lse()
    tangents.tangent(problem, x, u, out, lse, run=record)
    needs = backends.Needs(x.bias is not None, x.sinks is not None)
    tangents.backward_tangent(problem, x, u, out, lse, out, lse, out, lse, needs, run=record)
    for kernel, of, values in recorded:
        if kernel is not preprocess.preprocess:
            found = config or choose(launch.config_name(kernel, values), of, arch)
            yield _case(kernel, of, values, arch, f"{width} {features} {variant}".strip(), found, width != "ieee", "tangent")


@functools.cache
def example(width: str, head_dim: int, features: str, variant: str = "") -> tuple[Problem, Operands]:
    """A problem that is "plain": causal; "listed": sparse in blocks; "rich": two intervals, score functions, bias, sinks and
    dropout, or as "tables" relative positions and a table read by any index."""
    dtype, precision = WIDTHS[width]
    n = 2 * DECODE_ROWS
    q = torch.zeros(2, n, 2, min(head_dim, MAX_HEAD_DIM), dtype=dtype)
    table, ids = torch.zeros(2, 2 * n), torch.zeros(n, dtype=torch.int32)
    programs: dict[str, dict[str, Any]] = {
        "plain": dict(causal=True),
        "listed": dict(mask=block_mask(torch.ones(2, 2, 2, dtype=torch.bool), block_size=DECODE_ROWS)),
        "rich": dict(mask=masks.causal() | masks.prefix(torch.zeros(2, dtype=torch.int32)), sinks=torch.zeros(2),
                     score_mod=[score_mods.alibi(torch.zeros(2)), score_mods.softcap(30.0)],
                     bias=torch.zeros(2, n, n, dtype=dtype), dropout_p=0.1, rng=Rng(0)),
        "rich tables": dict(causal=True, score_mod=lambda s, b, h, i, j: s + table[h, i - j + n] + table[h, ids[i] + ids[j]]),
    }
    options = programs.get(f"{features} {variant}", programs[features])
    if variant.startswith("statistics"):
        variant = variant.removeprefix("statistics").strip()
        options = {**options, "return_stats": ("key_mass",) if variant in CACHED else Statistics._fields}
    kind, _, pages = variant.partition(" ")
    if kind in ("packed", "decode", "prefill", "invariant") and variant != "invariant":
        problem, x = unequal(kind, bool(pages), head_dim, dtype, options)
    else:
        problem, x = make(q, q, q, batch_invariant=kind == "invariant", **options)
    settings = problem.settings._replace(precision=precision)
    return Problem(**{**problem.__dict__, "settings": settings}), x


def unequal(kind: str, pages: bool, head_dim: int, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[Problem, Operands]:
    """Two packed sequences, or queries of 2 heads and a cache with 1, in pages and fp8 if `pages`."""
    n = 2 * DECODE_ROWS
    rows = torch.zeros(2, 3, dtype=torch.int32)
    if kind == "packed":
        q = torch.zeros(1, 2, n, head_dim, dtype=dtype)
        return make_unequal(Layout(rows, rows, max_seqlen_q=n, max_seqlen_k=n), q, q, q, **options)
    stored = torch.float8_e4m3fn if pages and dtype == torch.bfloat16 and head_dim <= 256 else dtype
    cache = (PagedKVCache(4, 16, 1, head_dim, max_sequences=2, dtype=stored, head_dim_v=min(head_dim, MAX_HEAD_DIM),
                          v_in_k=head_dim > MAX_HEAD_DIM) if pages else
             KVCache(2, 64, 1, head_dim, dtype=stored, head_dim_v=min(head_dim, MAX_HEAD_DIM), v_in_k=head_dim > MAX_HEAD_DIM))
    found = cache.stored([cache.new(), cache.new()]) if isinstance(cache, PagedKVCache) else cache.stored()
    where = Layout(None, found.rows, found.pages, found.k_scale, found.v_scale, 0, n, cached=True, shared=cache.v_in_k)
    q = torch.zeros(2, 2, n if kind == "prefill" else 1, head_dim, dtype=dtype)
    if options.get("bias") is not None:
        options = {**options, "bias": torch.zeros(2, q.shape[2], n, dtype=dtype)}
    return make_unequal(where, q, found.k, found.v, num_splits=2 if kind == "decode" else None,
                        batch_invariant=kind == "invariant", **options)


def of_append(arch: str, head_dim: int) -> Iterator[Case]:
    """New tokens with rotary into pages in fp8, and without into fp32."""
    latent = head_dim > MAX_HEAD_DIM
    for width, (dtype, _) in list(WIDTHS.items())[:2]:
        stored = torch.float8_e4m3fn if dtype == torch.bfloat16 else dtype
        cache = PagedKVCache(4, 16, 1, head_dim, max_sequences=1, dtype=stored, head_dim_v=min(head_dim, MAX_HEAD_DIM),
                             v_in_k=latent)
        found, rows = cache.stored([cache.new()]), torch.zeros(1, 3, dtype=torch.int32)
        k, q = torch.zeros(1, 1, 16, head_dim, dtype=dtype), torch.zeros(1, 2, 16, head_dim, dtype=dtype)
        rotary = None if latent or dtype == torch.float32 else Rotary.of(head_dim // 2, 16, interleaved=True)
        v = None if latent else k
        turned = q if rotary else None
        given = append.tensors(found, rows, k, v, turned, turned, rows, rotary)
        flat = flatten(append_kernel.append, append.NOTHING, given | append.numbers(given, rotary) | dict(blocks=1))
        yield _compiled(f"append d{head_dim} {width}", "forward", append_kernel.append, append.NOTHING, None, flat, arch,
                        Config(append.BLOCK, 0, append.WARPS, 1), False)


def _case(kernel: Any, problem: Problem, values: Mapping[str, Any], arch: str, row: str, config: Config,
          tensor_cores: bool, direction: str | None = None) -> Case:
    flat = flatten(kernel, problem.program, {**values, **launch.settled(problem, values, config)})
    name, pattern = kernel.fn.__name__, values.get("PATTERN", "direct")
    label = launch.config_name(kernel, values) + ("" if pattern == "direct" else f" {pattern}")
    direction = direction or ("forward" if name in ("forward", "merge", "key_mass") else "backward")
    return _compiled(f"{label} d{problem.head_dim} {row}", direction, kernel, problem.program, values.get("LOOKUP"), flat, arch,
                     config, tensor_cores and name not in ("preprocess", "merge"))


def _compiled(name: str, direction: str, kernel: Any, program: str, lookup: int | None, flat: dict[str, Any], arch: str,
              config: Config, tensor_cores: bool) -> Case:
    # strides of real tensors: as aligned as the inputs' rows
    flat["ALIGN"] = 16
    point = entry(kernel, program, lookup)
    signature, constants = typed(point, flat)
    return Case(name, direction, arch, point, signature, constants, config.num_warps, config.num_stages, tensor_cores,
                key(sources(OF_TANGENTS if direction == "tangent" else SOURCES), source_of(kernel, program, lookup),
                    sorted(signature.items()), sorted(constants.items(), key=str), config, arch))


@functools.cache
def sources(modules: tuple[ModuleType, ...]) -> str:
    return sources_hash(modules)
