"""The probabilities of each key summed over all queries, given lse: the backward's walk over queries with no dO and no V.

One program per block of keys of one key head, whose queries of all heads of the group walk past it: each sum is one program's,
taken in one order. Legend as in `forward_kernel.py`; MASS [slots, H, mass_rows] fp32, contiguous; of a cache, sequence b's
keys are row b from its first key on.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import masking
from tilewise.backends.gpu_math.gradients import probabilities
from tilewise.backends.gpu_math.places import place, sequence
from tilewise.backends.gpu_math.rows import load_keys, load_rows_between, located
from tilewise.backends.gpu_math.softmax import subtrahend
from tilewise.backends.triton.forward_kernel import wide


@triton.jit
def key_mass(Q, K, BIAS, LIST, LSE, MASS, Q_ROWS, K_ROWS, PAGES, WORK, K_SCALE, q_strides, k_strides, bias_strides, scale,
             heads, group, nq, nk, lse_rows, mass_rows, page_size, pages_row, captured, ints, floats,
             SCORE: tl.constexpr, MASK: tl.constexpr, QUERIES: tl.constexpr, VISIT: tl.constexpr, BIAS_COLS: tl.constexpr,
             RAW: tl.constexpr, NATURAL: tl.constexpr, SHARED: tl.constexpr, CACHED: tl.constexpr, PRECISION: tl.constexpr,
             D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_DV: tl.constexpr):
    b, h_kv, _, first_col = place(tl.program_id(0), WORK, tl.cdiv(nk, BLOCK_N), heads // group, 1, BLOCK_N, False)
    blocks = tl.cdiv(nk, BLOCK_N)
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = tl.maximum(b, 0)
    program = (captured, ints, floats)
    if CACHED:
        MASS += b.to(tl.int64) * heads * mass_rows
    else:
        MASS += k_slot.to(tl.int64) * heads * mass_rows + k_start
    if PAGES is not None:
        PAGES += b.to(tl.int64) * pages_row
        k_slot, k_start = 0 * b, 0
    if K_SCALE is not None:
        scale *= tl.load(K_SCALE + h_kv)
    cols = first_col + tl.arange(0, BLOCK_N)
    K = located(K, k_strides, k_slot, h_kv, k_start)
    if SHARED:
        k = load_keys(K, k_strides, PAGES, page_size, first_col, 0, nk, BLOCK_N, DV, BLOCK_DV, True)
        tail = load_keys(K + DV, k_strides, PAGES, page_size, first_col, 0, nk, BLOCK_N, D - DV, BLOCK_D, True)
        k, tail = wide(k, Q.dtype.element_ty), wide(tail, Q.dtype.element_ty)
    else:
        k = wide(load_keys(K, k_strides, PAGES, page_size, first_col, 0, nk, BLOCK_N, D, BLOCK_D, True), Q.dtype.element_ty)
    for member in range(group):
        h = h_kv * group + member
        of_q = located(Q, q_strides, q_slot, h, q_start)
        of_lse = LSE + (q_slot * heads + h).to(tl.int64) * lse_rows + q_start
        mass = tl.zeros([BLOCK_N], tl.float32)
        r = masking.visits(QUERIES, VISIT, LIST, b, h, heads, cols, first_col // BLOCK_N, blocks, nk, nq, nk, nq, program,
                           BLOCK_M)
        for MASKED in tl.static_range(2):
            for t in range(masking.count(r, MASKED, False)):
                first_row = masking.tile(r, t, LIST, VISIT, MASKED, False) * BLOCK_M
                rows = first_row + tl.arange(0, BLOCK_M)
                if SHARED:
                    q = load_rows_between(of_q, q_strides[2], first_row, r[8], r[9], BLOCK_M, DV, BLOCK_DV, MASKED)
                    q_tail = load_rows_between(of_q + DV, q_strides[2], first_row, r[8], r[9], BLOCK_M, D - DV, BLOCK_D, MASKED)
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)                   # [BLOCK_N, BLOCK_M]
                    s = tl.dot(tail, tl.trans(q_tail), s, input_precision=PRECISION)
                else:
                    q = load_rows_between(of_q, q_strides[2], first_row, r[8], r[9], BLOCK_M, D, BLOCK_D, MASKED)
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                lse = subtrahend(tl.load(of_lse + rows, mask=rows < nq, other=float("inf")), NATURAL)
                p = probabilities(s, lse[None, :], scale, b, h, rows[None, :], cols[:, None], nq, nk, BIAS, bias_strides,
                                  program, SCORE, MASK, BIAS_COLS, RAW, NATURAL, MASKED)
                mass += tl.sum(p, 1)
        tl.store(MASS + h.to(tl.int64) * mass_rows + cols, mass, mask=cols < nk)
