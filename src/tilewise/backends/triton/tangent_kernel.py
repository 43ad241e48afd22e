"""Forward mode: the tangents of out and lse, one program per block of queries of one head (`docs/derivatives.md`).

With lse known it takes one pass and no online softmax: p = exp(s - lse), s' the tangent of a score,

    lse' = sum of p s' (+ the sink's share)      out' = sum of z p (s' v + v') - lse' out

Legend as in `forward_kernel.py`; Q_TANGENT has the strides of Q, and so on, LSE_TANGENT those of LSE.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import masking, softmax
from tilewise.backends.gpu_math.places import place, sequence
from tilewise.backends.gpu_math.rows import load_rows, load_rows_between, located, store_rows
from tilewise.backends.gpu_math.tangents import products, tile_tangents


@triton.jit
def tangent(Q, K, V, Q_TANGENT, K_TANGENT, V_TANGENT, BIAS, BIAS_TANGENT, SINKS, SINKS_TANGENT, RNG, LIST, OUT, LSE,
            OUT_TANGENT, LSE_TANGENT, Q_ROWS, K_ROWS, WORK, q_strides, k_strides, v_strides, bias_strides, out_strides, scale,
            heads, group, nq, nk, lse_rows, dropout, captured, ints, floats,
            SCORE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, VISIT: tl.constexpr,
            BIAS_COLS: tl.constexpr, HAS_SINKS: tl.constexpr, DROPOUT: tl.constexpr, RAW: tl.constexpr, NATURAL: tl.constexpr,
            PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    b, h, h_kv, first_row = place(tl.program_id(0), WORK, tl.cdiv(nq, BLOCK_M), heads, group, BLOCK_M, True)
    blocks = tl.cdiv(nq, BLOCK_M)
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = tl.maximum(b, 0)
    program = (captured, ints, floats)
    rows = first_row + tl.arange(0, BLOCK_M)
    K, V = located(K, k_strides, k_slot, h_kv, k_start), located(V, v_strides, k_slot, h_kv, k_start)
    K_TANGENT = located(K_TANGENT, k_strides, k_slot, h_kv, k_start)
    V_TANGENT = located(V_TANGENT, v_strides, k_slot, h_kv, k_start)
    Q, Q_TANGENT = located(Q, q_strides, q_slot, h, q_start), located(Q_TANGENT, q_strides, q_slot, h, q_start)
    statistics = (q_slot * heads + h).to(tl.int64) * lse_rows + q_start + rows
    lse_natural = tl.load(LSE + statistics, mask=rows < nq, other=float("-inf"))
    lse = softmax.subtrahend(lse_natural, NATURAL)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    lse_tangent = tl.zeros([BLOCK_M], tl.float32)
    r = masking.visits(KEYS, VISIT, LIST, b, h, heads, rows, first_row // BLOCK_M, blocks, nq, nq, nk, nk, program, BLOCK_N)
    for MASKED in tl.static_range(2):
        for t in range(masking.count(r, MASKED, False)):
            first_col = masking.tile(r, t, LIST, VISIT, MASKED, False) * BLOCK_N
            cols = first_col + tl.arange(0, BLOCK_N)
            s, s_tangent = products(Q, Q_TANGENT, K, K_TANGENT, (q_strides[2], first_row, 0, nq),
                                    (k_strides[2], first_col, r[8], r[9]), BLOCK_M, BLOCK_N, D, BLOCK_D,
                                    True, MASKED, PRECISION)
            weighted, kept, kept_weighted = tile_tangents(
                s, s_tangent, lse[:, None], scale, b, h, heads, rows[:, None], cols[None, :], first_col, nq, nk,
                BIAS, bias_strides, BIAS_TANGENT, RNG, dropout, program, SCORE, SCORE_GRADIENT, MASK, BIAS_COLS, DROPOUT, RAW,
                NATURAL, MASKED, BLOCK_N)
            lse_tangent += tl.sum(weighted, 1)
            v = load_rows_between(V, v_strides[2], first_col, r[8], r[9], BLOCK_N, DV, BLOCK_DV, MASKED)
            acc = tl.dot(kept_weighted.to(v.dtype), v, acc, input_precision=PRECISION)
            v = load_rows_between(V_TANGENT, v_strides[2], first_col, r[8], r[9], BLOCK_N, DV, BLOCK_DV, MASKED)
            acc = tl.dot(kept.to(v.dtype), v, acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= 65536.0 / (65536 - dropout)
    if HAS_SINKS:
        share = tl.exp2((tl.load(SINKS + h).to(tl.float32) - lse_natural) * softmax.LOG2E)
        lse_tangent += tl.where(rows < nq, share, 0.0) * tl.load(SINKS_TANGENT + h).to(tl.float32)
    out = load_rows(located(OUT, out_strides, q_slot, h, q_start), out_strides[2], first_row, nq, BLOCK_M, DV, BLOCK_DV)
    acc -= lse_tangent[:, None] * out.to(tl.float32)
    OUT_TANGENT = located(OUT_TANGENT, out_strides, q_slot, h, q_start)
    store_rows(OUT_TANGENT, out_strides[2], first_row, nq, acc, BLOCK_M, DV, BLOCK_DV)
    tl.store(LSE_TANGENT + statistics, lse_tangent, mask=rows < nq)
