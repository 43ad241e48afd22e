"""FlashAttention-2, forward (Dao 2023, algorithm 1): one program per block of queries of one head.

Legend
    Q [B, H, S_q, D]  K [B, H_kv, S_k, D]  V [B, H_kv, S_k, DV]  OUT [B, H, S_q, DV]  LSE [B, H, S_q], contiguous
    *_strides  (batch, head, row); rows are contiguous          BLOCK_D, BLOCK_DV  D, DV rounded up to a power of two
    b, h, h_kv  sequence, query head, key head                  program  (captured, ints, floats) of mask and score graphs
    lse is natural in memory; statistics inside are in base 2 unless NATURAL
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import masking, philox, scoring, softmax
from tilewise.backends.triton.tiles import load_rows, load_rows_between, place, store_rows


@triton.jit
def forward(Q, K, V, BIAS, SINKS, RNG, LIST, OUT, LSE, q_strides, k_strides, v_strides, bias_strides, out_strides,
            scale, heads, group, nq, nk, dropout, captured, ints, floats,
            SCORE: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, VISIT: tl.constexpr,
            BIAS_COLS: tl.constexpr, HAS_SINKS: tl.constexpr, DROPOUT: tl.constexpr, RAW: tl.constexpr, NATURAL: tl.constexpr,
            ASCENDING: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    b, h, h_kv, first_row = place(tl.program_id(0), tl.cdiv(nq, BLOCK_M), heads, group, BLOCK_M, True)
    program = (captured, ints, floats)
    rows = first_row + tl.arange(0, BLOCK_M)
    q = load_rows(Q, q_strides, b, h, first_row, nq, BLOCK_M, D, BLOCK_D)      # [BLOCK_M, BLOCK_D]
    unit = softmax.LOG2E * (scale if RAW else 1.0)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    r = masking.visits(KEYS, VISIT, LIST, b, h, heads, rows, first_row // BLOCK_M, nq, nq, nk, nk, program, BLOCK_N)
    for MASKED in tl.static_range(ASCENDING, 2):
        for t in range(masking.count(r, MASKED, ASCENDING)):
            first_col = masking.tile(r, t, LIST, VISIT, MASKED, ASCENDING) * BLOCK_N
            cols = first_col + tl.arange(0, BLOCK_N)
            k = load_rows_between(K, k_strides, b, h_kv, first_col, r[8], r[9], BLOCK_N, D, BLOCK_D, MASKED)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)              # [BLOCK_M, BLOCK_N]
            s = scoring.finish(s, scale, b, h, rows[:, None], cols[None, :], nq, nk, BIAS, bias_strides, program,
                               SCORE, MASK, BIAS_COLS, RAW, MASKED)
            m_i, l_i, acc, p = softmax.update(m_i, l_i, acc, s, unit, NATURAL)
            if DROPOUT:
                kept = philox.keep(RNG, dropout, b, h, heads, first_row, first_col, BLOCK_M, BLOCK_N, False)
                p = tl.where(kept, p, 0.0)
            v = load_rows_between(V, v_strides, b, h_kv, first_col, r[8], r[9], BLOCK_N, DV, BLOCK_DV, MASKED)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    if HAS_SINKS:
        m_i, l_i, acc = softmax.add_sink(m_i, l_i, acc, tl.load(SINKS + h).to(tl.float32), NATURAL)
    if DROPOUT:
        acc *= 65536.0 / (65536 - dropout)
    out, lse = softmax.finalize(m_i, l_i, acc, NATURAL)
    store_rows(OUT, out_strides, b, h, first_row, nq, out, BLOCK_M, DV, BLOCK_DV)
    tl.store(LSE + (b * heads + h).to(tl.int64) * nq + rows, lse, mask=rows < nq)
