"""How new keys and values get into a cache: the launch of `append_kernel`, settled once for tensors that lie alike."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilewise.backends.gpu_math.append_kernel import append as append_kernel
from tilewise.backends.gpu_math.arguments import blocks, padded, strides
from tilewise.backends.gpu_math.launches import Launch
from tilewise.kv_cache import FP8, Stored
from tilewise.rotary import Rotary
from tilewise.trace.graph import GROUPS, lower
from tilewise.trace.memo import Memo

BLOCK = 16                              # tokens of a program
WARPS = 4
NOTHING = lower([[]] * len(GROUPS)).text          # a program without functions

_launches = Memo()


def write(stored: Stored, new: Tensor, k_new: Tensor, v_new: Tensor | None, q: Tensor | None, q_rows: Tensor | None,
          rotary: Rotary | None) -> Tensor | None:
    """`tilewise.kv_cache.write`, in one launch."""
    turning = None if rotary is None else q
    # packed tokens have one slot: rows of q that are in no sequence stay as they are
    turned = None if turning is None else torch.empty_like(turning) if turning.shape[0] > 1 else turning.clone()
    rows, heads = k_new.shape[2], k_new.shape[1]
    if turning is not None:
        rows, heads = max(rows, turning.shape[2]), heads + turning.shape[1]
    count = blocks(rows, BLOCK)         # of each sequence, at most
    if count * heads * len(new):
        given = tensors(stored, new, k_new, v_new, turning, turned, q_rows, rotary)
        key = (*[None if x is None else (x.shape, x.stride(), x.dtype) for x in given.values()], k_new.device,
               rotary is None or (rotary.interleaved, rotary.max_position))
        _launches.get(key, (), lambda: Launch(
            append_kernel, NOTHING, (len(new) * count, heads), given | numbers(given, rotary) | dict(blocks=count),
            k_new.device, num_warps=WARPS, num_stages=1))(given)
    return q if turned is None else turned


def tensors(stored: Stored, new: Tensor, k_new: Tensor, v_new: Tensor | None, q: Tensor | None, turned: Tensor | None,
            q_rows: Tensor | None, rotary: Rotary | None) -> dict[str, Tensor | None]:
    """What the kernel is told."""
    k, v = (x.view(torch.uint8) if x.dtype == FP8 else x for x in (stored.k, stored.v))
    cos, sin = (None, None) if rotary is None else (rotary.cos.contiguous(), rotary.sin.contiguous())
    return dict(K=k, V=v, PAGES=stored.pages, STORED=stored.rows, K_SCALE=stored.k_scale, V_SCALE=stored.v_scale, NEW=new,
                K_NEW=k_new, V_NEW=v_new, Q=q, Q_OUT=turned, Q_ROWS=q_rows, COS=cos, SIN=sin)


def numbers(given: Mapping[str, Any], rotary: Rotary | None) -> dict[str, Any]:
    """And what follows from how they lie in memory."""
    k, v, pages = given["K"], given["V"], given["PAGES"]
    half, positions = (0, 1) if rotary is None else (rotary.cos.shape[1], rotary.max_position)
    room, pages_row = (k.shape[2], 0) if pages is None else (pages.shape[1] * k.shape[2], pages.stride(0))
    steps = {f"{name.lower()}_strides": (0, 0, 0) if given[name] is None else strides(given[name])
             for name in ("K", "V", "K_NEW", "V_NEW", "Q", "Q_OUT")}
    return steps | dict(
        kv_heads=k.shape[1], room=room, slots=k.shape[0], page_size=k.shape[2], pages_row=pages_row, positions=positions,
        INTERLEAVED=rotary is not None and rotary.interleaved, HALF=half, D=k.shape[3], DV=v.shape[3], BLOCK_M=BLOCK,
        BLOCK_D=padded(k.shape[3]), BLOCK_DV=padded(v.shape[3]), BLOCK_HALF=padded(max(1, half)))
