"""Intervals in a captured mask: conditions that are linear in the indices of key and query are taken out of its graph.

A mask made from a function has no bands. Those of language models are mostly conjunctions such as `kv_idx <= q_idx` and
`kv_idx > q_idx - window`; with their bands they cost kernels no lists of tiles, and few queries read keys where they lie.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tilewise.masks import LAST_KEY, LAST_QUERY, NK, NQ, ZERO, Band, K, Mask, Q, exact
from tilewise.trace.graph import Expr, where, wrap


class Bound(NamedTuple):
    """k * key + q * query + rest <= 0; k and q are -1, 0 or 1, and rest does not depend on key and query."""
    k: int
    q: int
    rest: Expr

    def always(self, seqlen_q: int, seqlen_k: int) -> bool:
        """Whether it surely holds for all queries and keys."""
        greatest = max(0, self.k * (seqlen_k - 1)) + max(0, self.q * (seqlen_q - 1))
        return self.rest.op == "int" and greatest + self.rest.value <= 0

    def causal(self, seqlen_q: int, seqlen_k: int) -> bool:
        """Whether it is that of `tw.causal()`, which other calls have compiled already."""
        return (self.k, self.q, self.rest.value) == (1, -1, seqlen_q - seqlen_k)

    def mask(self) -> Mask:
        """As a mask with its bands; k and q are not both 0."""
        key, query = (_sum(-sign * other, index, _signed(-sign, self.rest))
                      for sign, other, index in ((self.k, self.q, Q), (self.q, self.k, K)))
        sign, index, edge = (self.k, K, key) if self.k else (self.q, Q, query)
        element = edge >= index if sign > 0 else edge <= index
        return Mask("bound", element, (_band(self.k, key, LAST_KEY, element, NK),),
                    (_band(self.q, query, LAST_QUERY, element, NQ),))


def _band(sign: int, edge: Expr, last: Expr, element: Expr, count: Expr) -> Band:
    """The keys of a query, or the queries of a key, up to an edge or from it on; all or none where they do not matter."""
    if sign == 0:
        return exact(where(element, ZERO, count), last)
    return exact(ZERO, edge) if sign > 0 else exact(edge, last)


def conditions(visible: Expr) -> Iterator[Bound | Expr]:
    """The conditions that together make a graph True: bounds, and graphs that are none."""
    if visible.op == "and":
        for part in visible.args:
            yield from conditions(part)
    elif visible.op == "to_bool" and visible.args[0].op == "int" and visible.args[0].value:
        return
    else:
        bounds = _bounds(visible)
        yield from bounds if any(bound.k or bound.q for bound in bounds) else [visible]


def _bounds(condition: Expr) -> list[Bound]:
    """The bounds that a comparison is; none where it is not linear."""
    op, args = condition.op, condition.args
    if op not in COMPARED or any(x.kind != "i" for x in args):
        return []
    less, more = args[::-1] if op in ("ge", "gt") else args
    sides = [(less, more)]
    if op == "eq":
        sides = [(less, more), (more, less)]
    elif less.op == "abs":
        sides = [(less.args[0], more), (-less.args[0], more)]
    found = [_linear(a - b + COMPARED[op]) for a, b in sides]
    return [bound for bound in found if bound is not None and abs(bound.k) <= 1 and abs(bound.q) <= 1]


COMPARED = {"le": 0, "ge": 0, "eq": 0, "lt": 1, "gt": 1}   # by how much the lesser side is less


def _linear(x: Expr) -> Bound | None:
    """x as k * key + q * query + rest; None where it is no such sum."""
    if x.op == "var" and x.value in ("k", "p", "q"):
        return Bound(int(x.value == "k"), int(x.value != "k"), ZERO)
    if x.op in ("add", "sub"):
        a, b = map(_linear, x.args)
        if a is None or b is None:
            return None
        sign = 1 if x.op == "add" else -1
        return Bound(a.k + sign * b.k, a.q + sign * b.q, _plus(a.rest, _signed(sign, b.rest)))
    if x.op == "neg":
        a = _linear(x.args[0])
        return None if a is None else Bound(-a.k, -a.q, _signed(-1, a.rest))
    return None if _indexed(x) else Bound(0, 0, x)


def _indexed(x: Expr) -> bool:
    """Whether a graph depends on key or query."""
    seen: dict[int, Expr] = {}
    waiting = [x]
    while waiting:
        node = waiting.pop()
        if node.op == "var" and node.value in ("k", "p", "q"):
            return True
        waiting += [a for a in node.args if id(a) not in seen]
        seen |= {id(a): a for a in node.args}
    return False


def _sum(factor: int, index: Expr, rest: Expr) -> Expr:
    if factor == 0:
        return rest
    return index + rest if factor > 0 else rest - index


def _signed(sign: int, x: Expr) -> Expr:
    if sign > 0:
        return x
    return wrap(-x.value) if x.op == "int" else -x


def _plus(a: Expr, b: Expr) -> Expr:
    if a is ZERO or b is ZERO:
        return b if a is ZERO else a
    return a + b
