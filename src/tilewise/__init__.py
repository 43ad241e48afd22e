"""Tilewise: exact attention, computed tile by tile."""
from tilewise import patterns
from tilewise.api import attention, attention_varlen, attention_with_kv_cache, cascade_attention, explain
from tilewise.block_sparse import BlockMask, block_mask
from tilewise.kv_cache import KVCache
from tilewise.masks import Mask, causal, chunked, documents, full, key_lengths, mask_mod, prefix, tree, window
from tilewise.packing import pack, pad, unpack, unpad
from tilewise.paged_cache import CacheFull, PagedKVCache
from tilewise.plan import Plan
from tilewise.rng import Rng
from tilewise.rotary import Rotary
from tilewise.score_mods import ScoreMod, alibi, score_mod, softcap
from tilewise.state import AttentionState, merge_states
from tilewise.statistics import Statistics
from tilewise.trace.capture import CaptureError

__version__ = "0.1.0"

__all__ = ["AttentionState", "BlockMask", "CacheFull", "CaptureError", "KVCache", "Mask", "PagedKVCache", "Plan", "Rng",
           "Rotary", "ScoreMod", "Statistics", "alibi", "attention", "attention_varlen", "attention_with_kv_cache",
           "block_mask", "cascade_attention", "causal", "chunked", "documents", "explain", "full", "key_lengths", "mask_mod",
           "merge_states", "pack", "pad", "patterns", "prefix", "score_mod", "softcap", "tree", "unpack", "unpad", "window"]
