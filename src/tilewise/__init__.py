"""Tilewise: exact attention, computed tile by tile."""
from tilewise import patterns
from tilewise.api import attention, explain
from tilewise.block_sparse import BlockMask, block_mask
from tilewise.masks import Mask, causal, chunked, documents, full, key_lengths, mask_mod, prefix, window
from tilewise.plan import Plan
from tilewise.rng import Rng
from tilewise.score_mods import ScoreMod, alibi, score_mod, softcap
from tilewise.state import AttentionState, merge_states
from tilewise.trace.capture import CaptureError

__version__ = "0.1.0"

__all__ = ["AttentionState", "BlockMask", "CaptureError", "Mask", "Plan", "Rng", "ScoreMod", "alibi", "attention", "block_mask",
           "causal", "chunked", "documents", "explain", "full", "key_lengths", "mask_mod", "merge_states", "patterns", "prefix",
           "score_mod", "softcap", "window"]
