"""flash-attn's words for what tokens see and what becomes of scores, in Tilewise's: the one place, for all its generations.

    causal, window_size, attention_chunk, mask_mod      a mask: what all of them show
    softcap, alibi_slopes, score_mod                    score functions, applied in this order
    learnable_sink                                      sinks
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tilewise.masks import Mask, chunked, window
from tilewise.problem import MAX_SPLITS
from tilewise.score_mods import ScoreMod, alibi
from tilewise.score_mods import softcap as capped


def options(*, softmax_scale: float | None = None, causal: bool = False, window_size: Sequence | None = (-1, -1),
            attention_chunk: int = 0, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
            score_mod: ScoreMod | Callable | None = None, mask_mod: Mask | Callable | None = None,
            learnable_sink: Tensor | None = None, dropout_p: float = 0.0, deterministic: bool = False,
            signed_window: bool = False, backend: str = "auto") -> dict[str, Any]:
    """The keyword arguments of `tw.attention` that mean the same.

    window_size: neighbours on each side, integers or tensors of one; negative ones and None are unbounded. signed_window: only
        None is, and (-1, -1) as a whole; a negative number leaves the query's own neighbourhood out (`flash_attn.cute`).
    attention_chunk, softcap: 0 for none.
    score_mod, mask_mod: as in `tw.attention`.
    deterministic: True, or as torch.use_deterministic_algorithms says.
    """
    left, right = _bounds(window_size, signed_window)
    if causal:
        right = 0 if right is None else min(right, 0)
    masks: list[Any] = [] if right == 0 and left is None else _window(left, right)
    if attention_chunk:
        if attention_chunk < 0:
            raise ValueError(f"attention_chunk: expected a number of positions, or 0 for none, got {attention_chunk!r}")
        masks.append(chunked(operator.index(attention_chunk)))
    if mask_mod is not None:
        masks.append(mask_mod)
    mods: list[ScoreMod | Callable] = []
    if softcap:
        if softcap < 0:
            raise ValueError(f"softcap: expected a number > 0, or 0 for none, got {softcap!r}")
        mods.append(capped(float(softcap)))
    if alibi_slopes is not None:
        mods.append(alibi(alibi_slopes))
    if score_mod is not None:
        mods.append(score_mod)
    return dict(causal=right == 0 and left is None, mask=_all(masks), score_mod=mods or None, sinks=learnable_sink,
                scale=None if softmax_scale is None else float(softmax_scale), dropout_p=dropout_p,
                deterministic=True if deterministic else None, backend=backend)


def hints(num_splits: int | None, pack_gqa: bool | None = None, sm_margin: int = 0) -> int | None:
    """Checks what changes the speed alone; num_splits as `tw.attention_with_kv_cache` takes it: None for a heuristic."""
    if isinstance(num_splits, bool) or not (num_splits is None or 0 <= operator.index(num_splits) <= MAX_SPLITS):
        raise ValueError(f"num_splits: expected a number from 1 to {MAX_SPLITS}, or 0 for a heuristic, got {num_splits!r}")
    if pack_gqa not in (None, False, True):
        raise TypeError(f"pack_gqa: expected None, True or False, got {pack_gqa!r}")
    if operator.index(sm_margin) < 0:
        raise ValueError(f"sm_margin: expected a number of multiprocessors >= 0, got {sm_margin!r}")
    return operator.index(num_splits) if num_splits else None


def _bounds(window_size: Sequence | None, signed: bool) -> tuple[int | None, int | None]:
    if window_size is None:
        return None, None
    try:
        left, right = (None if side is None else operator.index(side) for side in window_size)
    except (TypeError, ValueError):
        raise TypeError(f"window_size: expected (left, right), integers or None, got {window_size!r}") from None
    if signed and (left, right) != (-1, -1):
        if left is not None and right is not None and left + right < 0:
            raise ValueError("window_size: expected left + right >= 0, or None for an unbounded side, got "
                             f"{(left, right)}, which shows no key")
        return left, right
    return tuple(None if side is None or side < 0 else side for side in (left, right))  # type: ignore[return-value]


def _window(left: int | None, right: int | None) -> list[Mask]:
    """p - left <= j <= p + right; bounds may be negative."""
    masks = []
    if left is not None and left < 0:       # j >= p - left: not j <= p - left - 1
        masks.append(~window(None, -left - 1))
        left = None
    if right is not None and right < 0:
        masks.append(~window(-right - 1, None))
        right = None
    return masks if left is None and right is None else [window(left, right), *masks]


def _all(masks: Sequence[Any]) -> Any:
    """What all masks show; None for no mask."""
    whole = None
    for mask in masks:
        whole = mask if whole is None else whole & mask
    return whole
