"""From a problem to kernel calls: what is allocated, and what a kernel is told (`abi.Problem`)."""
from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tilewise.backends.cpu import abi, compiler, sizes, threads
from tilewise.backends.cpu.abi import KINDS, POINTERS
from tilewise.problem import Operands, Problem
from tilewise.trace.tile_lists import Question, tile_list


def forward(problem: Problem, x: Operands) -> tuple[Tensor, Tensor]:
    out, lse = problem.new_q(problem.head_dim_v), problem.new_lse()
    if problem.queries and problem.batch and problem.seqlen_q:
        call("forward", problem, x, dict(out=out, lse=lse), dict(out_strides=out), sizes.forward(problem))
    return out, lse


def call(kernel: str, problem: Problem, x: Operands, tensors: dict[str, Tensor | None], strides: dict[str, Tensor | None],
         numbers: dict[str, int], arrays: dict[str, Any] | None = None) -> None:
    """Calls a kernel. The dicts: fields of `abi.Problem` beside those of the problem and its operands."""
    library = compiler.library(kernel, problem.program, tuple(t.dtype for t in x.captured))
    told, alive = described(problem, x, numbers)
    for name, t in tensors.items():
        setattr(told, name, None if t is None else t.data_ptr())
    for name, t in strides.items():
        setattr(told, name, in_elements(t))
    for name, array in (arrays or {}).items():
        setattr(told, name, ctypes.cast(array, ctypes.c_void_p))
    memory = getattr(library, f"{kernel}_memory")
    memory.restype = ctypes.c_long
    scratch = torch.empty(memory(ctypes.byref(told)) + ALIGNMENT, dtype=torch.uint8)
    told.scratch = -(-scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
    getattr(library, kernel)(ctypes.byref(told))
    del alive


ALIGNMENT = 64


def described(problem: Problem, x: Operands, numbers: dict[str, int]) -> tuple[abi.Problem, list[Any]]:
    """What every kernel is told, and what must stay alive as long."""
    tensors = {name: getattr(x, name) for name in POINTERS if hasattr(x, name) and name not in ("captured", "ints", "floats")}
    tensors["list"], lists = visited(problem, x, numbers["block_rows"])
    tensors["order"] = None if x.k_rows is None else torch.argsort(x.k_rows[:, 2], descending=True, stable=True)
    if x.pages is not None:
        tensors["pages"] = x.pages.contiguous()
    slots = ((ctypes.c_void_p * len(x.captured))(*[t.data_ptr() for t in x.captured]),
             (ctypes.c_long * len(x.ints))(*x.ints), (ctypes.c_double * len(x.floats))(*x.floats))
    told = abi.Problem(
        batch=problem.batch, heads=problem.heads, kv_heads=problem.kv_heads, nq=problem.seqlen_q, nk=problem.seqlen_k,
        dim=problem.head_dim, dim_v=problem.head_dim_v, lse_rows=problem.rows_q[1], page_size=problem.page_size or 1,
        pages_row=0 if x.pages is None else tensors["pages"].shape[1], dropout=problem.dropout, cached=problem.cached,
        q_kind=KINDS[x.q.dtype], k_kind=KINDS[x.k.dtype], bias_kind=kind(x.bias), sinks_kind=kind(x.sinks),
        threads=threads.count(), parallel=threads.entry(), scale=problem.scale, q_strides=in_elements(x.q),
        k_strides=in_elements(x.k), v_strides=in_elements(x.v), **lists, **numbers)
    if x.bias is not None:
        told.bias_strides = in_elements(x.bias)
    for name, t in tensors.items():
        setattr(told, name, None if t is None else t.data_ptr())
    for name, array in zip(("captured", "ints", "floats"), slots, strict=True):
        setattr(told, name, ctypes.cast(array, ctypes.c_void_p))
    return told, [tensors, slots, x]


def visited(problem: Problem, x: Operands, block_rows: int) -> tuple[Tensor | None, dict[str, int]]:
    """Lists of panels, for masks without intervals."""
    graphs = problem.graphs
    if graphs.mask is None or not graphs.listed:
        return None, {}
    rows = None
    if problem.unequal:
        dense = torch.tensor([[b, 0, problem.seqlen_q] for b in range(problem.batch)], dtype=torch.int32)
        rows = (dense if x.q_rows is None else x.q_rows, dense if x.k_rows is None else x.k_rows)
    found = tile_list(Question(
        problem.program, graphs.mask, tuple(x.ints), tuple(x.floats), problem.batch, problem.heads,
        (problem.seqlen_q, problem.seqlen_k), (block_rows, sizes.PANEL), False, False, problem.device), x.captured, rows)
    return found.tiles, dict(list_rows=-(-problem.seqlen_q // block_rows), list_batch=found.per_batch, list_heads=found.per_head)


def kind(x: Tensor | None) -> int:
    return 0 if x is None else KINDS[x.dtype]


def in_elements(x: Tensor | None) -> Any:
    """Strides, 0 for dimensions of size 1, which a bias shares."""
    if x is None:
        return (ctypes.c_long * 4)()
    return (ctypes.c_long * 4)(*(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)))
