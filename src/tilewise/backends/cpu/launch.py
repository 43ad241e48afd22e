"""From a problem to kernel calls: what is allocated, and what a kernel is told (`abi.Problem`)."""
from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilewise.backends.cpu import abi, compiler, sizes, threads
from tilewise.backends.cpu.abi import KINDS, POINTERS, Compiled
from tilewise.problem import Operands, Problem
from tilewise.sequences import all_rows
from tilewise.statistics import Statistics
from tilewise.trace.tile_lists import Question, TileList, tile_list

NOTHING: Mapping[str, Tensor | None] = {}


def forward(problem: Problem, x: Operands, of_rows: Mapping[str, Tensor | None] = NOTHING) -> tuple[Tensor, Tensor]:
    """of_rows: where max_score and entropy go."""
    out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
    if problem.queries and problem.batch and problem.seqlen_q:
        numbers, results = sizes.forward(problem), dict(out=out, lse=lse, **of_rows)
        if numbers["few_rows"]:
            call("decode", problem, x, results, dict(out_strides=out), numbers, compiled=Compiled(KINDS[x.k.dtype], paired(x)))
        if numbers["units_together"]:
            call("forward", problem, x, results, dict(out_strides=out), numbers, compiled=Compiled(paired=paired(x)))
    return out, lse


def forward_with_statistics(problem: Problem, x: Operands) -> tuple[Tensor, Tensor, Statistics]:
    found = problem.new_statistics()
    out, lse = forward(problem, x, dict(max_score=found.max_score, entropy=found.entropy))
    if found.key_mass is not None and found.key_mass.numel() and problem.queries:
        call("key_mass", problem, x, dict(lse=lse, key_mass=found.key_mass), {},
             sizes.key_mass(problem) | dict(key_mass_rows=found.key_mass.shape[2]), compiled=Compiled(paired=paired(x)))
    return out, lse, found


def call(kernel: str, problem: Problem, x: Operands, tensors: dict[str, Tensor | None], strides: dict[str, Tensor | None],
         numbers: dict[str, int], arrays: dict[str, Any] | None = None, compiled: Compiled = compiler.PLAIN) -> None:
    """Calls a kernel. The dicts: fields of `abi.Problem` beside those of the problem and its operands."""
    library = compiler.library(kernel, problem.program, tuple(t.dtype for t in x.captured), compiled)
    told, alive = described(problem, x, numbers)
    for name, t in tensors.items():
        setattr(told, name, None if t is None else t.data_ptr())
    for name, t in strides.items():
        setattr(told, name, in_elements(t))
    for name, array in (arrays or {}).items():
        setattr(told, name, ctypes.cast(array, ctypes.c_void_p))
    memory = getattr(library, f"{kernel}_memory")
    scratch = torch.empty(memory(ctypes.byref(told)) + ALIGNMENT, dtype=torch.uint8)
    told.scratch = -(-scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
    getattr(library, kernel)(ctypes.byref(told))
    del alive


def paired(x: Operands) -> bool:
    """Whether products may be of pairs: all that is multiplied is bf16."""
    return x.q.dtype == x.k.dtype == torch.bfloat16


ALIGNMENT = 64


OPERANDS = tuple(name for name in POINTERS if name in Operands._fields and name not in ("captured", "ints", "floats"))


def described(problem: Problem, x: Operands, numbers: dict[str, int]) -> tuple[abi.Problem, list[Any]]:
    """What every kernel is told, and what must stay alive as long."""
    told = abi.Problem(
        batch=problem.batch, heads=problem.heads, kv_heads=problem.kv_heads, nq=problem.seqlen_q, nk=problem.seqlen_k,
        dim=problem.head_dim, dim_v=problem.head_dim_v, lse_rows=problem.rows_q[1], dropout=problem.dropout,
        cached=problem.cached, q_kind=KINDS[x.q.dtype], k_kind=KINDS[x.k.dtype], threads=threads.count(),
        parallel=threads.entry(), scale=problem.scale, q_strides=in_elements(x.q), k_strides=in_elements(x.k),
        v_strides=in_elements(x.v), **numbers)
    for name in OPERANDS:
        t = getattr(x, name)
        if t is not None:
            setattr(told, name, t.data_ptr())
    alive: list[Any] = [x]
    if x.bias is not None:
        told.bias_strides, told.bias_kind = in_elements(x.bias), KINDS[x.bias.dtype]
    if x.sinks is not None:
        told.sinks_kind = KINDS[x.sinks.dtype]
    if x.pages is not None:
        pages = x.pages.contiguous()
        told.pages, told.pages_row, told.page_size = pages.data_ptr(), pages.shape[1], problem.page_size
        alive.append(pages)
    if x.k_rows is not None:
        order = torch.argsort(x.k_rows[:, 2], descending=True, stable=True)
        told.order = order.data_ptr()
        alive.append(order)
    if x.captured or x.ints or x.floats:
        slots = ((ctypes.c_void_p * len(x.captured))(*[t.data_ptr() for t in x.captured]),
                 (ctypes.c_long * len(x.ints))(*x.ints), (ctypes.c_double * len(x.floats))(*x.floats))
        told.captured, told.ints, told.floats = (ctypes.cast(array, ctypes.c_void_p) for array in slots)
        alive.append(slots)
    if problem.graphs.listed:
        lists = visited(problem, x, numbers["block_rows"])
        told.list, told.list_batch, told.list_heads = lists.tiles.data_ptr(), lists.per_batch, lists.per_head
        told.list_rows = -(-problem.seqlen_q // numbers["block_rows"])
        alive.append(lists)
    return told, alive


def visited(problem: Problem, x: Operands, block_rows: int) -> TileList:
    """The panels that blocks visit under a mask without intervals."""
    rows = all_rows(problem, x) if problem.unequal else None
    assert problem.graphs.mask is not None
    return tile_list(Question(
        problem.program, problem.graphs.mask, tuple(x.ints), tuple(x.floats), problem.batch, problem.heads,
        (problem.seqlen_q, problem.seqlen_k), (block_rows, sizes.PANEL), False, False, problem.device), x.captured, rows)


def with_rows(x: Tensor) -> Tensor:
    """x, or where the numbers of its rows do not lie one after another, such as in an expanded gradient of a sum, a copy."""
    return x if x.stride(3) == 1 or x.shape[3] <= 1 else x.contiguous()


def in_elements(x: Tensor | None) -> Any:
    """Strides, 0 for dimensions of size 1, which a bias shares."""
    if x is None:
        return (ctypes.c_long * 4)()
    return (ctypes.c_long * 4)(*[0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)])
