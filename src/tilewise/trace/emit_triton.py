"""Kernel source for a program's graphs: Triton device functions, called from the kernels' one loop body.

    score(s, b, h, q, k, nq, nk, captured, ints, floats) -> s
    score_gradient(...)                                  -> d score / d s
    score_curvature(...)                                 -> d² score / d s²
    mask(b, h, q, k, nq, nk, captured, ints, floats)     -> visible
    keys(b, h, q, nq, nk, captured, ints, floats)        -> lo, hi, inner_lo, inner_hi of each band, one after another
    queries(b, h, k, nq, nk, captured, ints, floats)     -> likewise
    factor(s, b, h, q, k, ...)                           -> d score / d entry of one lookup
    place(b, h, q, k, ...)                               -> where its entry lies in the table, in elements

q and k are int32 blocks of indices inside the sequence, b and h scalars; captured, ints and floats are tuples.
"""
from __future__ import annotations

from collections.abc import Callable

from tilewise.trace.graph import Graph, Node, kind

SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
           "ne": "!=", "and": "&", "or": "|", "xor": "^"}
CALLS = {"abs": "tl.abs", "min": "tl.minimum", "max": "tl.maximum", "where": "tl.where", "tanh": "tanh", "pow": "power",
         **{name: f"tl.{name}" for name in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "sigmoid",
                                            "floor", "ceil")}}
CASTS = {"to_bool": "({} != 0)", "to_int": "{}.to(tl.int32)", "to_float": "{}.to(tl.float32)",
         "to_fp16": "{}.to(tl.float16).to(tl.float32)", "to_bf16": "{}.to(tl.bfloat16).to(tl.float32)"}
TYPES = {"i": "tl.int32", "l": "tl.int64", "f": "tl.float32", "b": "tl.int1"}

INDICES = {"score": "s, b, h, q, k", "score_gradient": "s, b, h, q, k", "mask": "b, h, q, k", "keys": "b, h, q",
           "queries": "b, h, k", "score_curvature": "s, b, h, q, k", "factor": "s, b, h, q, k", "place": "b, h, q, k"}


def function(name: str, results: tuple[Graph, ...]) -> str:
    """Source of the device function `name` returning the values of the graphs `results`."""
    lines: list[str] = []
    names: dict[Graph, str] = {}
    lookup = results[0]
    if name == "place" and isinstance(lookup, Node):
        values = [_offset(lookup.args, lambda x: _emit(x, lines, names))]
    else:
        values = [_emit(graph, lines, names) for graph in results]
    arguments = f"{INDICES[name]}, nq, nk, captured, ints, floats"
    body = "".join(f"    {line}\n" for line in lines)
    return f"@triton.jit\ndef {name}({arguments}):\n{body}    return {', '.join(values)}\n"


def _emit(graph: Graph, lines: list[str], names: dict[Graph, str]) -> str:
    """Appends what computes `graph` and returns the name of its value. Each node is computed once."""
    if isinstance(graph, str):
        return _leaf(graph)
    if graph not in names:
        def operand(x: Graph) -> str:
            return _emit(x, lines, names)
        value = _load(graph.args, operand) if graph.op == "load" else _operation(graph.op, graph.args, operand)
        names[graph] = f"v{len(names)}"
        lines.append(f"{names[graph]} = {value}")
    return names[graph]


def _leaf(name: str) -> str:
    if name[0] in "in" and name[1:].isdigit():
        return f"ints[{name[1:]}]"
    if name[0] == "f" and name[1:].isdigit():
        return f"floats[{name[1:]}]"
    return name


def _operation(op: str, args: tuple[Graph, ...], operand: Callable[[Graph], str]) -> str:
    values = [operand(a) for a in args]
    if op in SYMBOLS:
        return f"{values[0]} {SYMBOLS[op]} {values[1]}"
    if op == "neg":
        return f"-{values[0]}"
    if op == "not":
        return f"{values[0]} == 0" if kind(args[0]) == "b" else f"~{values[0]}"
    if op in ("floordiv", "mod"):
        name = "floor_divide" if op == "floordiv" else "floor_remainder"
        return f"{name}{'_floats' if kind(args[0]) == 'f' else ''}({', '.join(values)})"
    if op in CASTS:
        # a scalar argument has no .to: adding zero makes it a value of the language
        return CASTS[op].format(f"({values[0]} + 0)" if isinstance(args[0], str) else values[0])
    return f"{CALLS[op]}({', '.join(values)})"


def _load(args: tuple[Graph, ...], operand: Callable[[Graph], str]) -> str:
    name = str(args[0])
    return f"tl.load(captured[{name[2:]}] + {_offset(args, operand)}).to({TYPES[name[1]]})"


def _offset(args: tuple[Graph, ...], operand: Callable[[Graph], str]) -> str:
    """Where an entry lies in its tensor, in elements."""
    terms = [f"{operand(index)}.to(tl.int64) * {operand(stride)}" for index, stride in zip(args[1::2], args[2::2], strict=True)]
    return " + ".join(terms) if terms else "0"
