"""Expression graphs over the indices of one attention score, and the programs they are lowered to.

A mask or a score function says, for one score, what becomes of it. As a graph it can be evaluated in torch on any block
of indices (`evaluate.py`), bounded over whole tiles (`bounds.py`), differentiated (`derive.py`) and emitted as kernel source
(`emit_triton.py`): one definition for every backend. A user's torch function becomes a graph in `capture.py`.

The leaves are
    b h q k     sequence, query head, query index, key index; indices count from 0 inside their own sequence
    p           the query index that a user's function is given: q, or with a KV cache the query's position (`lower`)
    nq nk       number of queries and of keys of that sequence
    s           the score (score functions only)
    numbers and captured tensors.

Every node has a kind, "b" boolean, "i" integer or "f" floating, and converts its arguments as torch would.

`lower` turns graphs into a `Program`: a canonical text in which numbers and tensors are named slots, and their values
beside it. Kernels are cached by the text, so another length, window or tensor never compiles anything again.
"""
from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ARITHMETIC: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv, "mod": operator.mod}
COMPARISONS: dict[str, Callable] = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne}
BITWISE: dict[str, Callable] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
OF_FLOATS = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "tanh", "sigmoid", "floor", "ceil")
GROUPS = ("score", "score_gradient", "mask", "keys", "queries", "score_curvature")  # of a program, before pairs of lookups
CASTS = {"bool": "b", "int": "i", "float": "f", "fp16": "f", "bf16": "f"}  # the last two round


class Expr:
    """One node. `op` is "var", "int", "float", "captured" (with `value`) or an operation (with `args`).

    reads: whether a captured tensor is read.
    """

    __slots__ = ("args", "kind", "op", "reads", "value")

    def __init__(self, op: str, kind: str, *args: Expr, value: Any = None):
        self.op, self.kind, self.args, self.value = op, kind, args, value
        self.reads: bool = op == "captured" or any([a.reads for a in args])

    def __add__(self, other): return arithmetic("add", self, other)
    def __radd__(self, other): return arithmetic("add", other, self)
    def __sub__(self, other): return arithmetic("sub", self, other)
    def __rsub__(self, other): return arithmetic("sub", other, self)
    def __mul__(self, other): return arithmetic("mul", self, other)
    def __rmul__(self, other): return arithmetic("mul", other, self)
    def __truediv__(self, other): return Expr("div", "f", cast("float", self), cast("float", other))
    def __rtruediv__(self, other): return Expr("div", "f", cast("float", other), cast("float", self))
    def __floordiv__(self, other): return arithmetic("floordiv", self, other)
    def __rfloordiv__(self, other): return arithmetic("floordiv", other, self)
    def __mod__(self, other): return arithmetic("mod", self, other)
    def __rmod__(self, other): return arithmetic("mod", other, self)
    def __pow__(self, other): return power(self, other)
    def __rpow__(self, other): return power(other, self)
    def __neg__(self): return Expr("neg", self.kind, number(self, "neg"))
    def __abs__(self): return Expr("abs", self.kind, number(self, "abs"))
    def __lt__(self, other): return comparison("lt", self, other)
    def __le__(self, other): return comparison("le", self, other)
    def __gt__(self, other): return comparison("gt", self, other)
    def __ge__(self, other): return comparison("ge", self, other)
    def __and__(self, other): return bitwise("and", self, other)
    def __rand__(self, other): return bitwise("and", other, self)
    def __or__(self, other): return bitwise("or", self, other)
    def __ror__(self, other): return bitwise("or", other, self)
    def __xor__(self, other): return bitwise("xor", self, other)
    def __rxor__(self, other): return bitwise("xor", other, self)
    def __invert__(self):
        if self.kind == "f":
            raise TypeError("not of a floating number")
        return Expr("not", self.kind, self)

    def __bool__(self):
        raise TypeError("an index expression has no truth value: write & | ~ instead of and, or, not, "
                        "and where() instead of if")

    @property
    def constant(self) -> bool:
        return self.op in ("int", "float")


def wrap(value: Any) -> Expr:
    """A Python number as a leaf; an expression as it is."""
    if isinstance(value, Expr):
        return value
    return Expr("float", "f", value=value) if isinstance(value, float) else Expr("int", "i", value=value)


def var(name: str) -> Expr:
    return Expr("var", "f" if name == "s" else "i", value=name)


class Captured(NamedTuple):
    """A tensor read by a graph.

    name for error messages; limit: a leaf that its values must not exceed, if any; whole: a dimension indexed by a leaf must
    have its size, otherwise it may be longer.
    """
    tensor: Tensor
    name: str
    limit: str | None = None
    whole: bool = True


def load(captured: Captured, *indices: Expr) -> Expr:
    """captured.tensor[indices]; the indices must lie inside the tensor."""
    stored = stored_kind(captured.tensor.dtype)
    kind = "i" if stored == "l" else stored
    return Expr("load", kind, Expr("captured", kind, value=captured), *indices)


def stored_kind(dtype: torch.dtype) -> str:
    """Of a captured tensor: "b" boolean, "i" integer of up to 32 bits, "l" of 64, "f" floating."""
    return "b" if dtype == torch.bool else "f" if dtype.is_floating_point else "l" if dtype == torch.int64 else "i"


# ---- operations, with torch's conversions -----------------------------------------------------------------------------

def cast(target: str, value: Any) -> Expr:
    """To "bool", "int" (towards zero), "float" (exact), "fp16" or "bf16" (rounded)."""
    x = wrap(value)
    if target in ("bool", "int", "float") and x.kind == CASTS[target]:
        return x
    if target in ("fp16", "bf16"):
        return Expr("to_" + target, "f", cast("float", x))
    if x.constant and target in ("int", "float"):
        return wrap({"int": int, "float": float}[target](x.value))
    return Expr("to_" + target, CASTS[target], x)


def promoted(a: Any, b: Any) -> tuple[Expr, Expr, str]:
    """Both arguments in the wider of their kinds, and that kind."""
    a, b = wrap(a), wrap(b)
    kind = max(a.kind, b.kind, key="bif".index)
    target = {"b": "bool", "i": "int", "f": "float"}[kind]
    return cast(target, a), cast(target, b), kind


def arithmetic(op: str, a: Any, b: Any) -> Expr:
    a, b, kind = promoted(a, b)
    if kind == "b":  # torch: True + True is True
        if op not in ("add", "mul"):
            raise TypeError(f"{op} of two booleans")
        return bitwise("or" if op == "add" else "and", a, b)
    if a.constant and b.constant and not (op in ("floordiv", "mod") and b.value == 0):
        return wrap(ARITHMETIC[op](a.value, b.value))
    return Expr(op, kind, a, b)


def comparison(op: str, a: Any, b: Any) -> Expr:
    a, b, _ = promoted(a, b)
    return Expr(op, "b", a, b)


def bitwise(op: str, a: Any, b: Any) -> Expr:
    a, b, kind = promoted(a, b)
    if kind == "f":
        raise TypeError(f"{op} of floating numbers")
    return Expr(op, kind, a, b)


def power(a: Any, b: Any) -> Expr:
    """a ** b; a small whole exponent becomes products. Of two whole numbers it is whole."""
    a, b = wrap(a), wrap(b)
    a = cast("int", a) if a.kind == "b" else a
    if b.constant and math.isfinite(b.value) and b.value == int(b.value) and 1 <= b.value <= 8:
        result = factor = cast("float", a) if b.kind == "f" else a
        for _ in range(int(b.value) - 1):
            result = result * factor
        return result
    if a.kind == "i" and b.kind != "f":
        return cast("int", Expr("pow", "f", cast("float", a), cast("float", b)) + 0.5)
    return Expr("pow", "f", cast("float", a), cast("float", b))


def number(x: Expr, op: str) -> Expr:
    if x.kind == "b":
        raise TypeError(f"{op} of a boolean")
    return x


def function(op: str, x: Any) -> Expr:
    """One of OF_FLOATS."""
    return Expr(op, "f", cast("float", x))


def equal(a: Any, b: Any) -> Expr:
    return comparison("eq", a, b)


def minimum(a: Any, b: Any) -> Expr:
    a, b, kind = promoted(a, b)
    return Expr("min", kind, a, b)


def maximum(a: Any, b: Any) -> Expr:
    a, b, kind = promoted(a, b)
    return Expr("max", kind, a, b)


def where(condition: Expr, a: Any, b: Any) -> Expr:
    a, b, kind = promoted(a, b)
    return Expr("where", kind, condition, a, b)


def tanh(x: Expr) -> Expr:
    return function("tanh", x)


def rewritten(exprs: Sequence[Expr], leaf: Callable[[Expr], Expr]) -> list[Expr]:
    """Graphs with leaf(x) in the place of each leaf x; what they share they share afterwards."""
    done: dict[int, Expr] = {}

    def visit(node: Expr) -> Expr:
        if id(node) not in done:
            done[id(node)] = Expr(node.op, node.kind, *[visit(a) for a in node.args]) if node.args else leaf(node)
        return done[id(node)]

    return [visit(expr) for expr in exprs]


def substitute(expr: Expr, name: str, value: Expr) -> Expr:
    """`expr` with `value` in the place of a leaf b, h, q, ...; of s: how score functions are composed."""
    (found,) = rewritten([expr], lambda leaf: value if leaf.op == "var" and leaf.value == name else leaf)
    return found


# ---- programs -----------------------------------------------------------------------------------------------------------

class Program(NamedTuple):
    """A canonical text and the values of its slots.

    Slots: `ti0 tl1 tf2 tb3` captured tensors (32-bit and 64-bit integer, floating, boolean), `i0` integers (32-bit), `n1`
    strides of captured tensors (64-bit; they count along with the integers), `f0` floats.
    """
    text: str
    captured: list[Tensor]
    ints: list[int]
    floats: list[float]
    loads: list[Expr]


def lower(sections: Sequence[Sequence[Expr]], p: Expr | None = None) -> Program:
    """Groups of graphs as one program; `parse(program.text)` gives back the groups. p: what the leaf p stands for, if not q.

    The text lists the operations, equal ones once, then each group's results: "add q i0;le k %0|%1|%0 %0".
    """
    slots = _Slots(var("q") if p is None else p)
    groups = [" ".join([slots.name(e) for e in section]) for section in sections]
    return Program("|".join([";".join(slots.lines), *groups]), slots.captured, slots.ints, slots.floats, slots.loads)


def extend(text: str, floats: int, place: int, graphs: Sequence[Expr]) -> tuple[str, list[float]]:
    """A program's text, of so many float slots, with other graphs in one of its groups; the values of the slots that they add.

    The graphs are of the program's own nodes (`reopened`) and new ones.
    """
    lines, *groups = text.split("|")
    slots = _Slots(var("q"))
    slots.floats = [0.0] * floats
    slots.lines = lines.split(";") if lines else []
    slots.numbers = {line: f"%{number}" for number, line in enumerate(slots.lines)}
    groups[place] = " ".join([slots.name(graph) for graph in graphs])
    return "|".join([";".join(slots.lines), *groups]), slots.floats[floats:]


def reopened(graph: Graph) -> Expr:
    """A parsed graph as an expression again, its slots as leaves."""
    done: dict[Graph, Expr] = {}

    def visit(node: Graph) -> Expr:
        if node not in done:
            done[node] = (Expr("var", kind(node), value=node) if isinstance(node, str)
                          else Expr(node.op, node.kind, *map(visit, node.args)))
        return done[node]

    return visit(graph)


class _Slots:
    """Gives out the names of one program: one for each leaf, tensor and operation, however often it occurs.

    Nodes are told apart by identity, in lists: torch.compile would compile again for other values or other id()s.
    """

    def __init__(self, p: Expr):
        self.p = p
        self.captured: list[Tensor] = []
        self.ints: list[int] = []
        self.floats: list[float] = []
        self.loads: list[Expr] = []
        self.seen: list[Expr] = []          # nodes seen, and
        self.names: list[str] = []          # their names
        self.lines: list[str] = []          # operations, and
        self.numbers: dict[str, str] = {}   # the names of their results
        self.strides: dict[str, str] = {}

    def name(self, expr: Expr) -> str:
        if expr.op == "var":
            return self.name(self.p) if expr.value == "p" else expr.value
        place = self.position(self.seen, expr)
        if place < len(self.names):
            return self.names[place]
        if expr.op == "int":
            name = self.integer("i", expr.value)
        elif expr.op == "float":
            name = f"f{len(self.floats)}"
            self.floats.append(expr.value)
        else:
            read = expr.op == "load" and expr.args[0].op == "captured"
            line = self.load(expr) if read else " ".join([expr.op, *[self.name(a) for a in expr.args]])
            if line not in self.numbers:
                self.numbers[line] = f"%{len(self.lines)}"
                self.lines.append(line)
            name = self.numbers[line]
        self.seen.append(expr)
        self.names.append(name)
        return name

    def load(self, expr: Expr) -> str:
        self.loads.append(expr)
        tensor = expr.args[0].value.tensor
        name = self.tensor(tensor)
        line = "load " + name
        for axis, index in enumerate(expr.args[1:]):
            line += f" {self.name(index)} {self.stride(name, axis, tensor.stride(axis))}"
        return line

    @staticmethod
    def position(seen: list, wanted: Any) -> int:
        """Where `wanted` itself stands in a list; its length if it does not."""
        slot = 0
        while slot < len(seen) and seen[slot] is not wanted:
            slot += 1
        return slot

    def stride(self, tensor: str, axis: int, value: int) -> str:
        key = f"{tensor} {axis}"
        if key not in self.strides:
            self.strides[key] = self.integer("n", value)
        return self.strides[key]

    def integer(self, kind: str, value: int) -> str:
        self.ints.append(value)
        return f"{kind}{len(self.ints) - 1}"

    def tensor(self, tensor: Tensor) -> str:
        slot = self.position(self.captured, tensor)
        if slot == len(self.captured):
            self.captured.append(tensor)
        return f"t{stored_kind(tensor.dtype)}{slot}"


class Node:
    """An operation of a parsed program; equal ones are the same object. A leaf is its name, a string."""

    __slots__ = ("args", "kind", "leaves", "op")

    def __init__(self, op: str, args: tuple[Node | str, ...]):
        self.op, self.args = op, args
        self.leaves: frozenset[str] = frozenset().union(*map(leaves, args))
        self.kind = _kind(op, args)


Graph = Node | str


def leaves(graph: Graph) -> frozenset[str]:
    """The names of a graph's leaves."""
    return frozenset([graph]) if isinstance(graph, str) else graph.leaves


def kind(graph: Graph) -> str:
    """ "b", "i" or "f"."""
    if isinstance(graph, Node):
        return graph.kind
    if graph[0] == "t":
        return "i" if graph[1] == "l" else graph[1]
    return "f" if graph == "s" or (graph[0] == "f" and graph[1:].isdigit()) else "i"


def _kind(op: str, args: tuple[Graph, ...]) -> str:
    if op in COMPARISONS:
        return "b"
    if op in OF_FLOATS or op in ("div", "pow"):
        return "f"
    return CASTS[op[3:]] if op.startswith("to_") else kind(args[-1] if op == "where" else args[0])


def slot_of(load: Node) -> int:
    """Which captured tensor a lookup in a parsed program reads."""
    return int(str(load.args[0])[2:])


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> tuple[tuple[Graph, ...], ...]:
    """The groups of graphs in a program's text."""
    lines, *groups = text.split("|")
    nodes: list[Node] = []

    def graph(name: str) -> Graph:
        return nodes[int(name[1:])] if name[0] == "%" else name

    for line in lines.split(";") if lines else []:
        op, *args = line.split(" ")
        nodes.append(Node(op, tuple(map(graph, args))))
    return tuple(tuple(map(graph, group.split(" "))) if group else () for group in groups)
