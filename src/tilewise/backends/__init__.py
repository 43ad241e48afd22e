"""The backends: each computes the same attention.

A backend is a module with

    supports(problem) -> None | str              None, or why it cannot compute this problem
    volunteers(problem) -> None | str            the same for backend="auto"
    tile_sizes(problem) -> (queries, keys)       per tile, forward
    splits(problem) -> int                       shares of the keys, merged afterwards
    workspace(problem) -> (bytes, bytes)         beside inputs, outputs and gradients, forward and backward
    repeatable(problem) -> bool                  whether gradients have the same bits each time
    precision(problem) -> str                    how fp32 inputs are multiplied
    forward(problem, operands) -> (out, lse)     both [B, H, S_q, ...], sinks included
    forward_with_statistics(problem, operands) -> (out, lse, Statistics)     what problem.statistics names beside them
    backward(problem, operands, out, lse, dout, dlse, needs) -> Gradients
    write(...)                                   new keys and values into a cache (`kv_cache.write`)

if what it tells its kernels can be settled once for operands and results that lie in memory alike (`tilewise/calls.py`),

    prepared(problem, operands, out) -> run                  run(operands, out=.., lse=..); without lse it is not kept
    prepared_backward(problem, operands, out, dout) -> run   run(operands, out=.., lse=.., dout=.., dlse=.., delta=.., dq=..);
                                                             None where gradients of bias or captured tensors are sums

`run` writes results and looks only at where tensors begin, whatever views of that memory they are, and at the shape of a table
of pages, which grows. `delta` [.., heads, ..] like lse is rowsum(dout * out) - dlse, from which dsinks follows
(`state.sink_gradient`).

A backend that has `prepared` may have, for decoding steps that are alike (`tilewise/steps.py`),

    prepared_append(cache, index, k_new, v_new, q, turned, rotary) -> Append | None

with look(cache, index, of_book, extended, k_new, v_new, rotary) -> rows, order, longest and shortest of the sequences, or None
where a value is not right; pages(looked); and write(cache, looked, pages, q, turned), which does what `kv_cache.write` and the
cache's `append` do, or leave(looked). `run` is then given that order too. None: such steps go the general way.

and, if it has forward mode and second derivatives in kernels of its own (formulas: `docs/derivatives.md`),

    supports_tangents(problem) -> None | str     None, or why it has not for this problem
    tangent(problem, operands, tangents, out, lse) -> (out', lse')
    backward_tangent(problem, operands, tangents, out, lse, out', lse', dout, dlse, needs) -> Gradients

`tangent` is the derivative of (out, lse) in the direction `tangents`: out' like out, lse' like lse, 0 in rows of no sequence.
`backward_tangent` is the derivative of `backward` in that direction, dout and dlse being held fixed: of the same shapes and
dtypes, bias and sinks where needed, captured tensors never; out' and lse' are what `tangent` gave. Its problem's program has
the score function's second derivative (`Problem.curved`). dout, dlse and tangents may have any strides. Derivatives beyond
that are put together from these (`tilewise/derivatives.py`).

A backend imports neither another backend nor anything above it.
"""
from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

MODULES = {"hopper": "tilewise.backends.hopper", "triton": "tilewise.backends.triton", "cpu": "tilewise.backends.cpu",
           "tiled": "tilewise.backends.tiled", "reference": "tilewise.reference"}
AUTO = ("hopper", "triton", "cpu", "tiled")       # the order in which backend="auto" asks
PROCESS = os.getpid()                   # that imported this first; another one is a fork of it


class Needs(NamedTuple):
    """Which gradients are wanted beside those of q, k and v, which are always computed."""
    bias: bool
    sinks: bool
    captured: tuple[bool, ...] = ()     # of each captured tensor; missing ones are not


class Tangents(NamedTuple):
    """A direction of the operands: tensors in their shapes and dtypes, any strides; None: 0."""
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None = None
    sinks: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients in the shape and dtype of what they belong to; None where not needed."""
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None
    captured: Sequence[Tensor | None] = ()


def load(name: str) -> ModuleType:
    """The module of a backend, imported when first asked for."""
    if not isinstance(name, str) or name not in MODULES:
        raise ValueError(f"backend: expected \"auto\" or one of {', '.join(MODULES)}, got {name!r}")
    return importlib.import_module(MODULES[name])


def over_leading(function: Callable, info, in_dims: Sequence[int | None], *inputs) -> tuple[tuple, tuple]:
    """A vmap rule: one call per entry of the mapped dimension, results stacked. None stays None."""
    results = [function(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
               for i in range(info.batch_size)]
    stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, tuple(None if x is None else 0 for x in stacked)


def flat_dims(in_dims: Sequence) -> list[int | None]:
    """vmap's in_dims, one per argument; Python objects among the arguments have none."""
    return [dim if isinstance(dim, int) else None for dim in in_dims]
