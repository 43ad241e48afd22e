"""What runs where Triton interprets (`apart.py`): arguments and results are plain values."""
from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tilewise.backends.triton import supports
from tilewise.costs import Blocks
from tilewise.traffic.kernels import counted, predicted
from tilewise.traffic.shapes import Shape

MOST_VISITS = 60_000                    # tiles; a thousand take about two seconds


def count(shape: dict[str, Any], tiles: tuple[int, int], backward: bool) -> list[dict[str, Any]]:
    """For each launch what was counted and what the closed forms say, None where there is none."""
    of, blocks = Shape(**shape), Blocks(*tiles)
    problem, x = of.described(real=True)
    if reason := supports(problem):
        raise NotImplementedError(reason)
    try:
        forms: list[Any] = [asdict(kernel) for kernel in predicted(problem, x, blocks, backward, of.splits)]
    except NotImplementedError as error:
        forms = [str(error)]
    visits = problem.batch * problem.heads * -(-problem.seqlen_q // blocks.q) * -(-problem.seqlen_k // blocks.k)
    if visits * (3 if backward else 1) > MOST_VISITS:
        raise ValueError(f"tiles: expected at most {MOST_VISITS:,} visited, which take minutes to interpret, got "
                         f"{visits * (3 if backward else 1):,}; take larger tiles or a smaller problem")
    found = counted(problem, x, blocks, backward)
    if len(forms) != len(found):
        forms = [forms[0]] * len(found)
    return [{"counted": asdict(kernel), "form": form} for kernel, form in zip(found, forms, strict=True)]


def sweep(points: list[tuple[int, int, int]], backward: bool) -> list[dict[str, Any]]:
    """For each (N, d, side): bytes by kernel and tensor of one fp16 head in square tiles."""
    found = []
    for n, d, side in points:
        problem, x = Shape(n, head_dim=d).described(real=True)
        found.append({"n": n, "d": d, "side": side,
                      "kernels": [asdict(kernel) for kernel in counted(problem, x, Blocks(side, side), backward)]})
    return found
