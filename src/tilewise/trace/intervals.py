"""Interval arithmetic on graphs: the least and the greatest value that a graph can take while its leaves range over intervals.

Bounds are sound, not always tight: a node's arguments are taken to vary independently. Rounding is monotone, so rounded
bounds of rounded operations hold; library functions are widened by a few roundings.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.trace.evaluate import OPERATIONS
from tilewise.trace.graph import Graph, Node, kind

ORDER = {"ge": True, "gt": True, "le": False, "lt": False}    # whether the first argument is the larger
WIDENED = 1e-6
LARGEST = 2**31 - 1
DEPTH = 2  # choices inside choices that are looked at separately; deeper ones would double the work each


class Interval(NamedTuple):
    """lo and hi, numbers or tensors that broadcast; a point where they are the same object. Both NaN: anything, NaN included.

    Booleans: surely, possibly.
    """
    lo: Any
    hi: Any


def point(x: Any) -> Interval:
    return Interval(x, x)


class Bounds:
    """Bounds of the nodes of one program.

    values: a program's leaves except q and k (`evaluate.leaf_values`). Range minima and maxima of captured tensors are kept
    from one question to the next.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.windows: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.depth = 0

    def of(self, graph: Graph, leaves: Mapping[Graph, Interval]) -> Interval:
        """The bounds of `graph`; leaves: intervals of q, k and whatever else shall not have its one value."""
        return self._of(graph, leaves, {})

    def _of(self, graph: Graph, leaves: Mapping[Graph, Interval], memo: dict[Node, Interval]) -> Interval:
        if graph in leaves:
            return leaves[graph]
        if isinstance(graph, str):
            return point(self.values[graph])
        if graph not in memo:
            if graph.op == "load":
                memo[graph] = self.load(str(graph.args[0]), [self._of(i, leaves, memo) for i in graph.args[1::2]])
            elif graph.op == "where":
                memo[graph] = self.choice(graph, leaves, memo)
            else:
                memo[graph] = _apply(graph, [self._of(a, leaves, memo) for a in graph.args], self.values["float"])
        return memo[graph]

    def choice(self, node: Node, leaves: Mapping[Graph, Interval], memo: dict[Node, Interval]) -> Interval:
        """where(condition, a, b): each side under what the condition says there, as in where(q >= k, q - k, 0)."""
        condition, a, b = node.args
        sides = []
        for side, holds in ((a, True), (b, False)):
            known = dict(self._known(condition, holds, side, leaves, memo)) if self.depth < DEPTH else {}
            self.depth += bool(known)
            sides.append(self._of(side, {**leaves, **known}, {} if known else memo))
            self.depth -= bool(known)
        return _chosen(self._of(condition, leaves, memo), *sides)

    def _known(self, condition: Graph, holds: bool, side: Graph, leaves: Mapping[Graph, Interval],
               memo: dict[Node, Interval]) -> Iterator[tuple[Graph, Interval]]:
        """Narrower intervals of nodes of `side`, where a comparison, or each of several, holds or not."""
        if isinstance(condition, str) or isinstance(side, str):
            return
        if condition.op == ("and" if holds else "or"):
            for part in condition.args:
                yield from self._known(part, holds, side, leaves, memo)
        if condition.op not in ORDER:
            return
        x, y = condition.args if ORDER[condition.op] == holds else condition.args[::-1]  # now x >= y, or x > y
        of_x, of_y = self._of(x, leaves, memo), self._of(y, leaves, memo)
        yield x, _cut(of_x, of_y.lo, None)
        yield y, _cut(of_y, None, of_x.hi)
        for node in descendants(side):
            if node.op == "sub" and node.args == (x, y):
                yield node, _cut(self._of(node, leaves, memo), 0, None)
            elif node.op == "sub" and node.args == (y, x):
                yield node, _cut(self._of(node, leaves, memo), None, 0)

    def load(self, name: str, indices: list[Interval]) -> Interval:
        """The least and greatest entry of a captured tensor in a box of indices, cut to the tensor."""
        table = self.values[name]
        if table.numel() == 0:
            return point(torch.zeros((), dtype=table.dtype, device=table.device))
        cut = [Interval(*(_clamp(x, size - 1) for x in i)) if i.lo is not i.hi else point(_clamp(i.lo, size - 1))
               for i, size in zip(indices, table.shape, strict=True)]
        least, greatest = self._extremes(name, (), cut)
        if table.dtype == torch.bool:
            return Interval(least, greatest)
        if table.is_floating_point():
            least, greatest = least.to(self.values["float"]), greatest.to(self.values["float"])
            return _both(least, greatest)
        return Interval(least.long(), greatest.long())

    def _extremes(self, name: str, levels: tuple[int, ...], box: list[Interval]) -> tuple[Tensor, Tensor]:
        """Over a box; two windows of length 2^level cover a range along one dimension, dimension after dimension."""
        done = len(levels)
        if done == len(box):
            least, greatest = self._window(name, levels)
            at = tuple(_clamp(i.lo, size - 1) for i, size in zip(box, least.shape, strict=True))
            return least[at], greatest[at]
        lo, hi = box[done]
        if lo is hi:
            return self._extremes(name, (*levels, 0), box)
        length = torch.as_tensor(hi - lo + 1)
        level = torch.log2(length.clamp(min=1).double()).floor().long()
        size = self.values[name].shape[done]
        if level.device.type == "cpu":
            present = level.unique().tolist()
        else:  # finding out which are needed would wait for the device
            present = list(range(size.bit_length()))
        found: tuple[Tensor, Tensor] | None = None
        for n in present:
            ends = [self._extremes(name, (*levels, n), [*box[:done], point(at), *box[done + 1:]])
                    for at in (lo, hi - (2**n - 1))]
            least, greatest = torch.minimum(ends[0][0], ends[1][0]), torch.maximum(ends[0][1], ends[1][1])
            if found is not None:
                least, greatest = (torch.where(level == n, new, old) for new, old in zip((least, greatest), found, strict=True))
            found = least, greatest
        assert found is not None
        return found

    def _window(self, name: str, levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Minima and maxima of a tensor over windows of 2^level entries along each dimension, by doubling."""
        key = (name, levels)
        if key not in self.windows:
            longest = max(range(len(levels)), key=lambda d: levels[d], default=0)
            if not levels or levels[longest] == 0:
                table = self.values[name]
                self.windows[key] = table, table
            else:
                half = 2**(levels[longest] - 1)
                smaller = (*levels[:longest], levels[longest] - 1, *levels[longest + 1:])
                least, greatest = self._window(name, smaller)
                n = max(0, least.shape[longest] - half)
                self.windows[key] = (
                    torch.minimum(least.narrow(longest, 0, n), least.narrow(longest, half, n)),
                    torch.maximum(greatest.narrow(longest, 0, n), greatest.narrow(longest, half, n)))
        return self.windows[key]


def descendants(graph: Graph) -> set[Node]:
    """All nodes of a graph."""
    found: set[Node] = set()
    waiting = [graph]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Node) and node not in found:
            found.add(node)
            waiting.extend(node.args)
    return found


def _cut(x: Interval, least: Any, most: Any) -> Interval:
    """The part of an interval from `least` to `most`; where nothing is left the value never counts."""
    lo = x.lo if least is None else _greatest(x.lo, least)
    hi = x.hi if most is None else _least(x.hi, most)
    return Interval(_least(lo, hi), _greatest(lo, hi))


def _clamp(x: Any, most: int) -> Any:
    return x.clamp(0, max(most, 0)) if isinstance(x, Tensor) else min(max(x, 0), max(most, 0))


def _least(*values: Any) -> Any:
    return _fold(OPERATIONS["min"], values)


def _greatest(*values: Any) -> Any:
    return _fold(OPERATIONS["max"], values)


def _fold(op: Callable, values: tuple) -> Any:
    result = values[0]
    for x in values[1:]:
        if isinstance(x, float) and x != x and isinstance(result, float):
            return x
        result = op(*_matched(result, x))
    return result


def _matched(a: Any, b: Any) -> tuple[Any, Any]:
    """Tensors of one dtype, where both are tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        return a.to(dtype), b.to(dtype)
    return a, b


def _apply(node: Node, args: list[Interval], dtype: torch.dtype) -> Interval:
    op = node.op
    if all(a.lo is a.hi for a in args) and op != "to_float":
        value = OPERATIONS[op](*(a.lo for a in args))
        return _sound(op, point(value)) if op in LIBRARY else point(value)
    if op == "to_float":
        x = args[0]
        lo, hi = (v.to(dtype) if isinstance(v, Tensor) else float(v) for v in x)
        return point(lo) if x.lo is x.hi else Interval(lo, hi)
    if op in BITWISE_RULES:
        return (BITWISE_RULES if kind(node) == "b" else INTEGER_RULES)[op](*args)
    return _sound(op, RULES[op](*args))


def _sound(op: str, x: Interval) -> Interval:
    """Widened where the operation is a library's, and everything where it may be NaN."""
    lo, hi = x
    if op in LIBRARY:
        lo, hi = lo - (abs(lo) * WIDENED + 1e-30), hi + (abs(hi) * WIDENED + 1e-30)
    return _both(lo, hi)


def _both(lo: Any, hi: Any, *others: Any) -> Interval:
    """Both ends are NaN, which stands for anything, where one of these is."""
    for x in (lo, hi, *others):
        if isinstance(x, Tensor) and x.is_floating_point():
            lo, hi = (_select(x.isnan(), torch.nan, end) for end in (lo, hi))
        elif isinstance(x, float) and x != x:
            return point(x)
    return Interval(lo, hi)


def _ends(x: Interval) -> tuple:
    return (x.lo,) if x.lo is x.hi else (x.lo, x.hi)


def _sum(a: Interval, b: Interval) -> Interval:
    if _whole(a) and _whole(b):
        return Interval(a.lo + b.lo, a.hi + b.hi)
    return _both(a.lo + b.lo, a.hi + b.hi, a.lo + b.hi, a.hi + b.lo)  # inf - inf


def _product(a: Interval, b: Interval) -> Interval:
    values = [x * y for x in _ends(a) for y in _ends(b)]
    holes = [_select((x.lo <= 0) & (x.hi >= 0) & ((y.lo == -torch.inf) | (y.hi == torch.inf)), torch.nan, 0.0)
             for x, y in ((a, b), (b, a)) if not _whole(y)]  # 0 * inf
    return _both(_least(*values), _greatest(*values), *values, *holes)


def _quotient(op: str) -> Callable:
    def rule(a: Interval, b: Interval) -> Interval:
        positive, negative = b.lo > 0, b.hi < 0
        certain = positive | negative
        one = 1.0 if op == "div" else 1
        safe = [_select(certain, y, one) for y in _ends(b)]
        values = [OPERATIONS[op](x, y) for x in _ends(a) for y in safe]
        bound = _greatest(*(abs(x) for x in _ends(a))) if op == "floordiv" and _whole(a) else torch.nan
        return _both(_select(certain, _least(*values), -bound - 1 if op == "floordiv" and _whole(a) else -bound),
                     _select(certain, _greatest(*values), bound),
                     *(() if _whole(a) else (_select(certain, v, 0) for v in values)))
    return rule


def _whole(a: Interval) -> bool:
    return not (a.lo.is_floating_point() if isinstance(a.lo, Tensor) else isinstance(a.lo, float))


def _remainder(a: Interval, b: Interval) -> Interval:
    """b > 0: exact while a stays inside one period."""
    divisor = _select(b.lo > 0, b.lo, 1)
    constant = (b.lo == b.hi) & (b.lo > 0)
    same = constant & (a.lo // divisor == a.hi // divisor)
    step = 1 if _whole(b) else 0
    low = _select(b.lo > 0, 0, _least(b.lo + step, 0))
    high = _greatest(b.hi - step, 0)
    lo, hi = _select(same, a.lo % divisor, low), _select(same, a.hi % divisor, high)
    if _whole(a) and _whole(b):
        return Interval(lo, hi)
    defined = (abs(a.lo) < torch.inf) & (abs(a.hi) < torch.inf) & ((b.lo > 0) | (b.hi < 0))
    return _both(lo, hi, _select(defined, 0.0, torch.nan))


def _power(a: Interval, b: Interval) -> Interval:
    positive = a.lo > 0
    values = [_select(positive, x, 1.0) ** y for x in _ends(a) for y in _ends(b)]
    nan = _select(positive, 0.0, torch.nan)
    return _both(_least(*values), _greatest(*values), nan, *values)


def _select(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    return torch.where(condition, *_matched(*(x if isinstance(x, Tensor) else _on(condition.device, x) for x in (a, b))))


def _on(device: torch.device, x: bool | int | float) -> Tensor:
    """A number as a tensor, without a copy from the host, which would wait for the device."""
    return torch.full((), x, dtype=torch.as_tensor(x).dtype, device=device)


def _increasing(op: str) -> Callable:
    return lambda a: Interval(OPERATIONS[op](a.lo), OPERATIONS[op](a.hi))


def _not(a: Any) -> Any:
    return ~a if isinstance(a, Tensor) else not a


def _equal(a: Interval, b: Interval) -> Interval:
    return Interval((a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo), _not((a.lo > b.hi) | (b.lo > a.hi)))


def _negated(x: Interval) -> Interval:
    return Interval(_not(x.hi), _not(x.lo))


def _chosen(c: Interval, a: Interval, b: Interval) -> Interval:
    low, high = _least(a.lo, b.lo), _greatest(a.hi, b.hi)
    return Interval(_select(c.lo, a.lo, _select(_not(c.hi), b.lo, low)), _select(c.lo, a.hi, _select(_not(c.hi), b.hi, high)))


def _anything(*_: Interval) -> Interval:
    return Interval(-LARGEST - 1, LARGEST)


def _integer_and(a: Interval, b: Interval) -> Interval:
    """Of numbers >= 0, not above either."""
    fits = (a.lo >= 0) & (b.lo >= 0)
    return Interval(_select(fits, 0, -LARGEST - 1), _select(fits, _least(a.hi, b.hi), LARGEST))


def _whole_number(x: Any, otherwise: int) -> Any:
    """As an integer of 32 bits; a NaN is `otherwise`."""
    if isinstance(x, Tensor):
        return _select(x.isnan(), otherwise, x.to(torch.float64).clamp(-LARGEST - 1, LARGEST)).to(torch.int64)
    return otherwise if x != x else int(min(max(x, -LARGEST - 1), LARGEST))


LIBRARY = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "tanh", "sigmoid", "pow")
RULES: dict[str, Callable[..., Interval]] = {
    "add": lambda a, b: _sum(a, b), "sub": lambda a, b: _sum(a, Interval(-b.hi, -b.lo)),
    "mul": _product, "div": _quotient("div"), "floordiv": _quotient("floordiv"), "mod": _remainder, "pow": _power,
    "neg": lambda a: Interval(-a.hi, -a.lo),
    "abs": lambda a: Interval(_greatest(a.lo, -a.hi, 0), _greatest(-a.lo, a.hi)),
    "lt": lambda a, b: Interval(a.hi < b.lo, _not(a.lo >= b.hi)),
    "le": lambda a, b: Interval(a.hi <= b.lo, _not(a.lo > b.hi)),
    "gt": lambda a, b: Interval(a.lo > b.hi, _not(a.hi <= b.lo)),
    "ge": lambda a, b: Interval(a.lo >= b.hi, _not(a.hi < b.lo)),
    "eq": _equal, "ne": lambda a, b: _negated(_equal(a, b)),
    "min": lambda a, b: Interval(_least(a.lo, b.lo), _least(a.hi, b.hi)),
    "max": lambda a, b: Interval(_greatest(a.lo, b.lo), _greatest(a.hi, b.hi)), "where": _chosen,
    **{op: _increasing(op) for op in ("exp", "exp2", "log", "log2", "sqrt", "erf", "tanh", "sigmoid", "floor", "ceil",
                                      "to_fp16", "to_bf16")},
    "to_int": lambda a: Interval(_whole_number(a.lo, -LARGEST - 1), _whole_number(a.hi, LARGEST)),
    "rsqrt": lambda a: Interval(OPERATIONS["rsqrt"](a.hi), OPERATIONS["rsqrt"](a.lo + 0.0)),  # of -0.0 it is -inf
    **dict.fromkeys(("sin", "cos"), lambda a: _both(-1.0 + 0.0 * a.lo, 1.0 + 0.0 * a.hi)),
    "to_bool": lambda a: Interval((a.lo > 0) | (a.hi < 0), _not((a.lo == 0) & (a.hi == 0))),
}
BITWISE_RULES: dict[str, Callable[..., Interval]] = {
    "and": lambda a, b: Interval(a.lo & b.lo, a.hi & b.hi), "or": lambda a, b: Interval(a.lo | b.lo, a.hi | b.hi),
    "xor": lambda a, b: Interval((a.lo & _not(b.hi)) | (_not(a.hi) & b.lo),
                                 _not((a.lo & b.lo) | (_not(a.hi) & _not(b.hi)))), "not": _negated,
}
INTEGER_RULES: dict[str, Callable[..., Interval]] = {
    "and": _integer_and, "or": _anything, "xor": _anything, "not": lambda a: Interval(-a.hi - 1, -a.lo - 1)}
