"""FlexAttention's entry points (torch.nn.attention.flex_attention), with the same arguments.

    from tilewise.compat.flex import create_block_mask, flex_attention

What differs: nothing needs torch.compile; it trains on a CPU; block masks are classified by interval arithmetic instead of
N² evaluations; lengths never recompile; kernel options have nothing to act on and are refused.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

from tilewise.api import attention
from tilewise.block_sparse import BlockMask, block_mask, layout_element
from tilewise.masks import Mask, mask_mod
from tilewise.trace.bounds import FULL, PARTIAL

with contextlib.suppress(ImportError):  # torch 2.10 and newer
    from torch.nn.attention.flex_attention import AuxOutput as AuxOutput
    from torch.nn.attention.flex_attention import AuxRequest as AuxRequest

__all__ = ["BlockMask", "and_masks", "create_block_mask", "create_mask", "flex_attention", "noop_mask", "or_masks"]


def flex_attention(query: Tensor, key: Tensor, value: Tensor, score_mod: Callable | None = None,
                   block_mask: Mask | TorchBlockMask | None = None, scale: float | None = None, enable_gqa: bool = False,
                   return_lse: bool = False, kernel_options: Mapping | None = None, *, return_aux: Any = None,
                   backend: str = "auto") -> Any:
    """Attention [B, H, S_q, D_v] of query [B, H, S_q, D], key [B, H_kv, S_k, D] and value [B, H_kv, S_k, D_v].

    score_mod(score, b, h, q_idx, kv_idx); block_mask: from `create_block_mask` here or in torch, or any `tw.Mask`.
    Returns out; (out, lse) with return_lse, lse [B, H, S_q] natural; (out, AuxOutput) with return_aux=AuxRequest(lse=True,
    max_scores=True), max_scores [B, H, S_q] without gradient.
    """
    if kernel_options:
        raise ValueError(f"kernel_options: expected None: Tilewise chooses its own tiles, got {dict(kernel_options)}")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(f"enable_gqa: expected True, as query has {query.shape[1]} heads and key {key.shape[1]}")
    mask = from_torch(block_mask) if isinstance(block_mask, TorchBlockMask) else block_mask
    wanted = ("max_score",) if return_aux is not None and return_aux.max_scores else ()
    out, lse, *found = attention(query, key, value, mask=mask, score_mod=score_mod, scale=scale, return_lse=True,
                                 return_stats=wanted, layout="bhsd", backend=backend)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None, max_scores=found[0].max_score if found else None)
    return (out, lse) if return_lse else out


def create_block_mask(mask_mod: Callable, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
                      device: torch.device | str | None = None, BLOCK_SIZE: int | tuple[int, int] = 128,
                      _compile: bool = False) -> BlockMask:
    """The block mask of mask_mod(b, h, q_idx, kv_idx); B, H: None where it does not depend on them.

    device: of the tensors that mask_mod captures; default the current accelerator, or the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return block_mask(mask_mod, Q_LEN, KV_LEN, batch=B or 1, heads=H or 1, block_size=BLOCK_SIZE, device=device)


def create_mask(mod_fn: Callable, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
                device: torch.device | str = "cpu") -> Tensor:
    """The mask as a boolean tensor [B, H, Q_LEN, KV_LEN], of size N²."""
    return mask_mod(mod_fn).dense(B or 1, H or 1, Q_LEN, KV_LEN, device)


def and_masks(*mask_mods: Callable) -> Callable:
    """The function that is True where all are."""
    def both(b, h, q_idx, kv_idx):
        result = b.new_ones((), dtype=torch.bool)
        for mod in mask_mods:
            result = result & mod(b, h, q_idx, kv_idx)
        return result
    return both


def or_masks(*mask_mods: Callable) -> Callable:
    """The function that is True where one is."""
    def either(b, h, q_idx, kv_idx):
        result = b.new_zeros((), dtype=torch.bool)
        for mod in mask_mods:
            result = result | mod(b, h, q_idx, kv_idx)
        return result
    return either


def noop_mask(b, h, q_idx, kv_idx):
    """Every key."""
    return b.new_ones((), dtype=torch.bool)


def from_torch(mask: TorchBlockMask) -> BlockMask:
    """torch's block mask as one of ours: full blocks whole, partial blocks by its mask_mod, all others dropped."""
    full = None
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = mask.full_kv_num_blocks, mask.full_kv_indices
    return from_lists("torch's BlockMask", (mask.kv_num_blocks, mask.kv_indices), full, mask.BLOCK_SIZE, mask.mask_mod)


def from_lists(name: str, partial: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor] | None, block_size: tuple[int, int],
               inside: Mask | Callable | None) -> BlockMask:
    """The mask of lists of blocks: counts [B, H, rows of blocks], and in each row of indices [B, H, rows, blocks] the first of
    them. Full blocks are whole, in partial ones `inside` shows elements (None: all), others are dropped.
    """
    columns = max(indices.shape[-1] for _, indices in (partial, full or partial))
    layout = _layout(*partial, columns)
    element, classes = layout_element(layout, block_size), layout.byte() * (FULL if inside is None else PARTIAL)
    if inside is not None:
        element = element & (inside if isinstance(inside, Mask) else mask_mod(inside)).element
    if full is not None:
        layout = _layout(*full, columns)
        element = element | layout_element(layout, block_size)
        classes = torch.where(layout, FULL, classes)
    return BlockMask(name, element, classes, block_size)


def _layout(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Boolean [B, H, rows, blocks] from the first counts[...] of the indices of each row."""
    listed = torch.arange(blocks, device=counts.device) < counts[..., None]
    layout = torch.zeros((*counts.shape, blocks + 1), dtype=torch.bool, device=counts.device)
    return layout.scatter_(-1, torch.where(listed, indices, blocks).long(), True)[..., :blocks]
