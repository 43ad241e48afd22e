"""Tilewise: exact attention, computed tile by tile."""
from tilewise.api import attention, explain
from tilewise.masks import Mask, causal, chunked, documents, full, key_lengths, prefix, window
from tilewise.plan import Plan
from tilewise.rng import Rng
from tilewise.score_mods import ScoreMod, alibi, softcap
from tilewise.state import AttentionState, merge_states

__version__ = "0.1.0"

__all__ = ["AttentionState", "Mask", "Plan", "Rng", "ScoreMod", "alibi", "attention", "causal", "chunked", "documents",
           "explain", "full", "key_lengths", "merge_states", "prefix", "softcap", "window"]
