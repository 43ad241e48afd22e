"""FlashAttention (Dao et al. 2022), Algorithms 2, 4 and 5 as kernels: one program per head of a sequence, as the paper's first
CUDA kernels were, which walks along keys outside and queries inside.

Legend
    Q [B, H, S_q, D]  K [B, H, S_k, D]  V [B, H, S_k, DV]  O like Q, DV; all contiguous: the paper's N x d matrices
    l, m        [B, H, S_q] fp32; O is fp32 too in the forward, while it is not finished
    dO, dQ, dK, dV  gradients, dQ in fp32
    M           [B or 1, H or 1, Tr, Tc] uint8: EMPTY 0, PARTIAL 1, FULL 2 (`blocks.block_form`); PER_BATCH, PER_HEAD: not 1
    program     (captured, ints, floats) of the mask's graph
    BR, BC      Br and Bc of the paper; BLOCK_D, BLOCK_DV  D, DV rounded up to a power of two

Numbers in comments are lines of Algorithm 2 in the forward, of Algorithm 4 in the backward. Every load and store of slow memory
stands in these two kernels, except what a mask's graph looks up and the three numbers that dropout's bits begin with.

A block of O, l, m or dQ that one turn of the outer loop stores is loaded in the next by other threads of the same program:
hence the barrier.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import gradients, philox, scoring, softmax
from tilewise.backends.gpu_math.rows import load_rows, store_rows

EMPTY, PARTIAL, FULL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def forward(Q, K, V, O, l, m, M, RNG, scale, heads, nq, nk, dropout, captured, ints, floats, MASK: tl.constexpr,
            PER_BATCH: tl.constexpr, PER_HEAD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
            DV: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    """O, l, m; they hold 0, 0 and -inf before (line 3)."""
    b, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    q_row, k_row = tl.program_id(0).to(tl.int64) * nq, tl.program_id(0).to(tl.int64) * nk
    program = (captured, ints, floats)
    Q, K, V, O = Q + q_row * D, K + k_row * D, V + k_row * DV, O + q_row * DV
    l, m = l + q_row, m + q_row
    Tr, Tc = tl.cdiv(nq, BR), tl.cdiv(nk, BC)                                  # 2, 4, 5
    for j in tl.range(Tc):                                                     # 6
        cols = j * BC + tl.arange(0, BC)[None, :]
        k_j = load_rows(K, D, j * BC, nk, BC, D, BLOCK_D)                      # 7   [BC, BLOCK_D]
        v_j = load_rows(V, DV, j * BC, nk, BC, DV, BLOCK_DV)                   #     [BC, BLOCK_DV]
        for i in tl.range(Tr):                                                 # 8
            shown = FULL if MASK is None else tl.load(M + block(b, h, i, j, heads, Tr, Tc, PER_BATCH, PER_HEAD))
            if shown != EMPTY:                                                 # Algorithm 5, 9
                rows = i * BR + tl.arange(0, BR)
                q_i = load_rows(Q, D, i * BR, nq, BR, D, BLOCK_D)              # 9   [BR, BLOCK_D]
                o_i = load_rows(O, DV, i * BR, nq, BR, DV, BLOCK_DV)           #     [BR, BLOCK_DV]
                l_i = tl.load(l + rows, mask=rows < nq, other=0.0)             #     [BR]
                m_i = tl.load(m + rows, mask=rows < nq, other=float("-inf"))
                s = tl.dot(q_i, tl.trans(k_j), input_precision=PRECISION) * scale              # 10  [BR, BC]
                s = masked(s, b, h, rows[:, None], cols, nq, nk, program, shown, MASK)         # 11
                m_ij = tl.max(s, 1)                                            # 12
                p = softmax.exponential(s, softmax.finite_or_zero(m_ij)[:, None], 1.0, True)
                l_ij = tl.sum(p, 1)
                m_new = tl.maximum(m_i, m_ij)                                  # 13
                pivot = softmax.finite_or_zero(m_new)
                old, new = softmax.ratio(m_i, pivot, True), softmax.ratio(m_ij, pivot, True)
                l_new = old * l_i + new * l_ij
                if DROPOUT:                                                    # 14
                    groups = j * (BC // 8) + tl.arange(0, BC // 8)[None, :]
                    kept = philox.keep(RNG, dropout, b, h, heads, rows[:, None], groups, False)
                    p = tl.where(kept, p * (65536.0 / (65536 - dropout)), 0.0)
                pv = tl.dot(p.to(v_j.dtype), v_j, input_precision=PRECISION)
                o_i = ((l_i * old)[:, None] * o_i + new[:, None] * pv) / divisor(l_new)[:, None]
                store_rows(O, DV, i * BR, nq, o_i, BR, DV, BLOCK_DV)           # 15
                tl.store(l + rows, l_new, mask=rows < nq)                      # 16
                tl.store(m + rows, m_new, mask=rows < nq)
        tl.debug_barrier()


@triton.jit
def backward(Q, K, V, O, l, m, dO, dQ, dK, dV, M, RNG, scale, heads, nq, nk, dropout, captured, ints, floats,
             MASK: tl.constexpr, PER_BATCH: tl.constexpr, PER_HEAD: tl.constexpr, DROPOUT: tl.constexpr,
             PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    """dQ, dK, dV; dQ holds 0 before (line 5). Blocks of scores are transposed, keys in rows: products then have many rows,
    which the warps share, and fit into registers."""
    b, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    q_row, k_row = tl.program_id(0).to(tl.int64) * nq, tl.program_id(0).to(tl.int64) * nk
    program = (captured, ints, floats)
    Q, K, V, O = Q + q_row * D, K + k_row * D, V + k_row * DV, O + q_row * DV
    dQ, dK, dV, dO = dQ + q_row * D, dK + k_row * D, dV + k_row * DV, dO + q_row * DV
    l, m = l + q_row, m + q_row
    Tr, Tc = tl.cdiv(nq, BR), tl.cdiv(nk, BC)                                  # 2 to 4
    for j in tl.range(Tc):                                                     # 6
        cols = j * BC + tl.arange(0, BC)[:, None]
        k_j = load_rows(K, D, j * BC, nk, BC, D, BLOCK_D)                      # 7   [BC, BLOCK_D]
        v_j = load_rows(V, DV, j * BC, nk, BC, DV, BLOCK_DV)                   #     [BC, BLOCK_DV]
        dk_j = tl.zeros([BC, BLOCK_D], tl.float32)                             # 8
        dv_j = tl.zeros([BC, BLOCK_DV], tl.float32)
        for i in tl.range(Tr):                                                 # 9
            shown = FULL if MASK is None else tl.load(M + block(b, h, i, j, heads, Tr, Tc, PER_BATCH, PER_HEAD))
            if shown != EMPTY:
                rows = i * BR + tl.arange(0, BR)
                q_i = load_rows(Q, D, i * BR, nq, BR, D, BLOCK_D)              # 10  [BR, BLOCK_D]
                o_i = load_rows(O, DV, i * BR, nq, BR, DV, BLOCK_DV)           #     [BR, BLOCK_DV]
                do_i = load_rows(dO, DV, i * BR, nq, BR, DV, BLOCK_DV)
                l_i = tl.load(l + rows, mask=rows < nq, other=0.0)             #     [BR]
                m_i = tl.load(m + rows, mask=rows < nq, other=float("-inf"))
                s = tl.dot(k_j, tl.trans(q_i), input_precision=PRECISION) * scale              # 11  [BC, BR]
                s = masked(s, b, h, rows[None, :], cols, nq, nk, program, shown, MASK)         # 12
                p = softmax.exponential(s, softmax.finite_or_zero(m_i)[None, :], 1.0, True) / divisor(l_i)[None, :]    # 13
                dp = tl.dot(v_j, tl.trans(do_i), input_precision=PRECISION)    # 17
                p_dropped = p
                if DROPOUT:
                    groups = j * (BC // 8) + tl.arange(0, BC // 8)[:, None]
                    kept = philox.keep(RNG, dropout, b, h, heads, rows[None, :], groups, True)                         # 14
                    p_dropped = tl.where(kept, p * (65536.0 / (65536 - dropout)), 0.0)         # 15
                    dp = gradients.through_dropout(dp, kept, dropout)          # 18
                dv_j = tl.dot(p_dropped.to(do_i.dtype), do_i, dv_j, input_precision=PRECISION)                         # 16
                d_i = tl.sum(do_i.to(tl.float32) * o_i.to(tl.float32), 1)      # 19
                ds = tl.where(p == 0.0, 0.0, p * (dp - d_i[None, :])).to(q_i.dtype)            # 20
                dq_i = load_rows(dQ, D, i * BR, nq, BR, D, BLOCK_D)            # 10, where it is needed
                dq_i += tl.dot(tl.trans(ds), k_j, input_precision=PRECISION) * scale
                store_rows(dQ, D, i * BR, nq, dq_i, BR, D, BLOCK_D)            # 21
                dk_j = tl.dot(ds, q_i, dk_j, input_precision=PRECISION)        # 22, times scale below
        store_rows(dK, D, j * BC, nk, dk_j * scale, BC, D, BLOCK_D)            # 24
        store_rows(dV, DV, j * BC, nk, dv_j, BC, DV, BLOCK_DV)
        tl.debug_barrier()


@triton.jit
def block(b, h, i, j, heads, Tr, Tc, PER_BATCH: tl.constexpr, PER_HEAD: tl.constexpr):
    """Where M has block (i, j)."""
    of = 0
    if PER_BATCH:
        of = b * heads if PER_HEAD else b
    if PER_HEAD:
        of += h
    return (tl.cast(of, tl.int64) * Tr + i) * Tc + j


@triton.jit
def masked(s, b, h, rows, cols, nq, nk, program, shown, MASK: tl.constexpr):
    """Scores of a block, -inf where hidden or beyond the keys; elements are looked at in PARTIAL blocks alone."""
    s = tl.where(cols < nk, s, float("-inf"))
    if MASK is not None:
        if shown == PARTIAL:
            s = tl.where(scoring.visible(b, h, rows, cols, nq, nk, program, MASK), s, float("-inf"))
    return s


@triton.jit
def divisor(l):
    """A sum that can be divided by."""
    return tl.where(l == 0.0, 1.0, l)
