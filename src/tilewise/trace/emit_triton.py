"""Kernel source for a program's graphs: Triton device functions, called from the kernels' one loop body.

    score(s, b, h, q, k, nq, nk, captured, ints, floats) -> s
    score_gradient(...)                                  -> d score / d s
    mask(b, h, q, k, nq, nk, captured, ints, floats)     -> visible
    keys(b, h, q, nq, nk, captured, ints, floats)        -> lo, hi, inner_lo, inner_hi of each band, one after another
    queries(b, h, k, nq, nk, captured, ints, floats)     -> likewise

q and k are int32 blocks of indices inside the sequence, b and h scalars; captured, ints and floats are tuples.
"""
from __future__ import annotations

from tilewise.trace.graph import Node

BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
          "and": "&", "or": "|"}
CALLS = {"abs": "tl.abs", "min": "tl.minimum", "max": "tl.maximum", "where": "tl.where", "tanh": "tanh",
         "floordiv": "floor_divide", "mod": "floor_remainder"}
KINDS = {"i": "tl.int32", "f": "tl.float32", "b": "tl.int1"}

INDICES = {"score": "s, b, h, q, k", "score_gradient": "s, b, h, q, k", "mask": "b, h, q, k", "keys": "b, h, q",
           "queries": "b, h, k"}


def function(name: str, results: tuple[Node, ...]) -> str:
    """Source of the device function `name` returning the values of the graphs `results`."""
    lines: list[str] = []
    names: dict[Node, str] = {}
    values = [_emit(node, lines, names) for node in results]
    arguments = f"{INDICES[name]}, nq, nk, captured, ints, floats"
    body = "".join(f"    {line}\n" for line in lines)
    return f"@triton.jit\ndef {name}({arguments}):\n{body}    return {', '.join(values)}\n"


def _emit(node: Node, lines: list[str], names: dict[Node, str]) -> str:
    """Appends what computes `node` and returns the name of its value. Equal subgraphs are computed once."""
    if isinstance(node, str):
        return _leaf(node)
    if node not in names:
        if node[0] == "load":
            value = _load(node, lines, names)
        else:
            arguments = [_emit(a, lines, names) for a in node[1:]]
            value = _operation(node[0], arguments)
        names[node] = f"v{len(names)}"
        lines.append(f"{names[node]} = {value}")
    return names[node]


def _leaf(name: str) -> str:
    if name[0] in "in" and name[1:].isdigit():
        return f"ints[{name[1:]}]"
    if name[0] == "f" and name[1:].isdigit():
        return f"floats[{name[1:]}]"
    return name


def _operation(op: str, arguments: list[str]) -> str:
    if op in BINARY:
        return f"{arguments[0]} {BINARY[op]} {arguments[1]}"
    if op == "neg":
        return f"-{arguments[0]}"
    if op == "not":
        return f"{arguments[0]} == 0"
    return f"{CALLS[op]}({', '.join(arguments)})"


def _load(node: Node, lines: list[str], names: dict[Node, str]) -> str:
    kind, slot = node[1][1], node[1][2:]
    pointer = f"captured[{slot}]"
    for index, stride in zip(node[2::2], node[3::2], strict=True):
        pointer += f" + {_emit(index, lines, names)}.to(tl.int64) * {_leaf(stride)}"
    return f"tl.load({pointer}).to({KINDS[kind]})"
