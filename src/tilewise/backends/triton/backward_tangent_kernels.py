"""The derivative of the backward pass in a direction of q, k, v, bias (`docs/derivatives.md`), dO being fixed.

    query_gradient_tangents    dQ', and dbias' where each head has its own       per block of queries
    key_gradient_tangents      dK', dV', summed over the heads of a group        per block of keys
    bias_gradient_tangent      dbias' where bias is shared                       per tile of it

Those of `backward_kernels.py`, which see, with tangents beside the inputs: deterministic, nothing of size N² kept. Legend as in
`tangent_kernel.py`; DELTA_TANGENT = rowsum(dO * O') like DELTA, DO like OUT, DQ like Q.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import masking
from tilewise.backends.gpu_math.places import place, sequence
from tilewise.backends.gpu_math.rows import load_rows_between, located, store_rows
from tilewise.backends.gpu_math.tangents import products, tile_gradient_tangents
from tilewise.backends.triton.backward_kernels import load_statistics, store_tile


@triton.jit
def load_tangents(LSE_TANGENT, DELTA_TANGENT, first, rows, nq):
    """lse' and delta' of a block of queries, 0 beyond the sequence."""
    return (tl.load(LSE_TANGENT + first + rows, mask=rows < nq, other=0.0),
            tl.load(DELTA_TANGENT + first + rows, mask=rows < nq, other=0.0))


@triton.jit
def query_gradient_tangents(
        Q, K, V, Q_TANGENT, K_TANGENT, V_TANGENT, BIAS, BIAS_TANGENT, RNG, LIST, DO, LSE, DELTA, LSE_TANGENT, DELTA_TANGENT, DQ,
        DBIAS, Q_ROWS, K_ROWS, WORK, q_strides, k_strides, v_strides, bias_strides, out_strides, dbias_strides, scale, heads,
        group, nq, nk, lse_rows, dropout, captured, ints, floats,
        SCORE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, SCORE_CURVATURE: tl.constexpr, MASK: tl.constexpr,
        KEYS: tl.constexpr, VISIT: tl.constexpr, BIAS_COLS: tl.constexpr, DBIAS_MODE: tl.constexpr, DROPOUT: tl.constexpr,
        RAW: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    b, h, h_kv, first_row = place(tl.program_id(0), WORK, tl.cdiv(nq, BLOCK_M), heads, group, BLOCK_M, True)
    blocks, longest = tl.cdiv(nq, BLOCK_M), nq
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = tl.maximum(b, 0)
    program = (captured, ints, floats)
    rows = first_row + tl.arange(0, BLOCK_M)
    K, V = located(K, k_strides, k_slot, h_kv, k_start), located(V, v_strides, k_slot, h_kv, k_start)
    K_TANGENT = located(K_TANGENT, k_strides, k_slot, h_kv, k_start)
    V_TANGENT = located(V_TANGENT, v_strides, k_slot, h_kv, k_start)
    Q, Q_TANGENT = located(Q, q_strides, q_slot, h, q_start), located(Q_TANGENT, q_strides, q_slot, h, q_start)
    DO = located(DO, out_strides, q_slot, h, q_start)
    statistics = (q_slot * heads + h).to(tl.int64) * lse_rows + q_start
    lse, delta = load_statistics(LSE, DELTA, statistics, rows, nq, NATURAL)
    lse_tangent, delta_tangent = load_tangents(LSE_TANGENT, DELTA_TANGENT, statistics, rows, nq)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    r = masking.visits(KEYS, VISIT, LIST, b, h, heads, rows, first_row // BLOCK_M, blocks, nq, nq, nk, nk, program, BLOCK_N)
    for MASKED in tl.static_range(2):
        for t in range(masking.count(r, MASKED, False)):
            first_col = masking.tile(r, t, LIST, VISIT, MASKED, False) * BLOCK_N
            cols = first_col + tl.arange(0, BLOCK_N)
            s, s_tangent = products(Q, Q_TANGENT, K, K_TANGENT, (q_strides[2], first_row, 0, nq),
                                    (k_strides[2], first_col, r[8], r[9]), BLOCK_M, BLOCK_N, D, BLOCK_D,
                                    True, MASKED, PRECISION)
            dp, dp_tangent = products(DO, None, V, V_TANGENT, (out_strides[2], first_row, 0, nq),
                                      (v_strides[2], first_col, r[8], r[9]), BLOCK_M, BLOCK_N, DV, BLOCK_DV,
                                      True, MASKED, PRECISION)
            _kept, ds_tangent, ds_raw, ds_raw_tangent = tile_gradient_tangents(
                s, s_tangent, dp, dp_tangent, lse[:, None], lse_tangent[:, None], delta[:, None], delta_tangent[:, None], scale,
                b, h, heads, rows[:, None], cols[None, :], first_col, nq, nk, BIAS, bias_strides, BIAS_TANGENT, RNG,
                dropout, program, SCORE, SCORE_GRADIENT, SCORE_CURVATURE, MASK, BIAS_COLS, DROPOUT, RAW, NATURAL, MASKED,
                BLOCK_N)
            k = load_rows_between(K, k_strides[2], first_col, r[8], r[9], BLOCK_N, D, BLOCK_D, MASKED)
            dq = tl.dot(ds_raw_tangent.to(k.dtype), k, dq, input_precision=PRECISION)
            k = load_rows_between(K_TANGENT, k_strides[2], first_col, r[8], r[9], BLOCK_N, D, BLOCK_D, MASKED)
            dq = tl.dot(ds_raw.to(k.dtype), k, dq, input_precision=PRECISION)
            if DBIAS_MODE == "direct":
                store_tile(DBIAS, dbias_strides, b, h, rows, cols, nq, nk, ds_tangent)
            if DBIAS_MODE == "over_cols":
                row_sum += tl.sum(ds_tangent, 1)
    if DBIAS_MODE == "over_cols":
        tl.store(DBIAS + (b * heads + h).to(tl.int64) * longest + rows, row_sum, mask=rows < nq)
    store_rows(located(DQ, q_strides, q_slot, h, q_start), q_strides[2], first_row, nq, dq * scale, BLOCK_M, D, BLOCK_D)


@triton.jit
def key_gradient_tangents(
        Q, K, V, Q_TANGENT, K_TANGENT, V_TANGENT, BIAS, BIAS_TANGENT, RNG, LIST, DO, LSE, DELTA, LSE_TANGENT, DELTA_TANGENT, DK,
        DV_, DBIAS, Q_ROWS, K_ROWS, WORK, q_strides, k_strides, v_strides, bias_strides, out_strides, scale, heads, group, nq,
        nk, lse_rows, dropout, captured, ints, floats,
        SCORE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, SCORE_CURVATURE: tl.constexpr, MASK: tl.constexpr,
        QUERIES: tl.constexpr, VISIT: tl.constexpr, BIAS_COLS: tl.constexpr, DBIAS_MODE: tl.constexpr, DROPOUT: tl.constexpr,
        RAW: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr, D: tl.constexpr,
        DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    """PART: " dk" or " dv"."""
    b, h_kv, _, first_col = place(tl.program_id(0), WORK, tl.cdiv(nk, BLOCK_N), heads // group, 1, BLOCK_N, False)
    blocks, longest = tl.cdiv(nk, BLOCK_N), nk
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = tl.maximum(b, 0)
    program = (captured, ints, floats)
    cols = first_col + tl.arange(0, BLOCK_N)
    K, V = located(K, k_strides, k_slot, h_kv, k_start), located(V, v_strides, k_slot, h_kv, k_start)
    K_TANGENT = located(K_TANGENT, k_strides, k_slot, h_kv, k_start)
    V_TANGENT = located(V_TANGENT, v_strides, k_slot, h_kv, k_start)
    total = tl.zeros([BLOCK_N, BLOCK_D if PART == " dk" else BLOCK_DV], tl.float32)
    for member in range(group):
        h = h_kv * group + member
        of_q, of_do = located(Q, q_strides, q_slot, h, q_start), located(DO, out_strides, q_slot, h, q_start)
        of_q_tangent = located(Q_TANGENT, q_strides, q_slot, h, q_start)
        statistics = (q_slot * heads + h).to(tl.int64) * lse_rows + q_start
        column_sum = tl.zeros([BLOCK_N], tl.float32)
        r = masking.visits(QUERIES, VISIT, LIST, b, h, heads, cols, first_col // BLOCK_N, blocks, nk, nq, nk, nq, program,
                           BLOCK_M)
        for MASKED in tl.static_range(2):
            for t in range(masking.count(r, MASKED, False)):
                first_row = masking.tile(r, t, LIST, VISIT, MASKED, False) * BLOCK_M
                rows = first_row + tl.arange(0, BLOCK_M)
                s, s_tangent = products(of_q, of_q_tangent, K, K_TANGENT, (q_strides[2], first_row, r[8], r[9]),
                                        (k_strides[2], first_col, 0, nk), BLOCK_M, BLOCK_N, D, BLOCK_D,
                                        MASKED, True, PRECISION)
                dp, dp_tangent = s, s
                if PART == " dk":
                    dp, dp_tangent = products(of_do, None, V, V_TANGENT, (out_strides[2], first_row, r[8], r[9]),
                                              (v_strides[2], first_col, 0, nk), BLOCK_M, BLOCK_N, DV,
                                              BLOCK_DV, MASKED, True, PRECISION)
                lse, delta = load_statistics(LSE, DELTA, statistics, rows, nq, NATURAL)
                lse_tangent, delta_tangent = load_tangents(LSE_TANGENT, DELTA_TANGENT, statistics, rows, nq)
                p_tangent, ds_tangent, ds_raw, ds_raw_tangent = tile_gradient_tangents(
                    s, s_tangent, dp, dp_tangent, lse[:, None], lse_tangent[:, None], delta[:, None], delta_tangent[:, None],
                    scale, b, h, heads, rows[:, None], cols[None, :], first_col, nq, nk, BIAS, bias_strides,
                    BIAS_TANGENT, RNG, dropout, program, SCORE, SCORE_GRADIENT, SCORE_CURVATURE, MASK, BIAS_COLS, DROPOUT, RAW,
                    NATURAL, MASKED, BLOCK_N)
                if PART == " dk":
                    q = load_rows_between(of_q, q_strides[2], first_row, r[8], r[9], BLOCK_M, D, BLOCK_D, MASKED)
                    total = tl.dot(tl.trans(ds_raw_tangent.to(q.dtype)), q, total, input_precision=PRECISION)
                    q = load_rows_between(of_q_tangent, q_strides[2], first_row, r[8], r[9], BLOCK_M, D, BLOCK_D, MASKED)
                    total = tl.dot(tl.trans(ds_raw.to(q.dtype)), q, total, input_precision=PRECISION)
                else:
                    do = load_rows_between(of_do, out_strides[2], first_row, r[8], r[9], BLOCK_M, DV, BLOCK_DV, MASKED)
                    total = tl.dot(tl.trans(p_tangent.to(do.dtype)), do, total, input_precision=PRECISION)
                if DBIAS_MODE == "over_rows":
                    column_sum += tl.sum(ds_tangent, 0)
        if DBIAS_MODE == "over_rows":
            tl.store(DBIAS + (b * heads + h).to(tl.int64) * longest + cols, column_sum, mask=cols < nk)
    if PART == " dk":
        DK = located(DK, k_strides, k_slot, h_kv, k_start)
        store_rows(DK, k_strides[2], first_col, nk, total * scale, BLOCK_N, D, BLOCK_D)
    else:
        if DROPOUT:
            total *= 65536.0 / (65536 - dropout)
        DV_ = located(DV_, v_strides, k_slot, h_kv, k_start)
        store_rows(DV_, v_strides[2], first_col, nk, total, BLOCK_N, DV, BLOCK_DV)


@triton.jit
def bias_gradient_tangent(
        Q, K, V, Q_TANGENT, K_TANGENT, V_TANGENT, BIAS, BIAS_TANGENT, RNG, DO, LSE, DELTA, LSE_TANGENT, DELTA_TANGENT, DBIAS,
        Q_ROWS, K_ROWS, q_strides, k_strides, v_strides, bias_strides, out_strides, dbias_strides, scale, heads, group, nq, nk,
        lse_rows, dropout, sum_batch, sum_heads, captured, ints, floats,
        SCORE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, VISIT: tl.constexpr,
        BIAS_COLS: tl.constexpr, DROPOUT: tl.constexpr, RAW: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_DV: tl.constexpr):
    """A tile of dbias', summed in fixed order over the sum_batch x sum_heads that share it."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(nq, BLOCK_M), tl.cdiv(nk, BLOCK_N)
    program = (captured, ints, floats)
    m, n = pid % (tiles_m * tiles_n) // tiles_n, pid % tiles_n
    own_heads = heads // sum_heads
    own_h, own_b = pid // (tiles_m * tiles_n) % own_heads, pid // (tiles_m * tiles_n) // own_heads
    rows, cols = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    longest_q, longest_k = nq, nk
    for t in tl.range(sum_batch * sum_heads):
        b, h = own_b * sum_batch + t // sum_heads, own_h * sum_heads + t % sum_heads
        q_slot, q_start, nq = sequence(Q_ROWS, b, longest_q)
        k_slot, k_start, nk = sequence(K_ROWS, b, longest_k)
        r = masking.visits(KEYS, VISIT, None, b, h, heads, rows, m, tiles_m, nq, nq, nk, nk, program, BLOCK_N)
        if (m * BLOCK_M < nq) & (((n >= r[0]) & (n < r[3])) | ((n >= r[4]) & (n < r[7]))):
            s, s_tangent = products(
                located(Q, q_strides, q_slot, h, q_start), located(Q_TANGENT, q_strides, q_slot, h, q_start),
                located(K, k_strides, k_slot, h // group, k_start), located(K_TANGENT, k_strides, k_slot, h // group, k_start),
                (q_strides[2], m * BLOCK_M, 0, nq), (k_strides[2], n * BLOCK_N, 0, nk), BLOCK_M, BLOCK_N, D,
                BLOCK_D, True, True, PRECISION)
            dp, dp_tangent = products(
                located(DO, out_strides, q_slot, h, q_start), None,
                located(V, v_strides, k_slot, h // group, k_start), located(V_TANGENT, v_strides, k_slot, h // group, k_start),
                (out_strides[2], m * BLOCK_M, 0, nq), (v_strides[2], n * BLOCK_N, 0, nk), BLOCK_M, BLOCK_N, DV,
                BLOCK_DV, True, True, PRECISION)
            statistics = (q_slot * heads + h).to(tl.int64) * lse_rows + q_start
            lse, delta = load_statistics(LSE, DELTA, statistics, rows, nq, NATURAL)
            lse_tangent, delta_tangent = load_tangents(LSE_TANGENT, DELTA_TANGENT, statistics, rows, nq)
            _kept, ds_tangent, _raw, _raw_tangent = tile_gradient_tangents(
                s, s_tangent, dp, dp_tangent, lse[:, None], lse_tangent[:, None], delta[:, None], delta_tangent[:, None], scale,
                b, h, heads, rows[:, None], cols[None, :], n * BLOCK_N, nq, nk, BIAS, bias_strides, BIAS_TANGENT,
                RNG, dropout, program, SCORE, SCORE_GRADIENT, None, MASK, BIAS_COLS, DROPOUT, RAW, NATURAL, True, BLOCK_N)
            total += ds_tangent
    store_tile(DBIAS, dbias_strides, own_b, own_h, rows, cols, longest_q, longest_k, total)
