"""Runs a Gluon kernel on the CPU."""
from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

import support.hopper.hopper_language  # noqa: F401 (registers the names of its modules)
from support.hopper.clocks import Fault
from support.hopper.global_memory import Descriptor, GlobalArray, Pointer
from support.hopper.machine import MARK, Actor, Machine, Program
from support.hopper.tensor import to_tensor
from support.hopper.translate import PLAIN, Translator


@dataclass(frozen=True)
class Report:
    """steps: of the schedule; shared: bytes of shared memory allocated by a program, all in all; visited: (file, line) of the
    lines that have used memory or barriers."""
    steps: int
    shared: int
    visited: frozenset[tuple[str, int]]


def launch(kernel: Any, grid: Sequence[int], *args: Any, num_warps: int = 4, seed: int = 0, resident: int | None = None,
           ordered: Collection[str] = (), **kwargs: Any) -> Report:
    """Runs a jit function, or a mutant of one, over `grid` under the schedule of `seed`; raises `Fault`.

    Arguments are those of a launch on the device: CPU tensors, tensor descriptors of them, numbers, tuples, constexpr values.
    resident: how many programs run at a time, in the order of the grid. None: up to 16 if the kernel synchronises programs by
    atomic operations, else one, in random order.
    ordered: arguments to which atomic and TMA additions must come in a fixed order; a race if something allows another.
    """
    jit = kernel if isinstance(kernel, JITFunction) else kernel.kernel
    translator: Translator = getattr(kernel, "translator", PLAIN)
    function = translator.translate(jit)
    bound = jit.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    machine = Machine(seed, ordered, jit.is_gluon())
    values = {name: _argument(value, name, jit.params[i], translator, machine)
              for i, (name, value) in enumerate(bound.arguments.items())}
    shape = (*grid, 1, 1)[:3]
    programs = list(itertools.product(*map(range, shape[::-1])))
    if resident is None:
        resident = 16 if PLAIN.synchronises(jit) else 1
        if resident == 1:
            random.Random(seed).shuffle(programs)
    machine.resident = resident
    machine.pending = [partial(_start, machine, coordinates[::-1], shape, partial(function, **values), 32 * num_warps)
                       for coordinates in programs]
    try:
        machine.run()
    except Fault as fault:
        raise Fault(fault.kind, f"{fault.message} [seed {seed}]") from fault
    except Exception as error:
        raise Fault("crash", f"{type(error).__name__}: {error}{_place(error)}") from error
    return Report(machine.steps, machine.shared, frozenset(machine.visited))


def _start(machine: Machine, coordinates: Any, grid: Any, body: Any, threads: int) -> None:
    program = Program(machine, coordinates, grid)
    machine.programs.append(program)
    Actor(program, body.func.__name__, 0, body, threads, {})


def _argument(value: Any, name: str, parameter: Any, translator: Translator, machine: Machine) -> Any:
    """An argument as the kernel sees it. As in a launch, an integer 1 without a fixed type is a constant."""
    if parameter is not None and parameter.is_constexpr:
        return translator.translate(value)
    if isinstance(value, torch.Tensor):
        return Pointer(GlobalArray(value, name, machine), 0)
    if hasattr(value, "block_shape"):
        return Descriptor(GlobalArray(value.base, name, machine), value.shape, value.strides, value.block_shape,
                          getattr(value, "layout", None), getattr(value, "padding", "zero"))
    if isinstance(value, tuple):
        items = [_argument(x, f"{name}[{i}]", None, translator, machine) for i, x in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    fixed = parameter.annotation_type if parameter is not None else ""
    if isinstance(value, (bool, int, float)) and (fixed or type(value) is not int or value != 1 or _unspecialised(parameter)):
        scalar = to_tensor(value)
        if scalar.dtype == tl.uint32:
            scalar = scalar.to(tl.int64)
        return scalar.to(tl.str_to_ty(fixed, None)) if fixed else scalar
    return translator.translate(value)


def _unspecialised(parameter: Any) -> bool:
    return parameter is not None and parameter.do_not_specialize


def _place(error: BaseException) -> str:
    """Where in the kernel an exception comes from."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if MARK in trace.tb_frame.f_globals:
            found = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
