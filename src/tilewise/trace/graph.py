"""Expression graphs over the indices of one attention score, and the programs they are lowered to.

A mask or a score function says, for one score, what becomes of it. As a graph it can be evaluated in torch on any block
of indices (`evaluate`), differentiated (`derive.py`) and emitted as kernel source (`emit_triton.py`): one definition
for every backend.

The leaves are
    b h q k     sequence, query head, query index, key index; indices count from 0 inside their own sequence
    nq nk       number of queries and of keys of that sequence
    s           the score (score functions only)
    numbers and captured tensors.

`lower` turns graphs into a `Program`: a canonical text in which numbers and tensors are named slots, and their values
beside it. Kernels are cached by the text, so another length, window or tensor never compiles anything again.
"""
from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Node = str | tuple  # a parsed program: a leaf's name, or (operation, argument, ...)


class Expr:
    """One node. `op` is "var", "int", "float", "captured" (with `value`) or an operation (with `args`)."""

    __slots__ = ("args", "op", "value")

    def __init__(self, op: str, *args: Expr, value: Any = None):
        self.op, self.args, self.value = op, args, value

    def __add__(self, other): return Expr("add", self, wrap(other))
    def __radd__(self, other): return Expr("add", wrap(other), self)
    def __sub__(self, other): return Expr("sub", self, wrap(other))
    def __rsub__(self, other): return Expr("sub", wrap(other), self)
    def __mul__(self, other): return Expr("mul", self, wrap(other))
    def __rmul__(self, other): return Expr("mul", wrap(other), self)
    def __truediv__(self, other): return Expr("div", self, wrap(other))
    def __floordiv__(self, other): return Expr("floordiv", self, wrap(other))
    def __mod__(self, other): return Expr("mod", self, wrap(other))
    def __neg__(self): return Expr("neg", self)
    def __abs__(self): return Expr("abs", self)
    def __lt__(self, other): return Expr("lt", self, wrap(other))
    def __le__(self, other): return Expr("le", self, wrap(other))
    def __gt__(self, other): return Expr("gt", self, wrap(other))
    def __ge__(self, other): return Expr("ge", self, wrap(other))
    def __and__(self, other): return Expr("and", self, wrap(other))
    def __or__(self, other): return Expr("or", self, wrap(other))
    def __invert__(self): return Expr("not", self)

    def __bool__(self):
        raise TypeError("an index expression has no truth value: write & | ~ instead of and, or, not, "
                        "and where() instead of if")


def wrap(value: Any) -> Expr:
    """A Python number as a leaf; an expression as it is."""
    if isinstance(value, Expr):
        return value
    return Expr("float" if isinstance(value, float) else "int", value=value)


def var(name: str) -> Expr:
    return Expr("var", value=name)


class Captured(NamedTuple):
    """A tensor read by a graph: `name` for error messages; `limit`: a leaf that its values must not exceed, if any."""
    tensor: Tensor
    name: str
    limit: str | None = None


def load(captured: Captured, *indices: Expr) -> Expr:
    """captured.tensor[indices]; the indices must lie inside the tensor."""
    return Expr("load", Expr("captured", value=captured), *indices)


def equal(a: Any, b: Any) -> Expr:
    return Expr("eq", wrap(a), wrap(b))


def minimum(a: Any, b: Any) -> Expr:
    return Expr("min", wrap(a), wrap(b))


def maximum(a: Any, b: Any) -> Expr:
    return Expr("max", wrap(a), wrap(b))


def where(condition: Expr, a: Any, b: Any) -> Expr:
    return Expr("where", condition, wrap(a), wrap(b))


def tanh(x: Expr) -> Expr:
    return Expr("tanh", x)


def substitute(expr: Expr, score: Expr) -> Expr:
    """`expr` with the leaf s replaced by `score`: how score functions are composed."""
    if expr.op == "var":
        return score if expr.value == "s" else expr
    if not expr.args:
        return expr
    return Expr(expr.op, *(substitute(a, score) for a in expr.args), value=expr.value)


class Program(NamedTuple):
    """A canonical text and the values of its slots.

    Slots: `ti0 tf1 tb2` captured tensors (integer, floating, boolean), `i0` integers (32-bit), `n1` strides of captured
    tensors (64-bit; they count along with the integers), `f0` floats.
    """
    text: str
    captured: list[Tensor]
    ints: list[int]
    floats: list[float]
    loads: list[Expr]


def lower(sections: Sequence[Sequence[Expr]]) -> Program:
    """Groups of graphs as one program; `parse(program.text)` gives back the groups."""
    slots = _Slots()
    groups = ["(" + " ".join([slots.text(e) for e in section]) + ")" for section in sections]
    return Program("(" + " ".join(groups) + ")", slots.captured, slots.ints, slots.floats, slots.loads)


class _Slots:
    """Gives out the slots of one program: one for each leaf and for each tensor, however often it occurs.

    Leaves are told apart by identity, in lists: torch.compile would compile again for other values or other id()s.
    """

    def __init__(self):
        self.captured: list[Tensor] = []
        self.ints: list[int] = []
        self.floats: list[float] = []
        self.loads: list[Expr] = []
        self.leaves: list[Expr] = []        # numbers seen, and
        self.names: list[str] = []          # the names of their slots
        self.strides: dict[tuple[str, int], str] = {}

    def text(self, expr: Expr) -> str:
        if expr.op == "var":
            return expr.value
        if expr.op == "int":
            slot = self.position(self.leaves, expr)
            if slot == len(self.names):
                self.leaves.append(expr)
                self.names.append(self.integer("i", expr.value))
            return self.names[slot]
        if expr.op == "float":
            slot = self.position(self.leaves, expr)
            if slot == len(self.names):
                self.leaves.append(expr)
                self.names.append(f"f{len(self.floats)}")
                self.floats.append(expr.value)
            return self.names[slot]
        if expr.op == "load":
            tensor = expr.args[0].value.tensor
            self.loads.append(expr)
            name = self.tensor(tensor)
            text = "(load " + name
            for axis, index in enumerate(expr.args[1:]):
                text += f" {self.text(index)} {self.stride(name, axis, tensor.stride(axis))}"
            return text + ")"
        return "(" + expr.op + " " + " ".join([self.text(a) for a in expr.args]) + ")"

    @staticmethod
    def position(seen: list, wanted: Any) -> int:
        """Where `wanted` itself stands in a list; its length if it does not."""
        slot = 0
        while slot < len(seen) and seen[slot] is not wanted:
            slot += 1
        return slot

    def stride(self, tensor: str, axis: int, value: int) -> str:
        if (tensor, axis) not in self.strides:
            self.strides[tensor, axis] = self.integer("n", value)
        return self.strides[tensor, axis]

    def integer(self, kind: str, value: int) -> str:
        self.ints.append(value)
        return f"{kind}{len(self.ints) - 1}"

    def tensor(self, tensor: Tensor) -> str:
        slot = self.position(self.captured, tensor)
        if slot == len(self.captured):
            self.captured.append(tensor)
        kind = "b" if tensor.dtype == torch.bool else "f" if tensor.dtype.is_floating_point else "i"
        return f"t{kind}{slot}"


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> tuple[tuple[Node, ...], ...]:
    """The groups of graphs in a program's text, as nested tuples."""
    stack: list[list] = [[]]
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            stack.append([])
        elif token == ")":
            closed = tuple(stack.pop())
            stack[-1].append(closed)
        else:
            stack[-1].append(token)
    return stack[0][0]


def leaves(node: Node) -> set[str]:
    """The names of a graph's leaves."""
    return {node} if isinstance(node, str) else set().union(*(leaves(a) for a in node[1:]))


TORCH: Mapping[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "floordiv": operator.floordiv, "mod": operator.mod, "abs": abs,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq,
    "and": operator.and_, "or": operator.or_,
    "not": lambda a: torch.logical_not(a) if isinstance(a, Tensor) else not a,
    "min": lambda a, b: _choose(a, b, torch.minimum, min), "max": lambda a, b: _choose(a, b, torch.maximum, max),
    "where": lambda c, a, b: torch.where(c, a, b) if isinstance(c, Tensor) else (a if c else b),
    "tanh": torch.tanh,
}


def _choose(a: Any, b: Any, of_tensors: Callable, of_numbers: Callable) -> Any:
    tensor = a if isinstance(a, Tensor) else b
    if not isinstance(tensor, Tensor):
        return of_numbers(a, b)
    return of_tensors(*(x if isinstance(x, Tensor) else torch.full_like(tensor, x) for x in (a, b)))


def evaluate(node: Node, values: Mapping[str, Any], memo: dict | None = None) -> Any:
    """The value of a parsed graph in torch.

    values: leaf name -> number or tensor; index tensors broadcast against each other, as in b [B, 1, 1, 1] and
    k [1, 1, 1, N]; "float" -> the dtype to compute in. Returns a number or a tensor of the broadcast shape of the leaves used.
    """
    if isinstance(node, str):
        return values[node]
    memo = {} if memo is None else memo
    if node not in memo:
        if node[0] == "load":
            indices = [evaluate(i, values, memo) for i in node[2::2]]
            loaded = values[node[1]][tuple(indices)]
            memo[node] = loaded.to(values["float"]) if loaded.is_floating_point() else loaded
        else:
            memo[node] = TORCH[node[0]](*[evaluate(a, values, memo) for a in node[1:]])
    return memo[node]


def slot_values(captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
                dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The values of a program's slots, by name, for `evaluate` in fp32, or fp64 for fp64 scores."""
    values: dict[str, Any] = {"float": torch.promote_types(dtype, torch.float32)}
    values |= {f"f{i}": x for i, x in enumerate(floats)}
    for i, x in enumerate(ints):
        values[f"i{i}"] = values[f"n{i}"] = x
    for i, t in enumerate(captured):
        for kind in "ifb":
            values[f"t{kind}{i}"] = t
    return values


def leaf_values(slots: Mapping[str, Any], batch: int, heads: int, nq: int, nk: int,
                device: torch.device | str = "cpu") -> dict[str, Any]:
    """Slots, and the leaves b [B, 1, 1, 1], h [1, H, 1, 1], nq, nk: all but q, k and s."""
    return {**slots, "b": torch.arange(batch, device=device)[:, None, None, None],
            "h": torch.arange(heads, device=device)[:, None, None], "nq": nq, "nk": nk}
