"""Tilewise: exact attention, computed tile by tile."""
from tilewise.api import attention, explain
from tilewise.block_mask import (
    BlockMask,
    axial,
    bigbird,
    block_mask,
    butterfly,
    global_blocks,
    local,
    random_blocks,
    strided,
)
from tilewise.masks import Mask, causal, chunked, documents, full, key_lengths, mask_mod, prefix, window
from tilewise.plan import Plan
from tilewise.rng import Rng
from tilewise.score_mods import ScoreMod, alibi, score_mod, softcap
from tilewise.state import AttentionState, merge_states

__version__ = "0.1.0"

__all__ = ["AttentionState", "Mask", "Plan", "Rng", "ScoreMod", "alibi", "attention", "causal", "chunked", "documents",
           "explain", "full", "key_lengths", "mask_mod", "merge_states", "prefix", "score_mod", "softcap", "window"]
