"""Kernel source for a program's graphs: C++ functions of one query and a vector of keys, called from the CPU's kernels.

    vec score(x, s, b, h, q, k, nq, nk)               vec score_gradient(...)      d score / d s
    vec score_curvature(...)                          d² score / d s²
    ivec mask(x, b, h, q, k, nq, nk)                  visible
    void keys(x, b, h, q, nq, nk, long* bands)        lo, hi, inner_lo, inner_hi of each band, one after another
    void queries(x, b, h, k, nq, nk, long* bands)     likewise
    vec factor(n, x, s, b, h, q, k, nq, nk)           d score / d entry of the n-th lookup
    lvec place(n, x, b, h, q, k, nq, nk)              where its entry lies in the table, in elements

x is the kernel's `Problem`, with the values of the program's slots. What does not depend on k or s is computed as a scalar.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tilewise.trace.graph import COMPARISONS, Graph, Node, kind, leaves, parse, slot_of, stored_kind
from tilewise.trace.learned import Learned

SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
           "ne": "!=", "and": "&", "or": "|", "xor": "^"}
CALLS = {"abs": "absolute", "min": "minimum", "max": "maximum", "pow": "power", "floordiv": "floor_divide",
         "mod": "floor_remainder", "to_int": "to_int", "to_float": "to_float", "to_fp16": "rounded_to_fp16",
         "to_bf16": "rounded_to_bf16",
         **{name: f"of_{name}" for name in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "tanh",
                                            "sigmoid", "floor", "ceil")}}
ELEMENTS = {torch.float32: "float", torch.float16: "Float16", torch.bfloat16: "Bfloat16", torch.float64: "double",
            torch.int64: "long", torch.int32: "int", torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "uint8_t",
            torch.bool: "bool"}
PATTERNS = {"rows": "BY_QUERY", "cols": "BY_KEY", "diagonal": "DIAGONAL", "direct": "BY_ENTRY", "any": "ANY"}
TO_SCORE = "const Problem& x, vec s, int b, int h, int q, ivec k, int nq, int nk"
OF_KEYS = "const Problem& x, int b, int h, int q, ivec k, int nq, int nk"
VARYING = frozenset({"k", "s"})
NONE: frozenset[str] = frozenset()


def source(program: str, dtypes: Sequence[torch.dtype]) -> str:
    """The functions of a program; those that it has not are empty and never called. dtypes: of its captured tensors."""
    score, gradient, mask, keys, queries, curvature, *lookups = parse(program)
    text = [f"constexpr bool HAS_SCORE = {_bool(score)}, HAS_CURVATURE = {_bool(curvature)}, HAS_MASK = {_bool(mask)};",
            f"constexpr bool MASK_OF_HEADS = {_bool([g for g in (*mask, *keys, *queries) if 'h' in leaves(g)])};",
            f"constexpr int BANDS = {len(keys) // 4}, LOOKUPS = {len(lookups)};",
            _value("vec", "score", TO_SCORE, score, dtypes), _value("vec", "score_gradient", TO_SCORE, gradient, dtypes),
            _value("vec", "score_curvature", TO_SCORE, curvature, dtypes), _value("ivec", "mask", OF_KEYS, mask, dtypes)]
    for name, own, graphs in (("keys", "q", keys), ("queries", "k", queries)):
        body = _Body(dtypes, NONE)
        lines = [f"bands[{i}] = {body.emit(graph).text};" for i, graph in enumerate(graphs)]
        text.append(_function("void", name, f"const Problem& x, int b, int h, int {own}, int nq, int nk, long* bands",
                              [*body.lines, *lines]))
    learned = [Learned(load, factor) for load, factor in lookups if isinstance(load, Node)]
    text.append(f"constexpr Pattern PATTERNS[] = {{{', '.join(PATTERNS[lookup.pattern] for lookup in learned) or 'ANY'}}};")
    factors, places = [], []
    for number, lookup in enumerate(learned):
        body = _Body(dtypes, VARYING)
        place = body.splat(body.offset(lookup.indices, lookup.load.args[2::2]))
        places.append(_function("lvec", f"place{number}", OF_KEYS, [*body.lines, f"return {place.text};"]))
        factors.append(_value("vec", f"factor{number}", TO_SCORE, (lookup.factor,), dtypes))
    count = len(learned)
    text += [*factors, _choice("vec", "factor", TO_SCORE, count), *places, _choice("lvec", "place", OF_KEYS, count)]
    return "\n".join(text)


def _bool(graphs: Sequence[Graph]) -> str:
    return "true" if graphs else "false"


def _function(result: str, name: str, arguments: str, lines: Sequence[str]) -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return f"static inline {result} {name}({arguments}) {{\n{body}}}\n"


def _choice(result: str, name: str, arguments: str, count: int) -> str:
    """The n-th of several functions."""
    names = ", ".join(argument.split()[-1] for argument in arguments.replace("&", " ").split(","))
    lines = [f"if (n == {number}) return {name}{number}({names});" for number in range(count)]
    return _function(result, name, f"int n, {arguments}", [*lines, f"return {result}{{}};"])


def _value(result: str, name: str, arguments: str, graphs: Sequence[Graph], dtypes: Sequence[torch.dtype]) -> str:
    if not graphs:
        return _function(result, name, arguments, [f"return {result}{{}};"])
    body = _Body(dtypes, VARYING)
    value = body.splat(body.emit(graphs[0]))
    return _function(result, name, arguments, [*body.lines, f"return {value.text};"])


class Value(NamedTuple):
    """C++ text. kind: "b", "i" (32 bits), "l" (64 bits) or "f"; varying: a vector."""
    text: str
    kind: str
    varying: bool


class _Body:
    """The statements of one function. Each node is computed once."""

    def __init__(self, dtypes: Sequence[torch.dtype], varying: frozenset[str]):
        self.dtypes, self.varying = dtypes, varying
        self.lines: list[str] = []
        self.values: dict[Graph, Value] = {}

    def emit(self, graph: Graph) -> Value:
        if isinstance(graph, str):
            return self.leaf(graph)
        if graph not in self.values:
            value = self.load(graph) if graph.op == "load" else self.operation(graph.op, graph.args)
            name = f"v{len(self.values)}"
            self.lines.append(f"const auto {name} = {value.text};")
            self.values[graph] = value._replace(text=name)
        return self.values[graph]

    def leaf(self, name: str) -> Value:
        if name[1:].isdigit():
            return {"i": Value(f"(int)x.ints[{name[1:]}]", "i", False), "n": Value(f"x.ints[{name[1:]}]", "l", False),
                    "f": Value(f"(float)x.floats[{name[1:]}]", "f", False)}[name[0]]
        return Value(name, kind(name), name in self.varying)

    def operation(self, op: str, args: Sequence[Graph]) -> Value:
        values = [self.emit(a) for a in args]
        if op == "where":
            condition, *values = values
            a, b = self.alike(values, condition.varying)
            condition = self.splat(condition) if a.varying else condition
            return Value(f"select({condition.text}, {a.text}, {b.text})", a.kind, a.varying)
        values = self.alike(values)
        first, texts = values[0], [value.text for value in values]
        result = _result(op, first)
        if op in SYMBOLS:
            text = f" {SYMBOLS[op]} ".join(texts)
            return Value(f"truth({text})" if op in COMPARISONS else f"bool({text})" if (result, first.varying) == ("b", False)
                         else text, result, first.varying)
        if op == "to_bool":
            return Value(f"truth({texts[0]} != 0)", "b", first.varying)
        if op == "not":
            return Value(f"!{texts[0]}" if (first.kind, first.varying) == ("b", False) else f"~{texts[0]}", first.kind,
                         first.varying)
        if op == "neg":
            return Value(f"-{texts[0]}", first.kind, first.varying)
        return Value(f"{CALLS[op]}({', '.join(texts)})", result, first.varying)

    def load(self, node: Node) -> Value:
        place, dtype = self.offset(node.args[1::2], node.args[2::2]), self.dtypes[slot_of(node)]
        return Value(f"entry<{ELEMENTS[dtype]}>(x.captured[{slot_of(node)}], {place.text})", stored_kind(dtype), place.varying)

    def offset(self, indices: Sequence[Graph], strides: Sequence[Graph]) -> Value:
        """Where an entry lies in its tensor, in elements."""
        terms = [[self.emit(index), self.emit(stride)] for index, stride in zip(indices, strides, strict=True)]
        varying = any(index.varying for index, _ in terms)
        texts = [" * ".join(value.text for value in self.alike(term, varying)) for term in terms]
        return Value(" + ".join(texts) or "0L", "l", varying)

    def alike(self, values: Sequence[Value], varying: bool = False) -> list[Value]:
        """Values as operands of one operation: of 64 bits if one of them is, vectors if one of them is."""
        longer = any(value.kind == "l" for value in values)
        varying = varying or any(value.varying for value in values)
        wide = [Value(f"lengthened({v.text})", "l", v.varying) if longer and v.kind == "i" else v for v in values]
        return [self.splat(value) for value in wide] if varying else wide

    @staticmethod
    def splat(value: Value) -> Value:
        return value if value.varying else Value(f"splat({value.text})", value.kind, True)


def _result(op: str, first: Value) -> str:
    """The kind of an operation's result."""
    if op in COMPARISONS:
        return "b"
    if op in ("div", "pow", "to_float", "to_fp16", "to_bf16") or CALLS.get(op, "").startswith("of_"):
        return "f"
    return "i" if op == "to_int" else first.kind
