"""FlashAttention-2, forward (Dao 2023, algorithm 1), and Flash-Decoding: one program per block of queries of one head.

Legend
    Q [slots, H, rows, D]  K [slots, H_kv, rows, D]  V [.., DV]  OUT like Q, DV  LSE [slots, H, lse_rows], contiguous
    Q_ROWS, K_ROWS  where the sequences lie (`places.sequence`); None: sequence b is slot b
    PAGES      [B, pages_row] pages of a paged cache, K and V being [pages, H_kv, page_size, D]; K_SCALE, V_SCALE of one in fp8
    *_strides  (slot or page, head, row); rows are contiguous   BLOCK_D, BLOCK_DV  D, DV rounded up to a power of two
    b, h, h_kv  sequence, query head, key head                  program  (captured, ints, floats) of mask and score graphs
    MAX_SCORE, ENTROPY  like LSE, sinks not counted; None: not wanted (`gpu_math/statistics.py`)
    lse is natural in memory; statistics inside are in base 2 unless NATURAL

FOLD: the queries of all heads of a group are the rows of one block, so that a key is read once for all of them; h then
differs from row to row. SHARED: V is the first DV columns of K, read once; BLOCK_D is for the other columns.
SPLIT: program_id(1) takes one of `splits` shares of the keys; OUT and LSE are parts in fp32, merged by `merge`. SPAN: keys are
taken in spans of so many tiles, merged in order, so that a row's bits do not depend on how the work is divided.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import masking, philox, scoring, softmax, statistics
from tilewise.backends.gpu_math.elementary import from_e4m3
from tilewise.backends.gpu_math.places import place, sequence
from tilewise.backends.gpu_math.rows import load_at, load_keys, located, store_at


@triton.jit
def forward(Q, K, V, BIAS, SINKS, RNG, LIST, OUT, LSE, MAX_SCORE, ENTROPY, Q_ROWS, K_ROWS, PAGES, WORK, K_SCALE, V_SCALE,
            q_strides, k_strides, v_strides, bias_strides, out_strides, scale, heads, group, nq, nk, lse_rows, page_size,
            pages_row, splits, out_split, lse_split, dropout, captured, ints, floats,
            SCORE: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, VISIT: tl.constexpr,
            BIAS_COLS: tl.constexpr, HAS_SINKS: tl.constexpr, DROPOUT: tl.constexpr, RAW: tl.constexpr, NATURAL: tl.constexpr,
            ASCENDING: tl.constexpr, FOLD: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr,
            CACHED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    if FOLD:
        b, h_kv, _, first = place(tl.program_id(0), WORK, tl.cdiv(nq * group, BLOCK_M), heads // group, 1, BLOCK_M, True)
        row = first + tl.arange(0, BLOCK_M)
        rows, h = row // group, h_kv * group + row % group                     # [BLOCK_M]
        head = h[:, None]
    else:
        b, h, h_kv, first = place(tl.program_id(0), WORK, tl.cdiv(nq, BLOCK_M), heads, group, BLOCK_M, True)
        rows = first + tl.arange(0, BLOCK_M)
        head = h
    blocks = tl.cdiv(nq, BLOCK_M)
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = tl.maximum(b, 0)
    program = (captured, ints, floats)
    if PAGES is not None:
        PAGES += b.to(tl.int64) * pages_row
        k_slot, k_start = 0 * b, 0
    if K_SCALE is not None:
        scale *= tl.load(K_SCALE + h_kv)
    K = located(K, k_strides, k_slot, h_kv, k_start)
    V = located(V, v_strides, k_slot, h_kv, k_start)
    if FOLD:
        Q = located(Q, q_strides, q_slot, h_kv * group, q_start)
        of_q = Q + (rows.to(tl.int64) * q_strides[2] + (row % group).to(tl.int64) * q_strides[1])[:, None]
    else:
        Q = located(Q, q_strides, q_slot, h, q_start)
        of_q = Q + first.to(tl.int64) * q_strides[2] + tl.arange(0, BLOCK_M)[:, None].to(tl.int64) * q_strides[2]
    live = (rows < nq)[:, None]
    q = load_at(of_q, live, DV if SHARED else D, BLOCK_DV if SHARED else BLOCK_D, True)   # [BLOCK_M, BLOCK_D]
    q_tail = load_at(of_q + DV, live, D - DV, BLOCK_D, True) if SHARED else q
    r = masking.visits(KEYS, VISIT, LIST, b, h, heads, rows, first // BLOCK_M, blocks, nq, nq, nk, nk, program, BLOCK_N)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    w_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    WEIGHTED: tl.constexpr = ENTROPY is not None
    if SPLIT or SPAN == 0:
        if SPLIT:
            r = masking.share(r, tl.program_id(1), splits, SPAN)
        m_i, l_i, w_i, acc = attend(
            r, q, q_tail, K, V, BIAS, RNG, LIST, PAGES, V_SCALE, k_strides, v_strides, bias_strides, scale, b, head, h_kv,
            heads, rows, nq, nk, page_size, dropout, program, SCORE, MASK, VISIT, BIAS_COLS, DROPOUT, RAW, NATURAL, ASCENDING,
            SHARED, CACHED, WEIGHTED, PRECISION, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)
        largest = m_i
    else:
        largest = m_i
        for span in range(r[0] // SPAN, tl.cdiv(tl.maximum(r[3], r[7]), SPAN)):
            m, l, w, part = attend(
                masking.share(r, span, splits, SPAN), q, q_tail, K, V, BIAS, RNG, LIST, PAGES, V_SCALE, k_strides, v_strides,
                bias_strides, scale, b, head, h_kv, heads, rows, nq, nk, page_size, dropout, program, SCORE, MASK, VISIT,
                BIAS_COLS, DROPOUT, RAW, NATURAL, ASCENDING, SHARED, CACHED, WEIGHTED, PRECISION, D, DV, BLOCK_M, BLOCK_N,
                BLOCK_D, BLOCK_DV)
            m_before, l_before, largest = m_i, l_i, tl.maximum(largest, m)
            part, lse = softmax.finalize(m, l, part, NATURAL)
            m_i, l_i, acc = softmax.merge(m_i, l_i, acc, part, lse, NATURAL)
            if WEIGHTED:
                w_i = statistics.weighted_part(w_i, m_before, l_before, m_i, w, l, m, NATURAL)
    if MAX_SCORE is not None or WEIGHTED:
        of_rows = (q_slot * heads + h).to(tl.int64) * lse_rows + q_start + rows
        if SPLIT:
            of_rows += tl.program_id(1).to(tl.int64) * lse_split
        if MAX_SCORE is not None:
            tl.store(MAX_SCORE + of_rows, statistics.natural(largest, NATURAL), mask=rows < nq)
        if WEIGHTED:
            tl.store(ENTROPY + of_rows, statistics.entropy(w_i, l_i, NATURAL), mask=rows < nq)
    if HAS_SINKS:
        m_i, l_i, acc = softmax.add_sink(m_i, l_i, acc, tl.load(SINKS + h).to(tl.float32), NATURAL)
    out, lse = softmax.finalize(m_i, l_i, acc, NATURAL)
    if SPLIT:
        OUT += tl.program_id(1).to(tl.int64) * out_split
        LSE += tl.program_id(1).to(tl.int64) * lse_split
    if FOLD:
        OUT = located(OUT, out_strides, q_slot, h_kv * group, q_start)
        of_out = OUT + (rows.to(tl.int64) * out_strides[2] + (row % group).to(tl.int64) * out_strides[1])[:, None]
    else:
        OUT = located(OUT, out_strides, q_slot, h, q_start)
        of_out = OUT + first.to(tl.int64) * out_strides[2] + tl.arange(0, BLOCK_M)[:, None].to(tl.int64) * out_strides[2]
    store_at(of_out, live, out, DV, BLOCK_DV)
    tl.store(LSE + (q_slot * heads + h).to(tl.int64) * lse_rows + q_start + rows, lse, mask=rows < nq)


@triton.jit
def attend(r, q, q_tail, K, V, BIAS, RNG, LIST, PAGES, V_SCALE, k_strides, v_strides, bias_strides, scale, b, h, h_kv, heads,
           rows, nq, nk, page_size, dropout, program, SCORE: tl.constexpr, MASK: tl.constexpr, VISIT: tl.constexpr,
           BIAS_COLS: tl.constexpr, DROPOUT: tl.constexpr, RAW: tl.constexpr, NATURAL: tl.constexpr, ASCENDING: tl.constexpr,
           SHARED: tl.constexpr, CACHED: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
           DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Statistics (m_i, l_i, w_i if WEIGHTED, acc) of a block of queries over the tiles that r names; K, V at the sequence's
    first row."""
    unit = softmax.LOG2E * (scale if RAW else 1.0)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    w_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for MASKED in tl.static_range(ASCENDING, 2):
        for t in range(masking.count(r, MASKED, ASCENDING)):
            first_col = masking.tile(r, t, LIST, VISIT, MASKED, ASCENDING) * BLOCK_N
            cols = first_col + tl.arange(0, BLOCK_N)
            if SHARED:
                k = load_keys(K, k_strides, PAGES, page_size, first_col, r[8], r[9], BLOCK_N, DV, BLOCK_DV, MASKED)
                tail = load_keys(K + DV, k_strides, PAGES, page_size, first_col, r[8], r[9], BLOCK_N, D - DV, BLOCK_D, MASKED)
                k, tail = wide(k, q.dtype), wide(tail, q.dtype)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                s = tl.dot(q_tail, tl.trans(tail), s, input_precision=PRECISION)
            else:
                k = load_keys(K, k_strides, PAGES, page_size, first_col, r[8], r[9], BLOCK_N, D, BLOCK_D, MASKED)
                s = tl.dot(q, tl.trans(wide(k, q.dtype)), input_precision=PRECISION)       # [BLOCK_M, BLOCK_N]
            s = scoring.finish(s, scale, b, h, rows[:, None], cols[None, :], nq, nk, BIAS, bias_strides, program,
                               SCORE, MASK, BIAS_COLS, RAW, MASKED)
            m_before, l_before = m_i, l_i
            m_i, l_i, acc, p = softmax.update(m_i, l_i, acc, s, unit, NATURAL)
            if WEIGHTED:
                w_i = statistics.weighted(w_i, m_before, l_before, m_i, p, NATURAL)
            if DROPOUT:
                drawn = rows + (nk - nq if CACHED else 0)
                groups = first_col // 8 + tl.arange(0, BLOCK_N // 8)
                kept = philox.keep(RNG, dropout, b, h, heads, drawn[:, None], groups[None, :], False)
                p = tl.where(kept, p, 0.0)
            if SHARED:
                v = k
            else:
                v = load_keys(V, v_strides, PAGES, page_size, first_col, r[8], r[9], BLOCK_N, DV, BLOCK_DV, MASKED)
                v = wide(v, q.dtype)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= 65536.0 / (65536 - dropout)
    if V_SCALE is not None:
        acc *= tl.load(V_SCALE + h_kv)
    return m_i, l_i, w_i, acc


@triton.jit
def wide(x, TYPE: tl.constexpr):
    """Keys or values as inputs of products: those stored in fp8 come as bytes."""
    if x.dtype == tl.uint8:
        return from_e4m3(x).to(TYPE)
    else:
        return x


@triton.jit
def merge(PARTS, PART_LSE, SINKS, OUT, LSE, out_strides, heads, nq, splits, out_split, lse_split, HAS_SINKS: tl.constexpr,
          NATURAL: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Flash-Decoding's second step: the parts [splits, slots, H, rows, DV] of a split merged in order (`tilewise/state.py`)."""
    slot, h, _, first = place(tl.program_id(0), None, tl.cdiv(nq, BLOCK_M), heads, 1, BLOCK_M, False)
    rows = first + tl.arange(0, BLOCK_M)
    of_rows = (slot * heads + h).to(tl.int64) * nq + rows
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for split in range(splits):
        lse = tl.load(PART_LSE + tl.cast(split, tl.int64) * lse_split + of_rows, mask=rows < nq, other=float("-inf"))
        of_part = PARTS + tl.cast(split, tl.int64) * out_split + (of_rows * DV)[:, None]
        part = load_at(of_part, (lse > float("-inf"))[:, None], DV, BLOCK_DV, True)
        m_i, l_i, acc = softmax.merge(m_i, l_i, acc, part, lse, NATURAL)
    if HAS_SINKS:
        m_i, l_i, acc = softmax.add_sink(m_i, l_i, acc, tl.load(SINKS + h).to(tl.float32), NATURAL)
    out, lse = softmax.finalize(m_i, l_i, acc, NATURAL)
    OUT = located(OUT, out_strides, slot, h, 0)
    store_at(OUT + (rows.to(tl.int64) * out_strides[2])[:, None], (rows < nq)[:, None], out, DV, BLOCK_DV)
    tl.store(LSE + of_rows, lse, mask=rows < nq)
