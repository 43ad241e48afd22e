"""Derivatives of score functions: the graph of d(score function)/d(score), by the chain rule."""
from __future__ import annotations

from tilewise.trace.graph import Expr, tanh, where, wrap


def derivative(expr: Expr) -> Expr | None:
    """d expr / d s; None where expr does not depend on s."""
    if expr.op == "var":
        return wrap(1.0) if expr.value == "s" else None
    if expr.op == "load" or not expr.args:
        return None
    inner = [derivative(a) for a in expr.args]
    if all(d is None for d in inner):
        return None
    if expr.op not in RULES:
        raise TypeError(f"score function: {expr.op} of the score has no derivative rule")
    return RULES[expr.op](expr.args, inner)


def _sum(a: Expr | None, b: Expr | None) -> Expr | None:
    return a if b is None else b if a is None else a + b


def _times(a: Expr, d: Expr | None) -> Expr | None:
    return None if d is None else a * d


def _divide(args, d):
    a, b = args
    numerator = None if d[1] is None else -(a * d[1]) / b
    numerator = _sum(d[0], numerator)
    return None if numerator is None else numerator / b


def _select(args, d):
    zero = wrap(0.0)
    return where(args[0], zero if d[1] is None else d[1], zero if d[2] is None else d[2])


RULES = {
    "add": lambda args, d: _sum(d[0], d[1]),
    "sub": lambda args, d: _sum(d[0], None if d[1] is None else -d[1]),
    "neg": lambda args, d: -d[0],
    "mul": lambda args, d: _sum(_times(args[1], d[0]), _times(args[0], d[1])),
    "div": _divide,
    "tanh": lambda args, d: (1.0 - tanh(args[0]) * tanh(args[0])) * d[0],
    "abs": lambda args, d: where(args[0] < 0.0, -d[0], d[0]),
    "where": _select,
}

