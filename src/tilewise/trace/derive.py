"""Derivatives of score functions by the chain rule, as graphs: with respect to the score and to what they look up."""
from __future__ import annotations

import functools
import math

from tilewise.trace.graph import GROUPS, Expr, cast, extend, function, parse, power, reopened, substitute, var, where, wrap


@functools.lru_cache(maxsize=512)
def curved(text: str, floats: int) -> tuple[str, tuple[float, ...]]:
    """The text of a program of so many floats with d² score / d s², and the values of the floats that it adds.

    Only second derivatives ask for it: an ordinary call does not derive twice.
    """
    _score, gradient, *_ = parse(text)
    second = derivative(reopened(gradient[0])) if gradient else None
    if second is None:
        return text, ()
    longer, added = extend(text, floats, GROUPS.index("score_curvature"), [second])
    return longer, tuple(added)


@functools.lru_cache(maxsize=512)
def multiplied(text: str, captured: int, ints: int) -> str:
    """The text of a program, of so many captured tensors and integers, with the score first multiplied by one more tensor.

    It is [B, H]; its two strides follow the integers. For forward passes: what the score's derivatives would be is left out.
    """
    score, *_ = parse(text)
    factor = Expr("load", "f", Expr("var", "f", value=f"tf{captured}"), var("b"), Expr("var", "i", value=f"n{ints}"), var("h"),
                  Expr("var", "i", value=f"n{ints + 1}"))
    scaled = var("s") * factor
    longer, _ = extend(text, 0, GROUPS.index("score"), [substitute(reopened(score[0]), "s", scaled) if score else scaled])
    return longer


def lookups(expr: Expr) -> list[tuple[Expr, Expr]]:
    """(lookup, d expr / d lookup) for each lookup of a floating tensor on which expr depends smoothly."""
    found: dict[int, Expr] = {}

    def visit(node: Expr) -> None:
        if id(node) not in found:
            found[id(node)] = node
            for a in node.args:
                visit(a)

    visit(expr)
    loads = [node for node in found.values() if node.op == "load" and node.kind == "f"]
    pairs = [(node, derivative(expr, node)) for node in loads]
    return [(node, d) for node, d in pairs if d is not None]


def derivative(expr: Expr, lookup: Expr | None = None) -> Expr | None:
    """d expr / d s, or / d lookup, a node of expr; None where expr does not depend on it."""
    done: dict[int, Expr | None] = {}

    def visit(node: Expr) -> Expr | None:
        if node is lookup:
            return wrap(1.0)
        if node.op == "var":
            return wrap(1.0) if node.value == "s" and lookup is None else None
        if not node.args or node.op == "load" or node.kind != "f":
            return None  # integers and booleans are constant almost everywhere, and so is what they select
        if id(node) not in done:
            inner = [visit(a) for a in node.args]
            done[id(node)] = None if all(d is None for d in inner) else RULES[node.op](node, node.args, inner)
        return done[id(node)]

    return visit(expr)


def _sum(a: Expr | None, b: Expr | None) -> Expr | None:
    return a if b is None else b if a is None else a + b


def _times(a: Expr, d: Expr | None) -> Expr | None:
    return None if d is None else a * d


def _divide(node, args, d):
    return _sum(d[0], None if d[1] is None else -(node * d[1])) / args[1]


def _power(node, args, d):
    a, b = args
    of_base = None if d[0] is None else b * power(a, b - 1.0) * d[0]
    return _sum(of_base, None if d[1] is None else node * function("log", a) * d[1])


def _select(condition: Expr, d: list[Expr | None]) -> Expr:
    return where(condition, *(wrap(0.0) if x is None else x for x in d))


RULES = {
    "add": lambda node, args, d: _sum(d[0], d[1]),
    "sub": lambda node, args, d: _sum(d[0], None if d[1] is None else -d[1]),
    "neg": lambda node, args, d: -d[0],
    "mul": lambda node, args, d: _sum(_times(args[1], d[0]), _times(args[0], d[1])),
    "div": _divide,
    "pow": _power,
    "mod": lambda node, args, d: _sum(d[0], None if d[1] is None else -(function("floor", args[0] / args[1]) * d[1])),
    "floordiv": lambda node, args, d: None,
    "floor": lambda node, args, d: None,
    "ceil": lambda node, args, d: None,
    "abs": lambda node, args, d: _select(args[0] < 0.0, [-d[0], d[0]]),
    "min": lambda node, args, d: _select(args[0] < args[1], d),
    "max": lambda node, args, d: _select(args[0] > args[1], d),
    "where": lambda node, args, d: _select(args[0], d[1:]),
    "exp": lambda node, args, d: node * d[0],
    "exp2": lambda node, args, d: node * math.log(2) * d[0],
    "log": lambda node, args, d: d[0] / args[0],
    "log2": lambda node, args, d: d[0] / (args[0] * math.log(2)),
    "sqrt": lambda node, args, d: 0.5 * d[0] / node,
    "rsqrt": lambda node, args, d: -0.5 * node * node * node * d[0],
    "sin": lambda node, args, d: function("cos", args[0]) * d[0],
    "cos": lambda node, args, d: -(function("sin", args[0]) * d[0]),
    "erf": lambda node, args, d: 2 / math.sqrt(math.pi) * function("exp", -(args[0] * args[0])) * d[0],
    "tanh": lambda node, args, d: (1.0 - node * node) * d[0],
    "sigmoid": lambda node, args, d: node * (1.0 - node) * d[0],
    "to_float": lambda node, args, d: None,
    "to_fp16": lambda node, args, d: cast("float", d[0]),
    "to_bf16": lambda node, args, d: cast("float", d[0]),
}
