"""IO complexity, fitted: the exponents of N, d and M in what was counted, against Theorem 2's and 5's N² d² / M.

Fast memory of M elements holds a tile of each of Q, K, V and O (backward: of Q, K, V and dO), M = 4 d B for square tiles with B
rows, as line 1 of Algorithm 1 has it. Bytes of runs over a grid of N, d and M are fitted as

    log bytes = c + a log N + b log d - e log M         by least squares, with standard errors

"streamed" takes the tensors that pass again and again: those whose count is the theorems' N² d² / M. "all" also has those that
a program reads or writes once, Θ(N d), and the rows' statistics, Θ(N² d / M): lower terms, which vanish beside the first as
N d / M and d grow, so that at sizes that an interpreter can run exponents of "all" are lower by a few percent.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

THEORY = {"N": 2.0, "d": 2.0, "M": -1.0}
QUICK = (128, 256), (16, 32), (1024, 2048)     # N, d and M
FULL = (128, 256, 512), (16, 32, 64), (2048, 4096, 8192)
STREAMED = {"forward": ("k", "v"), "key_gradients": ("q", "do"), "query_gradients": ("k", "v")}


class Fit(NamedTuple):
    """Exponents and their standard errors by the names in `THEORY`; points: how many bytes were counted."""
    part: str
    exponents: dict[str, float]
    errors: dict[str, float]
    points: int

    @property
    def off(self) -> float:
        """The largest distance from theory, relative."""
        return max(abs(self.exponents[name] / THEORY[name] - 1) for name in THEORY)


def grid(quick: bool) -> list[tuple[int, int, int]]:
    """(N, d, B): each N, d and M that fit together, M at most N d / 2, so that tensors pass at least 8 times."""
    lengths, dims, memories = QUICK if quick else FULL
    sides = [(n, d, m // (4 * d)) for n in lengths for d in dims for m in memories]
    return [(n, d, side) for n, d, side in sides if side >= 16 and n >= 8 * side]


def fits(counts: Sequence[dict[str, Any]]) -> list[Fit]:
    """Of each pass, streamed tensors and all."""
    found = []
    passes = {"forward": ("forward",), "backward": ("preprocess", "key_gradients", "query_gradients")}
    for name, kernels in passes.items():
        if any(kernel["name"] == kernels[-1] for kernel in counts[0]["kernels"]):
            for kind in ("streamed", "all"):
                found.append(fit(f"{name}, {kind}", ((c["n"], c["d"], 4 * c["d"] * c["side"], moved(c, kernels, kind))
                                                     for c in counts)))
    return found


def moved(count: dict[str, Any], kernels: Iterable[str], kind: str) -> int:
    total = 0
    for kernel in count["kernels"]:
        if kernel["name"] in kernels:
            if kind == "all":
                total += sum(kernel["read"].values()) + sum(kernel["written"].values())
            else:
                total += sum(kernel["read"][tensor] for tensor in STREAMED.get(kernel["name"], ()))
    return total


def fit(part: str, points: Iterable[tuple[int, int, int, int]]) -> Fit:
    """Ordinary least squares on logarithms of (N, d, M, bytes)."""
    rows = [[math.log(x) for x in point] for point in points]
    design = np.array([[1.0, *row[:3]] for row in rows])
    target = np.array([row[3] for row in rows])
    solution, *_ = np.linalg.lstsq(design, target, rcond=None)
    residual = target - design @ solution
    freedom = max(1, len(rows) - design.shape[1])
    covariance = float(residual @ residual) / freedom * np.linalg.pinv(design.T @ design)
    errors = np.sqrt(np.diag(covariance))
    return Fit(part, {name: float(solution[1 + i]) for i, name in enumerate(THEORY)},
               {name: float(errors[1 + i]) for i, name in enumerate(THEORY)}, len(rows))
