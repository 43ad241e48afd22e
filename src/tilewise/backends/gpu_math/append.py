"""How new keys and values get into a cache: the launch of `append_kernel`."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.backends.gpu_math.append_kernel import append as append_kernel
from tilewise.backends.gpu_math.arguments import blocks, padded, strides
from tilewise.backends.gpu_math.entry import entry, flatten
from tilewise.backends.gpu_math.launches import start
from tilewise.kv_cache import FP8, Stored
from tilewise.rotary import Rotary
from tilewise.trace.graph import GROUPS, lower

BLOCK = 16                              # tokens of a program
WARPS = 4
NOTHING = lower([[]] * len(GROUPS)).text          # a program without functions


def write(stored: Stored, new: Tensor, k_new: Tensor, v_new: Tensor | None, q: Tensor | None, q_rows: Tensor | None,
          rotary: Rotary | None) -> Tensor | None:
    """`tilewise.kv_cache.write`, in one launch."""
    turning = None if rotary is None else q
    # packed tokens have one slot: rows of q that are in no sequence stay as they are
    turned = None if turning is None else torch.empty_like(turning) if turning.shape[0] > 1 else turning.clone()
    values = arguments(stored, new, k_new, v_new, turning, turned, q_rows, rotary)
    rows, heads = k_new.shape[2], k_new.shape[1]
    if turning is not None:
        rows, heads = max(rows, turning.shape[2]), heads + turning.shape[1]
    count = blocks(rows, BLOCK)         # of each sequence, at most
    if count * heads * len(new):
        flat = flatten(append_kernel, NOTHING, values | dict(blocks=count))
        start(entry(append_kernel, NOTHING), (len(new) * count, heads), flat, k_new.device, num_warps=WARPS, num_stages=1)
    return q if turned is None else turned


def arguments(stored: Stored, new: Tensor, k_new: Tensor, v_new: Tensor | None, q: Tensor | None, turned: Tensor | None,
              q_rows: Tensor | None, rotary: Rotary | None) -> dict[str, Any]:
    """What the kernel is told."""
    k, v = (x.view(torch.uint8) if x.dtype == FP8 else x for x in (stored.k, stored.v))
    half, positions = (0, 1) if rotary is None else (rotary.cos.shape[1], rotary.max_position)
    room, pages_row = (k.shape[2], 0) if stored.pages is None else (stored.pages.shape[1] * k.shape[2], stored.pages.stride(0))
    none = (0, 0, 0)
    return dict(
        K=k, V=v, PAGES=stored.pages, STORED=stored.rows, K_SCALE=stored.k_scale, V_SCALE=stored.v_scale, NEW=new, K_NEW=k_new,
        V_NEW=v_new, Q=q, Q_OUT=turned, Q_ROWS=q_rows, COS=None if rotary is None else rotary.cos.contiguous(),
        SIN=None if rotary is None else rotary.sin.contiguous(), k_strides=strides(k), v_strides=strides(v),
        k_new_strides=strides(k_new), v_new_strides=none if v_new is None else strides(v_new),
        q_strides=none if q is None else strides(q), q_out_strides=none if turned is None or q is None else strides(turned),
        kv_heads=k.shape[1], room=room, slots=k.shape[0], page_size=k.shape[2], pages_row=pages_row, positions=positions,
        INTERLEAVED=rotary is not None and rotary.interleaved, HALF=half, D=k.shape[3], DV=v.shape[3], BLOCK_M=BLOCK,
        BLOCK_D=padded(k.shape[3]), BLOCK_DV=padded(v.shape[3]), BLOCK_HALF=padded(max(1, half)))
