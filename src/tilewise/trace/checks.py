"""What a program may not do, found before anything is launched: look beyond a captured tensor, leave 32 bits."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tilewise.trace.evaluate import slot_values
from tilewise.trace.graph import Graph, Node, parse, slot_of
from tilewise.trace.intervals import Bounds, Interval, point
from tilewise.trace.memo import readable

LIMITS = -2**31, 2**31 - 1


def check_indices(text: str, captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], names: Sequence[str],
                  sizes: dict[str, int], unequal: bool = False, lowest: int | None = None) -> None:
    """Raises IndexError where an index may leave its tensor, OverflowError where one may need more than 32 bits.

    names: of the captured tensors; sizes: of b, h, q, k, nq, nk; unequal: the last four are upper bounds;
    lowest: of the positions q + nk - nq in a cache. Found by interval arithmetic over all indices. Indices that
    depend on values that cannot be read at once, in a GPU's memory for instance, are not looked at.
    """
    if min(sizes[name] for name in "bhqk") == 0:
        return
    bounds = Bounds(slot_values(captured, ints, floats))
    leaves: dict[Graph, Interval] = {name: Interval(0, sizes[name] - 1) for name in "bhqk"}
    if unequal:
        leaves["nq"], leaves["nk"] = Interval(0, sizes["nq"]), Interval(0, sizes["nk"])
    else:
        leaves["nq"], leaves["nk"] = point(sizes["nq"]), point(sizes["nk"])
    if lowest is not None:
        leaves |= {node: Interval(lowest, sizes["nk"] - 1) for node in _nodes(text) if _is_position(node)}
    leaves["s"] = Interval(-float("inf"), float("inf"))
    elsewhere = not readable(*captured)
    for node in _nodes(text):
        if elsewhere and (any(map(_reads, node.args[1::2])) if node.op == "load" else _reads(node)):
            continue
        if node.op == "load":
            read = slot_of(node)
            for axis, index in enumerate(node.args[1::2]):
                _check_index(bounds.of(index, leaves), names[read], axis, captured[read].shape[axis])
        elif node.kind == "i":
            low, high = _ends(bounds.of(node, leaves))
            if low < LIMITS[0] or high > LIMITS[1]:
                raise OverflowError(f"an index expression may reach from {low} to {high}, beyond 32 bits, in which indices are "
                                    "computed")


def _is_position(node: Node) -> bool:
    """q + (nk - nq), which `nk` bounds better than its parts tell."""
    first, shift = node.args[0], node.args[-1]
    return (node.op, first) == ("add", "q") and isinstance(shift, Node) and (shift.op, shift.args) == ("sub", ("nk", "nq"))


def _check_index(reach: Interval, name: str, axis: int, size: int) -> None:
    low, high = _ends(reach)
    if low < 0 or high >= size:
        raise IndexError(f"{name}: expected an index of dimension {axis} from 0 to {size - 1}, got one that may reach from "
                         f"{low} to {high}: clamp it, as in index.clamp(0, {size - 1})")


def _ends(x: Interval) -> tuple[int, int]:
    return tuple(int(_extreme(v, first)) for v, first in zip(x, (True, False), strict=True))  # type: ignore[return-value]


def _extreme(value: Any, least: bool) -> Any:
    return (value.min() if least else value.max()) if isinstance(value, Tensor) else value


def _reads(graph: Graph) -> bool:
    return isinstance(graph, Node) and any(leaf[0] == "t" for leaf in graph.leaves)


@functools.lru_cache(maxsize=256)
def _nodes(text: str) -> tuple[Node, ...]:
    """All nodes of the score function and the mask, arguments first. Intervals of masks stay inside what they are made of."""
    score, _gradient, mask, *_ = parse(text)
    found: dict[Node, None] = {}

    def visit(graph: Graph) -> None:
        if isinstance(graph, Node) and graph not in found:
            for a in graph.args:
                visit(a)
            found[graph] = None

    for graph in (*score, *mask):
        visit(graph)
    return tuple(found)
