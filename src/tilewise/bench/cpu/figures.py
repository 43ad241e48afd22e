"""What a measurement says: medians and quartiles of ratios within a round, and the bars that they are held to."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tilewise.bench.serving.contest import Row, ratio
from tilewise.bench.timing import Timing


class Quantity(NamedTuple):
    """What a number counts, in words that go before what it is measured against. at_most: a bar is its upper limit."""
    words: str
    at_most: bool = False


FASTER = Quantity("times faster than")
SHARE = Quantity("share of")
COST = Quantity("cost over", at_most=True)
BUILD = Quantity("seconds to build", at_most=True)
LOAD = Quantity("ms to load", at_most=True)


class Ratio(NamedTuple):
    """The time of the contender `above` over that of `below`, times `factor`."""
    quantity: Quantity
    against: str
    above: str
    below: str
    bar: float | None = None
    factor: float = 1.0


def ratios(wanted: Sequence[Ratio], timed: Mapping[str, Timing]) -> list[Row]:
    """The figures of those pairs that have both been timed."""
    found = []
    for w in wanted:
        if w.above in timed and w.below in timed:
            pair = ratio(timed[w.below], timed[w.above])
            low, high = pair["quartiles"]
            found.append(figure(w.quantity, w.against, w.factor * pair["median"], (w.factor * low, w.factor * high), w.bar))
    return found


def figure(quantity: Quantity, against: str, median: float, quartiles: tuple[float, float], bar: float | None = None) -> Row:
    """met: whether the median is on the right side of the bar; None without one."""
    met = None if bar is None else median <= bar if quantity.at_most else median >= bar
    return {"quantity": quantity.words, "against": against, "median": median, "quartiles": quartiles, "bar": bar,
            "at_most": quantity.at_most, "met": met}
