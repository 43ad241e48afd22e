"""Kernel entry points: generated for one program, they unpack flat arguments and call the written kernels.

The kernels take strides and program slots as tuples. Triton compiles again
whenever an integer in a tuple argument becomes 1 or a multiple of 16; flat arguments can be told not to. So an entry point
has flat arguments of fixed types and hands tuples on. Strides come divided by their greatest common power of two, ALIGN,
and are multiplied by it inside, which tells the compiler what it needs for 16-byte loads. Nothing recompiles because a
length, a batch size or a captured number changed.
"""
from __future__ import annotations

import functools
import linecache
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tilewise.trace.emit_triton import function
from tilewise.trace.graph import GROUPS, leaves, parse

HEADER = """import triton
import triton.language as tl
{gluon}from tilewise.backends.gpu_math.elementary import (
    floor_divide, floor_divide_floats, floor_remainder, floor_remainder_floats, power, tanh)
from {module} import {kernel}


"""
GRAPHS = {name.upper(): name for name in (*GROUPS, "factor", "place")}
SCALARS = {"scale": "fp32", "heads": "i32", "group": "i32", "nq": "i32", "nk": "i32", "dropout": "i32",
           "sum_batch": "i32", "sum_heads": "i32", "lse_rows": "i32", "page_size": "i32", "pages_row": "i64", "splits": "i32",
           "out_split": "i64", "lse_split": "i64", "kv_heads": "i32", "room": "i32", "slots": "i32", "blocks": "i32",
           "positions": "i32", "together": "i32", "items": "i32", "mass_rows": "i32"}
MAX_ALIGN = 16


class Parameter(NamedTuple):
    """A parameter of a kernel, and the flat arguments of the entry point that make it up."""
    name: str
    kind: str                           # "graph", "constant", "tuple", "strides" or "plain"
    flat: tuple[tuple[str, str | None], ...] = ()   # (name, fixed type or None)


@functools.lru_cache(maxsize=512)
def entry(kernel: Any, program: str, lookup: int | None = None) -> Any:
    """The entry point of a kernel (a @triton.jit function of this package) for a program's text.

    lookup: the number of the lookup whose gradient is wanted, in `Graphs.learned`.
    """
    source = source_of(kernel, program, lookup)
    name = f"{kernel.fn.__name__}_entry"
    path = f"<tilewise {name} {lookup} {program}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)  # Triton reads the source again
    namespace: dict[str, Any] = {"__name__": f"tilewise.generated.{name}"}
    exec(compile(source, path, "exec", dont_inherit=True), namespace)
    return namespace[name]


def flatten(kernel: Any, program: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entry point's arguments from the kernel's."""
    align = MAX_ALIGN
    flat: dict[str, Any] = {}
    for parameter in parameters(kernel, program):
        if parameter.kind == "strides":
            align = math.gcd(align, *values[parameter.name])
        elif parameter.kind == "tuple":
            flat.update(zip((name for name, _ in parameter.flat), values[parameter.name], strict=True))
        elif parameter.kind != "graph":
            flat[parameter.name] = values[parameter.name]
    for parameter in parameters(kernel, program):
        if parameter.kind == "strides":
            flat.update((name, s // align) for (name, _), s in zip(parameter.flat, values[parameter.name], strict=True))
    flat["ALIGN"] = align
    return flat


def slots_of(kernel: Any, program: str, name: str) -> tuple[str, ...]:
    """The flat arguments that a parameter of a kernel is made of; none where it has no such parameter."""
    return tuple(flat for parameter in parameters(kernel, program) if parameter.name == name for flat, _ in parameter.flat)


@functools.lru_cache(maxsize=512)
def parameters(kernel: Any, program: str) -> tuple[Parameter, ...]:
    code, annotations = kernel.fn.__code__, kernel.fn.__annotations__
    return tuple(_parameter(name, "constexpr" in str(annotations.get(name, "")), program)
                 for name in code.co_varnames[:code.co_argcount])


def _parameter(name: str, constant: bool, program: str) -> Parameter:
    if name in GRAPHS:
        return Parameter(name, "graph")
    if constant:
        return Parameter(name, "constant", ((name, "tl.constexpr"),))
    if name == "bias_strides":
        return Parameter(name, "tuple", tuple((f"{name}_{axis}", "i64") for axis in range(4)))
    if name.endswith("_strides"):
        kind = "tuple" if "bias" in name else "strides"
        return Parameter(name, kind, tuple((f"{name}_{axis}", "i64") for axis in range(3)))
    if name in ("captured", "ints", "floats"):
        return Parameter(name, "tuple", slots(program)[name])
    return Parameter(name, "plain", ((name, SCALARS.get(name)),))


@functools.lru_cache(maxsize=512)
def slots(program: str) -> dict[str, tuple[tuple[str, str | None], ...]]:
    """The flat arguments for a program's captured tensors, integers and floats, with their types."""
    types = {"t": None, "i": "i32", "n": "i64", "f": "fp32"}
    found: dict[str, dict[int, tuple[str, str | None]]] = {"t": {}, "i": {}, "f": {}}
    for group in parse(program):
        for leaf in frozenset[str]().union(*map(leaves, group)):
            digits = leaf[2:] if leaf[0] == "t" else leaf[1:]
            if digits.isdigit():
                kind = "i" if leaf[0] == "n" else leaf[0]
                found[kind][int(digits)] = (kind + digits, types[leaf[0]])
    in_order = {kind: tuple(of_kind[i] for i in range(len(of_kind))) for kind, of_kind in found.items()}
    return {"captured": in_order["t"], "ints": in_order["i"], "floats": in_order["f"]}


def source_of(kernel: Any, program: str, lookup: int | None = None) -> str:
    """The source of an entry point: the program's graphs as device functions, then the entry itself."""
    name = kernel.fn.__name__
    *of_scores, = parse(program)
    place, factor = ((), ()) if lookup is None else ((graph,) for graph in of_scores[len(GROUPS) + lookup])
    graphs = dict(zip(GRAPHS.values(), (*of_scores[:len(GROUPS)], factor, place), strict=True))
    arguments, fixed, passed, scaled, functions = [], [], [], [], []
    for parameter in parameters(kernel, program):
        arguments += [flat if kind is None else f"{flat}: {kind if kind == 'tl.constexpr' else repr(kind)}"
                      for flat, kind in parameter.flat]
        fixed += [flat for flat, kind in parameter.flat if kind not in (None, "tl.constexpr")]
        if parameter.kind == "graph":
            graph = GRAPHS[parameter.name]
            passed.append(f"{parameter.name}={graph if graphs[graph] else None}")
            functions += [function(graph, graphs[graph])] if graphs[graph] else []
        elif parameter.kind in ("tuple", "strides"):
            passed.append(f"{parameter.name}=({''.join(flat + ', ' for flat, _ in parameter.flat)})")
            scaled += [flat for flat, _ in parameter.flat] if parameter.kind == "strides" else []
        else:
            passed.append(f"{parameter.name}={parameter.name}")
    is_gluon = getattr(kernel, "is_gluon", bool)()      # what Triton's interpreter runs lacks it
    lines = [f"@{'gluon' if is_gluon else 'triton'}.jit(do_not_specialize={fixed})",
             f"def {name}_entry({', '.join([*arguments, 'ALIGN: tl.constexpr'])}):",
             *[f"    {flat} = {flat} * ALIGN" for flat in scaled], f"    {name}({', '.join(passed)})"]
    gluon = "from triton.experimental import gluon\n" if is_gluon else ""
    header = HEADER.format(gluon=gluon, module=kernel.fn.__module__, kernel=name)
    return header + "".join(f"{text}\n\n" for text in functions) + "\n".join(lines) + "\n"
