"""FlashAttention-2, backward (Dao 2023, algorithm 2), deterministic by construction: no atomic adds.

    preprocess        delta (`gpu_math/preprocess.py`)                              per block of queries
    key_gradients     dK, dV, summed over the heads of a group                       per block of keys
    query_gradients   dQ                                                             per block of queries
    summed_gradient   dbias where bias is shared, gradients of captured tensors      see there

Probabilities are recomputed from q, k and lse. The paper adds dQ atomically from the key loop; a second kernel costs two
more products and always gives the same bits. Legend as in `forward_kernel.py`; LSE, DELTA [B, H, S_q] fp32 contiguous.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import masking, softmax
from tilewise.backends.gpu_math.gradients import tile_gradients
from tilewise.backends.gpu_math.places import place, sequence
from tilewise.backends.gpu_math.rows import load_rows, load_rows_between, located, store_rows


@triton.jit
def load_statistics(LSE, DELTA, first, rows, nq, NATURAL: tl.constexpr):
    """lse as subtracted and delta of a block of queries [BLOCK_M]; beyond the sequence +inf and 0: p is 0 there.

    first: of the sequence's and head's.
    """
    offsets = first + rows
    lse = softmax.subtrahend(tl.load(LSE + offsets, mask=rows < nq, other=float("inf")), NATURAL)
    return lse, tl.load(DELTA + offsets, mask=rows < nq, other=0.0)


@triton.jit
def key_gradients(Q, K, V, BIAS, RNG, LIST, DO, LSE, DELTA, DK, DV_, DBIAS, Q_ROWS, K_ROWS, WORK, q_strides, k_strides,
                  v_strides, bias_strides, do_strides, dk_strides, dv_strides, scale, heads, group, nq, nk, lse_rows, dropout,
                  captured, ints, floats,
                  SCORE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, MASK: tl.constexpr, QUERIES: tl.constexpr,
                  VISIT: tl.constexpr, BIAS_COLS: tl.constexpr, DBIAS_MODE: tl.constexpr, DROPOUT: tl.constexpr,
                  RAW: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
                  D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_DV: tl.constexpr):
    """PART: " dk", " dv" or "" for both. Where the two accumulators do not fit into registers together, a pass for each."""
    b, h_kv, _, first_col = place(tl.program_id(0), WORK, tl.cdiv(nk, BLOCK_N), heads // group, 1, BLOCK_N, False)
    blocks, longest = tl.cdiv(nk, BLOCK_N), nk
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = tl.maximum(b, 0)
    program = (captured, ints, floats)
    cols = first_col + tl.arange(0, BLOCK_N)
    K, V = located(K, k_strides, k_slot, h_kv, k_start), located(V, v_strides, k_slot, h_kv, k_start)
    k = load_rows(K, k_strides[2], first_col, nk, BLOCK_N, D, BLOCK_D)         # [BLOCK_N, BLOCK_D]
    v = load_rows(V, v_strides[2], first_col, nk, BLOCK_N, DV, BLOCK_DV)       # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        h = h_kv * group + member
        of_q, of_do = located(Q, q_strides, q_slot, h, q_start), located(DO, do_strides, q_slot, h, q_start)
        statistics = (q_slot * heads + h).to(tl.int64) * lse_rows + q_start
        column_sum = tl.zeros([BLOCK_N], tl.float32)
        r = masking.visits(QUERIES, VISIT, LIST, b, h, heads, cols, first_col // BLOCK_N, blocks, nk, nq, nk, nq, program,
                           BLOCK_M)
        for MASKED in tl.static_range(2):
            for t in range(masking.count(r, MASKED, False)):
                first_row = masking.tile(r, t, LIST, VISIT, MASKED, False) * BLOCK_M
                rows = first_row + tl.arange(0, BLOCK_M)
                q = load_rows_between(of_q, q_strides[2], first_row, r[8], r[9], BLOCK_M, D, BLOCK_D, MASKED)
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)          # [BLOCK_N, BLOCK_M]
                do = load_rows_between(of_do, do_strides[2], first_row, r[8], r[9], BLOCK_M, DV, BLOCK_DV, MASKED)
                dp = s if PART == " dv" else tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                lse, delta = load_statistics(LSE, DELTA, statistics, rows, nq, NATURAL)
                p, ds, ds_raw = tile_gradients(
                    s, dp, lse[None, :], delta[None, :], scale, b, h, heads, rows[None, :], cols[:, None], first_col, nq, nk,
                    BIAS, bias_strides, RNG, dropout, program, SCORE, SCORE_GRADIENT, MASK, BIAS_COLS,
                    DROPOUT, RAW, NATURAL, MASKED, BLOCK_N, True)
                if PART != " dk":
                    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                if PART != " dv":
                    dk = tl.dot(ds_raw.to(q.dtype), q, dk, input_precision=PRECISION)
                if DBIAS_MODE == "over_rows":
                    column_sum += tl.sum(ds, 1)
        if DBIAS_MODE == "over_rows":
            tl.store(DBIAS + (b * heads + h).to(tl.int64) * longest + cols, column_sum, mask=cols < nk)
    if PART != " dv":
        DK = located(DK, dk_strides, k_slot, h_kv, k_start)
        store_rows(DK, dk_strides[2], first_col, nk, dk * scale, BLOCK_N, D, BLOCK_D)
    if PART != " dk":
        if DROPOUT:
            dv *= 65536.0 / (65536 - dropout)
        DV_ = located(DV_, dv_strides, k_slot, h_kv, k_start)
        store_rows(DV_, dv_strides[2], first_col, nk, dv, BLOCK_N, DV, BLOCK_DV)


@triton.jit
def query_gradients(Q, K, V, BIAS, RNG, LIST, DO, LSE, DELTA, DQ, DBIAS, Q_ROWS, K_ROWS, WORK, q_strides, k_strides, v_strides,
                    bias_strides, do_strides, dq_strides, dbias_strides, scale, heads, group, nq, nk, lse_rows, dropout,
                    captured, ints, floats,
                    SCORE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr,
                    VISIT: tl.constexpr, BIAS_COLS: tl.constexpr, DBIAS_MODE: tl.constexpr, DROPOUT: tl.constexpr,
                    RAW: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    b, h, h_kv, first_row = place(tl.program_id(0), WORK, tl.cdiv(nq, BLOCK_M), heads, group, BLOCK_M, True)
    blocks, longest = tl.cdiv(nq, BLOCK_M), nq
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = tl.maximum(b, 0)
    program = (captured, ints, floats)
    rows = first_row + tl.arange(0, BLOCK_M)
    Q, DO = located(Q, q_strides, q_slot, h, q_start), located(DO, do_strides, q_slot, h, q_start)
    K, V = located(K, k_strides, k_slot, h_kv, k_start), located(V, v_strides, k_slot, h_kv, k_start)
    q = load_rows(Q, q_strides[2], first_row, nq, BLOCK_M, D, BLOCK_D)         # [BLOCK_M, BLOCK_D]
    do = load_rows(DO, do_strides[2], first_row, nq, BLOCK_M, DV, BLOCK_DV)    # [BLOCK_M, BLOCK_DV]
    statistics = (q_slot * heads + h).to(tl.int64) * lse_rows + q_start
    lse, delta = load_statistics(LSE, DELTA, statistics, rows, nq, NATURAL)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    r = masking.visits(KEYS, VISIT, LIST, b, h, heads, rows, first_row // BLOCK_M, blocks, nq, nq, nk, nk, program, BLOCK_N)
    for MASKED in tl.static_range(2):
        for t in range(masking.count(r, MASKED, False)):
            first_col = masking.tile(r, t, LIST, VISIT, MASKED, False) * BLOCK_N
            cols = first_col + tl.arange(0, BLOCK_N)
            k = load_rows_between(K, k_strides[2], first_col, r[8], r[9], BLOCK_N, D, BLOCK_D, MASKED)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)              # [BLOCK_M, BLOCK_N]
            v = load_rows_between(V, v_strides[2], first_col, r[8], r[9], BLOCK_N, DV, BLOCK_DV, MASKED)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)            # [BLOCK_M, BLOCK_N]
            _kept, ds, ds_raw = tile_gradients(
                s, dp, lse[:, None], delta[:, None], scale, b, h, heads, rows[:, None], cols[None, :], first_col, nq, nk,
                BIAS, bias_strides, RNG, dropout, program, SCORE, SCORE_GRADIENT, MASK, BIAS_COLS, DROPOUT,
                RAW, NATURAL, MASKED, BLOCK_N, False)
            dq = tl.dot(ds_raw.to(k.dtype), k, dq, input_precision=PRECISION)
            if DBIAS_MODE == "direct":
                store_tile(DBIAS, dbias_strides, b, h, rows, cols, nq, nk, ds)
            if DBIAS_MODE == "over_cols":
                row_sum += tl.sum(ds, 1)
    if DBIAS_MODE == "over_cols":
        tl.store(DBIAS + (b * heads + h).to(tl.int64) * longest + rows, row_sum, mask=rows < nq)
    store_rows(located(DQ, dq_strides, q_slot, h, q_start), dq_strides[2], first_row, nq, dq * scale, BLOCK_M, D, BLOCK_D)


@triton.jit
def store_tile(X, strides, b, h, rows, cols, nq, nk, x):
    """Stores a tile of a matrix per sequence and head; strides: (batch, head, row), columns contiguous."""
    base = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    pointers = X + base + rows[:, None].to(tl.int64) * strides[2] + cols[None, :]
    tl.store(pointers, x.to(X.dtype.element_ty), mask=(rows[:, None] < nq) & (cols[None, :] < nk))


@triton.jit
def summed_gradient(Q, K, V, BIAS, RNG, DO, LSE, DELTA, SUMS, SCALE, Q_ROWS, K_ROWS, q_strides, k_strides, v_strides,
                    bias_strides, do_strides, sums_bias_strides, scale, heads, group, nq, nk, lse_rows, dropout, sum_batch,
                    sum_heads, captured, ints, floats,
                    SCORE: tl.constexpr, FACTOR: tl.constexpr, PLACE: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr,
                    VISIT: tl.constexpr, PATTERN: tl.constexpr, BIAS_COLS: tl.constexpr, DROPOUT: tl.constexpr,
                    RAW: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Sums, in fixed order, of the terms dS * factor of a gradient: of a bias, or of a captured tensor (`trace/learned.py`).

    PATTERN       a program                               takes tiles                    and stores
    "direct"      a tile of the matrix                    of sum_batch x sum_heads       the tile of sums
    "rows"        a block of queries of one head          of all keys                    sums over keys      [B, H, S_q]
    "cols"        a block of keys of one head             of all queries                 sums over queries   [B, H, S_k]
    "diagonal"    an offset of tiles from the diagonal    along the diagonal             the tile of sums    [B, H, offsets, ..]
    "largest"     a block of queries of one head          of all keys                    maxima of |term|    [B, H, S_q]
    "any"         a block of queries of one head          of all keys                    term * SCALE, rounded, added to entries

    The last adds integers, whose sum does not depend on their order.
    """
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(nq, BLOCK_M), tl.cdiv(nk, BLOCK_N)
    program = (captured, ints, floats)
    if PATTERN == "direct":
        per_head, count = tiles_m * tiles_n, sum_batch * sum_heads
    elif PATTERN == "cols":
        per_head, count = tiles_n, tiles_m
    elif PATTERN == "diagonal":
        per_head, count = offsets(tiles_m, tiles_n, BLOCK_M, BLOCK_N), tl.maximum(tiles_m, tiles_n)
    else:
        per_head, count = tiles_m, tiles_n
    first = pid % per_head
    own_heads = heads // sum_heads
    own_h, own_b = pid // per_head % own_heads, pid // per_head // own_heads
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    longest_q, longest_k = nq, nk
    for t in tl.range(count):
        b, h = own_b, own_h
        if PATTERN == "direct":
            b, h = own_b * sum_batch + t // sum_heads, own_h * sum_heads + t % sum_heads
            m, n = first // tiles_n, first % tiles_n
        elif PATTERN == "cols":
            m, n = t, first
        elif PATTERN == "diagonal":
            m, n = on_diagonal(first, t, tiles_n, BLOCK_M, BLOCK_N)
        else:
            m, n = first, t
        rows, cols = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
        q_slot, q_start, nq = sequence(Q_ROWS, b, longest_q)
        k_slot, k_start, nk = sequence(K_ROWS, b, longest_k)
        if (m >= 0) & (m * BLOCK_M < nq) & (n >= 0) & (n * BLOCK_N < nk):
            r = masking.visits(KEYS, VISIT, None, b, h, heads, rows, m, tiles_m, nq, nq, nk, nk, program, BLOCK_N)
            if ((n >= r[0]) & (n < r[3])) | ((n >= r[4]) & (n < r[7])):
                of_k = located(K, k_strides, k_slot, h // group, k_start)
                of_v = located(V, v_strides, k_slot, h // group, k_start)
                of_q, of_do = located(Q, q_strides, q_slot, h, q_start), located(DO, do_strides, q_slot, h, q_start)
                q = load_rows(of_q, q_strides[2], m * BLOCK_M, nq, BLOCK_M, D, BLOCK_D)
                k = load_rows(of_k, k_strides[2], n * BLOCK_N, nk, BLOCK_N, D, BLOCK_D)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                do = load_rows(of_do, do_strides[2], m * BLOCK_M, nq, BLOCK_M, DV, BLOCK_DV)
                v = load_rows(of_v, v_strides[2], n * BLOCK_N, nk, BLOCK_N, DV, BLOCK_DV)
                statistics = (q_slot * heads + h).to(tl.int64) * lse_rows + q_start
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                lse, delta = load_statistics(LSE, DELTA, statistics, rows, nq, NATURAL)
                _kept, _ds, terms = tile_gradients(
                    s, dp, lse[:, None], delta[:, None], scale, b, h, heads, rows[:, None], cols[None, :], n * BLOCK_N, nq, nk,
                    BIAS, bias_strides, RNG, dropout, program, SCORE, FACTOR, MASK, BIAS_COLS, DROPOUT,
                    RAW, NATURAL, True, BLOCK_N, False)
                if PATTERN == "any":
                    place = PLACE(b, h, tl.minimum(rows, nq - 1)[:, None], tl.minimum(cols, nk - 1)[None, :], nq, nk, captured,
                                  ints, floats)
                    fixed = tl.floor(terms * tl.load(SCALE) + 0.5).to(tl.int64)
                    places = SUMS + place + tl.zeros([BLOCK_M, BLOCK_N], tl.int64)
                    tl.atomic_add(places, fixed, mask=terms != 0.0, sem="relaxed")
                elif PATTERN == "largest":
                    total = tl.maximum(total, tl.abs(terms))
                else:
                    total += terms
    if PATTERN == "direct":
        store_tile(SUMS, sums_bias_strides, own_b, own_h, first // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M),
                   first % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N), longest_q, longest_k, total)
    elif PATTERN == "cols":
        cols = first * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(SUMS + (pid // per_head).to(tl.int64) * longest_k + cols, tl.sum(total, 0), mask=cols < longest_k)
    elif PATTERN == "diagonal":
        inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(SUMS + pid.to(tl.int64) * (BLOCK_M * BLOCK_N) + inside, total)
    elif PATTERN != "any":
        rows = first * BLOCK_M + tl.arange(0, BLOCK_M)
        reduced = tl.max(total, 1) if PATTERN == "largest" else tl.sum(total, 1)
        tl.store(SUMS + (pid // per_head).to(tl.int64) * longest_q + rows, reduced, mask=rows < longest_q)


@triton.jit
def offsets(tiles_m, tiles_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many distances from the diagonal tiles have, in units of the smaller side."""
    if BLOCK_N >= BLOCK_M:
        return tiles_m + (tiles_n - 1) * (BLOCK_N // BLOCK_M)
    else:
        return (tiles_m - 1) * (BLOCK_M // BLOCK_N) + tiles_n


@triton.jit
def on_diagonal(offset, t, tiles_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The t-th tile at an offset, which counts from the last keys of the first queries; maybe outside the matrix."""
    if BLOCK_N >= BLOCK_M:
        return offset - (tiles_n - 1 - t) * (BLOCK_N // BLOCK_M), t
    else:
        return t, t * (BLOCK_M // BLOCK_N) + tiles_n - 1 - offset
