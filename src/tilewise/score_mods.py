"""Score functions: what becomes of a score before the softmax.

A `ScoreMod` is a graph over the score s and its indices (`trace/graph.py`); its derivative follows from the graph.
Several are applied in the order given.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from tilewise.masks import P
from tilewise.trace.capture import score_graph
from tilewise.trace.graph import Captured, Expr, load, substitute, tanh, var, wrap

S, B, H, K = var("s"), var("b"), var("h"), var("k")


class ScoreMod:
    """A function of one score: `expr` is a graph in which the leaf s stands for scale * q.k."""

    __slots__ = ("__weakref__", "expr", "name")

    def __init__(self, name: str, expr: Expr):
        self.name, self.expr = name, expr

    def __repr__(self) -> str:
        return self.name


def softcap(cap: float) -> ScoreMod:
    """cap * tanh(s / cap): keeps every score inside (-cap, cap)."""
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not math.isfinite(cap) or cap <= 0:
        raise ValueError(f"softcap: cap: expected a finite number > 0, got {cap!r}")
    c = wrap(float(cap))
    return ScoreMod(f"softcap({cap:g})", c * tanh(S / c))


def alibi(slopes: Tensor) -> ScoreMod:
    """s - slope * |p - j|, p = i + S_k - S_q (Press et al. 2022): a penalty that grows with distance.

    slopes: floating tensor [H] or [B, H].
    """
    if not isinstance(slopes, Tensor) or not slopes.dtype.is_floating_point or slopes.dim() not in (1, 2):
        got = f"{slopes.dtype} {list(slopes.shape)}" if isinstance(slopes, Tensor) else type(slopes).__name__
        raise TypeError(f"alibi: slopes: expected a floating tensor [H] or [B, H], got {got}")
    captured = Captured(slopes, "alibi: slopes")
    slope = load(captured, H) if slopes.dim() == 1 else load(captured, B, H)
    return ScoreMod("alibi(...)", S - slope * abs(P - K))


def score_mod(function: Callable) -> ScoreMod:
    """A score function from score_mod(score, b, h, q_idx, kv_idx) -> score, written with torch functions as for FlexAttention.

        @tw.score_mod
        def relative(score, b, h, q_idx, kv_idx):
            return score + table[h, q_idx - kv_idx + N - 1]

    Arguments behave like zero-dimensional tensors, the score in fp32. The function runs once; its derivative follows from
    its graph. `tw.attention(score_mod=function)` calls this.

    Raises CaptureError, naming the operation and the line, for what cannot be compiled.
    """
    return ScoreMod(getattr(function, "__name__", "score_mod"), score_graph(function))


Mods = ScoreMod | Callable | Sequence[ScoreMod | Callable] | None


def compose(mods: Mods) -> ScoreMod | None:
    """One score function for a sequence of them, applied in order."""
    if mods is None or isinstance(mods, ScoreMod):
        return mods
    if callable(mods):
        return score_mod(mods)
    if not isinstance(mods, (list, tuple)) or not all(isinstance(m, ScoreMod) or callable(m) for m in mods):
        raise TypeError(f"score_mod: expected None, a score function such as tw.softcap(30.0), or a sequence of them, "
                        f"got {mods!r}")
    if not mods:
        return None
    first, *others = [m if isinstance(m, ScoreMod) else score_mod(m) for m in mods]
    result = first
    for mod in others:
        result = ScoreMod(f"{result.name}, {mod.name}", substitute(mod.expr, "s", result.expr))
    return result
