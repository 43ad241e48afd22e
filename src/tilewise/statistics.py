"""Statistics of attention's scores and probabilities, beside its result: for watching a training run, and for eviction.

s are finished scores (after score functions, bias and mask), p the probabilities before dropout.

    max_score   max_j s_ij                  of a row: clipping of logits (QK-Clip; Kimi K2, section 2.1)
    entropy     -sum_j p'_ij log p'_ij      of a row: collapse of attention entropy (Zhai et al. 2023)
    key_mass    sum_i p_ij                  of a key: eviction from a cache (H2O, Zhang et al. 2023; SnapKV, Li et al. 2024)

A sink is no key: max_score does not count it, p' is normalised over keys alone. p has it in its denominator as the output has,
so that the mass of all keys is the number of rows less what went to the sink.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.state import exp_difference, log_sum_exp


class Statistics(NamedTuple):
    """What was asked for; None otherwise. fp32 (fp64 for fp64), no gradient.

    max_score: [B, H, S_q] (packed [H, total_q]), -inf for a row that sees no key.
    entropy: likewise, in nats, from 0 (all on one key, or no key) to log(number of keys seen).
    key_mass: [B, H, S_k] (packed [H, total_k]), 0 for a key that no query sees. Of a cache [B, H, longest], from each
        sequence's first key on, 0 behind its last; longest as for the columns of a bias: of all these sequences, on a GPU the
        capacity.
    """
    max_score: Tensor | None = None
    entropy: Tensor | None = None
    key_mass: Tensor | None = None


def checked(names: Sequence[str]) -> str:
    """`return_stats` as one string, in the order of `Statistics`. Raises TypeError or ValueError."""
    if isinstance(names, tuple) and not names:
        return ""
    listed = ", ".join(f'"{name}"' for name in Statistics._fields)
    if isinstance(names, str) or not isinstance(names, (tuple, list, set, frozenset)):
        raise TypeError(f"return_stats: expected a tuple of names among {listed}, got {names!r}")
    for name in names:
        if name not in Statistics._fields:
            raise ValueError(f"return_stats: expected names among {listed}, got {name!r}")
    return " ".join(name for name in Statistics._fields if name in names)


def merge_rows(parts: Statistics, lse: Tensor, into: Statistics) -> None:
    """Writes max_score and entropy over the union of disjoint sets of keys, from those of each, [parts, ...], and their lse.

    A key of probability p in its part has w p in the union, w = exp(lse_part - lse): the entropy is that of each part and
    -log w, weighted by w.
    """
    if parts.max_score is not None and into.max_score is not None:
        torch.amax(parts.max_score, 0, out=into.max_score)
    if parts.entropy is not None and into.entropy is not None:
        whole = log_sum_exp(lse)
        missing = torch.where(lse == -torch.inf, 0.0, whole - lse)
        torch.sum(exp_difference(lse, whole) * (parts.entropy + missing), 0, out=into.entropy)
