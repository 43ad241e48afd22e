"""New keys and values into a cache, fused with rotary embedding of keys and queries: one launch, one pass over each.

The definition is `tilewise/kv_cache.write`. A program takes a block of tokens of one sequence and one head: of keys and values
for the first H_kv heads, then of queries.

Legend
    K_NEW [slots, H_kv, rows, D]  V_NEW [.., DV]  Q, Q_OUT [slots, H, rows, D]   NEW, Q_ROWS, STORED  [B, 3] (`places.sequence`)
    K, V    the cache [slots, H_kv, room, D], or [pages, H_kv, page_size, D] with PAGES [B, pages_row]; as bytes if in fp8
    COS, SIN  [positions, HALF], rows contiguous: tables of the first 2 HALF columns; HALF 0: no rotary
    room    keys that a sequence has memory for in its slot, or in its pages; slots: of K
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math.elementary import to_e4m3
from tilewise.backends.gpu_math.places import sequence
from tilewise.backends.gpu_math.rows import located, rows_from


@triton.jit
def append(K, V, PAGES, STORED, K_SCALE, V_SCALE, NEW, K_NEW, V_NEW, Q, Q_OUT, Q_ROWS, COS, SIN, k_strides, v_strides,
           k_new_strides, v_new_strides, q_strides, q_out_strides, kv_heads, room, slots, page_size, pages_row, blocks,
           positions, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_HALF: tl.constexpr):
    b, block, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    stored_slot, stored_start, stored = sequence(STORED, b, 0)
    slot, start, n = sequence(NEW, b, 0)
    limit = room - stored_start
    first = block * BLOCK_M
    token = first + tl.arange(0, BLOCK_M)
    if h < kv_heads:
        position = stored + token
        if PAGES is None:
            place, row = tl.zeros_like(token) + stored_slot, stored_start + position
            keep = (token < n) & (position < limit)
        else:
            keep = (token < n) & (position < room)
            place = tl.load(PAGES + b.to(tl.int64) * pages_row + position // page_size, mask=keep, other=0)
            row = position % page_size
        keep = keep & (place >= 0) & (place < slots)
        place, row = place.to(tl.int64)[:, None], row.to(tl.int64)[:, None]
        of_k = K + h.to(tl.int64) * k_strides[1] + (place * k_strides[0] + row * k_strides[2])
        source = rows_from(located(K_NEW, k_new_strides, slot, h, start), k_new_strides[2], first, BLOCK_M)
        turn(source, of_k, keep[:, None], position, COS, SIN, positions, K_SCALE, h, INTERLEAVED, HALF, D, BLOCK_D, BLOCK_HALF)
        if V_NEW is not None:
            of_v = V + h.to(tl.int64) * v_strides[1] + (place * v_strides[0] + row * v_strides[2])
            source = rows_from(located(V_NEW, v_new_strides, slot, h, start), v_new_strides[2], first, BLOCK_M)
            turn(source, of_v, keep[:, None], position, COS, SIN, positions, V_SCALE, h, INTERLEAVED, 0, DV, BLOCK_DV,
                 BLOCK_HALF)
    elif Q is not None:
        q_slot, q_start, nq = sequence(Q_ROWS, b, 0)
        position = tl.minimum(stored + n, limit if PAGES is None else room) - nq + token
        source = rows_from(located(Q, q_strides, q_slot, h - kv_heads, q_start), q_strides[2], first, BLOCK_M)
        target = rows_from(located(Q_OUT, q_out_strides, q_slot, h - kv_heads, q_start), q_out_strides[2], first, BLOCK_M)
        turn(source, target, (token < nq)[:, None], position, COS, SIN, positions, None, h, INTERLEAVED, HALF, D, BLOCK_D,
             BLOCK_HALF)


@triton.jit
def turn(source, target, keep, position, COS, SIN, positions, SCALE, h, INTERLEAVED: tl.constexpr, HALF: tl.constexpr,
         D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Copies rows, the first 2 HALF columns turned to their positions; source, target, keep: [ROWS, 1]."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    rest = keep & (dims >= 2 * HALF) & (dims < D)
    put(target + dims, tl.load(source + dims, mask=rest, other=0.0), rest, SCALE, h)
    if HALF > 0:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        known = keep & (pair < HALF)
        one = pair * 2 if INTERLEAVED else pair
        other = one + (1 if INTERLEAVED else HALF)
        a = tl.load(source + one, mask=known, other=0.0).to(tl.float32)
        b = tl.load(source + other, mask=known, other=0.0).to(tl.float32)
        angle = tl.minimum(tl.maximum(position, 0), positions - 1).to(tl.int64)[:, None] * HALF + pair
        cos = tl.load(COS + angle, mask=known, other=0.0).to(tl.float32)
        sin = tl.load(SIN + angle, mask=known, other=0.0).to(tl.float32)
        put(target + one, a * cos - b * sin, known, SCALE, h)
        put(target + other, a * sin + b * cos, known, SCALE, h)


@triton.jit
def put(pointers, x, keep, SCALE, h):
    """Stores x in the memory's type; in fp8, divided by the head's scale, saturating."""
    if SCALE is not None:
        x = x.to(tl.float32) / tl.load(SCALE + h)
        tl.store(pointers, to_e4m3(x), mask=keep)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=keep)
