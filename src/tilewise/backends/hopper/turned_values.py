"""Values as fp8 products read them: transposed, each head's columns one after another, keys in the order of `narrow.key_at`.

A sequence's keys begin at a multiple of BLOCK_N columns, and the columns behind its last key, to the next multiple, are 0.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math.places import place, sequence
from tilewise.backends.hopper.narrow import key_at


@triton.jit
def first_column(b, start, PACKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where sequence b, whose keys begin at row `start`, begins; in every slot at 0 unless PACKED."""
    return (start // BLOCK_N + b) * BLOCK_N if PACKED else 0


@triton.jit
def turn_values(V, TURNED, K_ROWS, WORK, v_strides, turned_strides, heads, nk, columns, DV: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr):
    """V [slots, heads, rows, DV] of bytes -> TURNED [slots, heads, DV, columns]. A program for BLOCK_N keys of a head."""
    b, h, _, first = place(tl.program_id(0), WORK, tl.cdiv(nk, BLOCK_N), heads, 1, BLOCK_N, False)
    slot, start, nk = sequence(K_ROWS, b, nk)
    at = tl.arange(0, BLOCK_N)
    keys, dims = first + key_at(at), tl.arange(0, BLOCK_DV)
    of_head = V + slot.to(tl.int64) * v_strides[0] + h.to(tl.int64) * v_strides[1]
    rows = of_head + ((start + keys).to(tl.int64) * v_strides[2])[:, None]
    v = tl.load(rows + dims[None, :], mask=(keys < nk)[:, None] & (dims < DV)[None, :], other=0)
    to = first_column(b, start, WORK is not None, BLOCK_N) + first + at
    of_dims = TURNED + slot.to(tl.int64) * turned_strides[0] + h.to(tl.int64) * turned_strides[1] + (
        dims.to(tl.int64) * turned_strides[2])[:, None]
    tl.store(of_dims + to[None, :], tl.trans(v), mask=(dims < DV)[:, None] & ((to < columns) & (b >= 0))[None, :])
