"""From a problem to kernel calls: what is allocated, and what a kernel is told (`abi.Problem`)."""
from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
    prepared(problem, x, out)(x, out=out, lse=lse, **of_rows)
    return out, lse


def prepared(problem: Problem, x: Operands, out: Tensor) -> Callable[..., None]:
    """The forward of operands and results that lie in memory like these: of operands, and of results by name."""
    launches = []
    if problem.queries and problem.batch and problem.seqlen_q:
        numbers = sizes.forward(problem)
        for kernel, wanted, compiled in (("decode", numbers["few_rows"], Compiled(KINDS[x.k.dtype], paired(x))),
                                         ("forward", numbers["units_together"], Compiled(paired=paired(x)))):
            if wanted:
                launches.append(Launch(kernel, problem, x, dict(out_strides=out), numbers, compiled=compiled))
    if len(launches) == 1:
        return launches[0]

    def all_of_them(x: Operands, **results: Tensor | None) -> None:
        for launch in launches:
            launch(x, **results)

    return all_of_them


def forward_with_statistics(problem: Problem, x: Operands) -> tuple[Tensor, Tensor, Statistics]:
    found = problem.new_statistics()
    out, lse = forward(problem, x, dict(max_score=found.max_score, entropy=found.entropy))
    if found.key_mass is not None and found.key_mass.numel() and problem.queries:
        call("key_mass", problem, x, dict(lse=lse, key_mass=found.key_mass), {},
             sizes.key_mass(problem) | dict(key_mass_rows=found.key_mass.shape[2]), compiled=Compiled(paired=paired(x)))
    return out, lse, found


def call(kernel: str, problem: Problem, x: Operands, tensors: dict[str, Tensor | None], strides: dict[str, Tensor | None],
         numbers: dict[str, int], arrays: dict[str, Any] | None = None, compiled: Compiled = compiler.PLAIN) -> None:
    """Calls a kernel once. The dicts: fields of `abi.Problem` beside those of the problem and its operands."""
    Launch(kernel, problem, x, strides, numbers, arrays, compiled, tensors)(x, **tensors)


class Frame(NamedTuple):
    """What one call of a kernel needs for itself: what it is told, and memory to work in."""
    told: abi.Problem
    address: int                        # of `told`
    scratch: Tensor
    lse: int                            # where lse goes if no one asked for it


class Launch:
    """A kernel, and what it is told of operands and results that lie in memory like these; called with where they begin.

    Calls do not look at strides again, nor at the order of dimensions: operands may come in any view of the same memory.
    Frames are kept for the next call, unless they are large; calls at the same time take one each.
    """
    __slots__ = ("arrays", "block_rows", "captured", "frames", "kernel", "listed", "lists", "lse", "names", "order",
                 "problem", "scratch", "template")

    def __init__(self, kernel: str, problem: Problem, x: Operands, strides: dict[str, Tensor | None], numbers: dict[str, int],
                 arrays: dict[str, Any] | None = None, compiled: Compiled = compiler.PLAIN,
                 results: dict[str, Tensor | None] | None = None):
        """results: those that decide how much memory the kernel needs."""
        library = compiler.library(kernel, problem.program, tuple(t.dtype for t in x.captured), compiled)
        self.names = tuple((name, Operands._fields.index(name)) for name in OTHERS if getattr(x, name) is not None)
        told = described(problem, x, numbers)
        for name, t in strides.items():
            setattr(told, name, in_elements(t))
        for name, t in (results or {}).items():
            setattr(told, name, None if t is None else t.data_ptr())
        self.arrays = dict(arrays or {}, ints=(ctypes.c_long * len(x.ints))(*x.ints),
                           floats=(ctypes.c_double * len(x.floats))(*x.floats))
        for name, array in self.arrays.items():
            setattr(told, name, ctypes.addressof(array))
        self.captured = ctypes.c_void_p * len(x.captured) if x.captured else None
        self.order = order_of(x.k_rows) if x.k_rows is not None and not problem.cached else None
        self.problem, self.block_rows, self.listed = problem, numbers["block_rows"], problem.graphs.listed
        self.lists = visited(problem, x, self.block_rows) if self.listed and not problem.cached else None
        told.list_rows = -(-problem.seqlen_q // self.block_rows)
        self.kernel, self.template = getattr(library, kernel), bytes(told)
        self.kernel.argtypes = [ctypes.c_void_p]
        self.lse = problem.heads * problem.queries * 4
        memory = getattr(library, f"{kernel}_memory")
        memory.restype = ctypes.c_long
        self.scratch = memory(ctypes.byref(told)) + ALIGNMENT + self.lse
        self.frames: list[Frame] = []

    def __call__(self, x: Operands, order: Tensor | None = None, **results: Tensor | None) -> None:
        try:
            frame = self.frames.pop()
        except IndexError:
            frame = self.new_frame()
        told = frame.told
        told.q, told.k, told.v = x.q.data_ptr(), x.k.data_ptr(), x.v.data_ptr()
        for name, at in self.names:
            operand: Any = x[at]
            setattr(told, name, operand.data_ptr())
        told.lse = frame.lse
        for name, t in results.items():
            setattr(told, name, None if t is None else t.data_ptr())
        if self.captured is not None:
            captured = self.captured(*[t.data_ptr() for t in x.captured])
            told.captured = ctypes.addressof(captured)
        if x.k_rows is not None:
            if order is None:
                order = order_of(x.k_rows) if self.order is None else self.order
            told.order = order.data_ptr()
        if x.pages is not None:
            pages = x.pages.contiguous()
            told.pages, told.pages_row = pages.data_ptr(), pages.shape[1]      # a table grows with the cache
        if self.listed:                 # of a cache's lengths anew
            lists = visited(self.problem, x, self.block_rows) if self.lists is None else self.lists
            told.list, told.list_batch, told.list_heads = lists.tiles.data_ptr(), lists.per_batch, lists.per_head
        self.kernel(frame.address)
        if self.scratch <= KEPT_BYTES:
            self.frames.append(frame)

    def new_frame(self) -> Frame:
        told, scratch = abi.Problem.from_buffer_copy(self.template), torch.empty(self.scratch, dtype=torch.uint8, device="cpu")
        told.scratch = -(-scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
        return Frame(told, ctypes.addressof(told), scratch, scratch.data_ptr() + self.scratch - self.lse)


def order_of(k_rows: Tensor) -> Tensor:
    """Sequences, those with the most keys first."""
    if k_rows.shape[0] == 1:
        return FIRST
    return torch.argsort(k_rows[:, 2], descending=True, stable=True)


def paired(x: Operands) -> bool:
    """Whether products may be of pairs: all that is multiplied is bf16."""
    return x.q.dtype == x.k.dtype == torch.bfloat16


ALIGNMENT = 64
FIRST = torch.zeros(1, dtype=torch.int64, device="cpu")
KEPT_BYTES = 1 << 16                    # of a frame's memory, at most


OTHERS = tuple(name for name in POINTERS if name in Operands._fields   # than every call has, or are told in their own way
               and name not in ("q", "k", "v", "captured", "ints", "floats", "pages"))


def described(problem: Problem, x: Operands, numbers: dict[str, int]) -> abi.Problem:
    """What every kernel is told, except where tensors begin."""
    told = abi.Problem(
        batch=problem.batch, heads=problem.heads, kv_heads=problem.kv_heads, nq=problem.seqlen_q, nk=problem.seqlen_k,
        dim=problem.head_dim, dim_v=problem.head_dim_v, lse_rows=problem.rows_q[1], dropout=problem.dropout,
        cached=problem.cached, q_kind=KINDS[x.q.dtype], k_kind=KINDS[x.k.dtype], threads=threads.count(),
        parallel=threads.entry(), scale=problem.scale, q_strides=in_elements(x.q), k_strides=in_elements(x.k),
        v_strides=in_elements(x.v), **numbers)
    if x.bias is not None:
        told.bias_strides, told.bias_kind = in_elements(x.bias), KINDS[x.bias.dtype]
    if x.sinks is not None:
        told.sinks_kind = KINDS[x.sinks.dtype]
    if x.pages is not None:
        told.page_size = problem.page_size
    return told


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
