"""One tile of forward mode, and of the derivative of the backward pass (`docs/derivatives.md`).

From the raw products s = q.k and s_tangent = q'.k + q.k'. Tiles are [BLOCK_M, BLOCK_N]. A tensor and its tangent have the same
strides.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import philox, scoring
from tilewise.backends.gpu_math.gradients import probabilities
from tilewise.backends.gpu_math.rows import rows_from


@triton.jit
def load_channels(X, rows, first, ROWS: tl.constexpr, CHANNELS: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr):
    """Channels first .. of rows = (stride, first row, start, end) of X, a tile [ROWS, CHANNELS]; 0 beyond channel D and, if
    RAGGED, outside start .. end."""
    stride, first_row, start, end = rows
    numbers, dims = first_row + tl.arange(0, ROWS)[:, None], first + tl.arange(0, CHANNELS)[None, :]
    pointers, inside = rows_from(X, stride, first_row, ROWS) + dims, (numbers >= start) & (numbers < end)
    if RAGGED and D % CHANNELS != 0:
        return tl.load(pointers, mask=inside & (dims < D), other=0.0)
    elif RAGGED:
        return tl.load(pointers, mask=inside, other=0.0)
    elif D % CHANNELS != 0:
        return tl.load(pointers, mask=dims < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def products(A, A_TANGENT, B, B_TANGENT, a_rows, b_rows, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, D: tl.constexpr,
             BLOCK_D: tl.constexpr, A_RAGGED: tl.constexpr, B_RAGGED: tl.constexpr, PRECISION: tl.constexpr):
    """A B^T and its tangent A' B^T + A B'^T over D channels, [BLOCK_A, BLOCK_B]; A_TANGENT: None where A does not move.

    Some channels at a time, and nothing of A and B stays: any head dim fits into registers. Without tensor cores a thread holds
    whole rows of both factors.
    """
    CHANNELS: tl.constexpr = 16 if PRECISION == "ieee" else min(BLOCK_D, 128)
    product, product_tangent = tl.zeros([BLOCK_A, BLOCK_B], tl.float32), tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for first in range(0, D, CHANNELS):
        a = load_channels(A, a_rows, first, BLOCK_A, CHANNELS, D, A_RAGGED)
        b = load_channels(B, b_rows, first, BLOCK_B, CHANNELS, D, B_RAGGED)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
        if A_TANGENT is not None:
            a_tangent = load_channels(A_TANGENT, a_rows, first, BLOCK_A, CHANNELS, D, A_RAGGED)
            product_tangent = tl.dot(a_tangent, tl.trans(b), product_tangent, input_precision=PRECISION)
        b = load_channels(B_TANGENT, b_rows, first, BLOCK_B, CHANNELS, D, B_RAGGED)
        product_tangent = tl.dot(a, tl.trans(b), product_tangent, input_precision=PRECISION)
    return product, product_tangent


@triton.jit
def of_score(s, scale, b, h, rows, cols, nq, nk, program, DERIVATIVE: tl.constexpr):
    """The value of a score function's first or second derivative; 1.0 without a score function."""
    return scoring.score_gradient(1.0, s, scale, b, h, rows, cols, nq, nk, program, DERIVATIVE)


@triton.jit
def of_finished(s_tangent, slope, scale, b, h, rows, cols, nq, nk, BIAS_TANGENT, bias_strides, program,
                BIAS_COLS: tl.constexpr):
    """The tangent of the finished scores, `slope` being the score function's derivative."""
    return scoring.finish(s_tangent * scale * slope, 1.0, b, h, rows, cols, nq, nk, BIAS_TANGENT, bias_strides,
                          program, None, None, BIAS_COLS, True, False)


@triton.jit
def tile_tangents(s, s_tangent, lse, scale, b, h, heads, rows, cols, first_col, nq, nk, BIAS, bias_strides,
                  BIAS_TANGENT, RNG, dropout, program, SCORE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, MASK: tl.constexpr,
                  BIAS_COLS: tl.constexpr, DROPOUT: tl.constexpr, RAW: tl.constexpr, NATURAL: tl.constexpr,
                  MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """(p * score', kept p, kept p * score') of a tile."""
    p = probabilities(s, lse, scale, b, h, rows, cols, nq, nk, BIAS, bias_strides, program, SCORE, MASK, BIAS_COLS, RAW,
                      NATURAL, MASKED)
    slope = of_score(s, scale, b, h, rows, cols, nq, nk, program, SCORE_GRADIENT)
    weighted = p * of_finished(s_tangent, slope, scale, b, h, rows, cols, nq, nk, BIAS_TANGENT, bias_strides, program,
                               BIAS_COLS)
    if MASKED:
        weighted = tl.where(p == 0.0, 0.0, weighted)                           # 0 also where its factor is not finite
    kept, kept_weighted = p, weighted
    if DROPOUT:
        groups = first_col // 8 + tl.arange(0, BLOCK_N // 8)
        keep = philox.keep(RNG, dropout, b, h, heads, rows, groups[None, :], False)
        kept, kept_weighted = tl.where(keep, p, 0.0), tl.where(keep, weighted, 0.0)
    return weighted, kept, kept_weighted


@triton.jit
def tile_gradient_tangents(s, s_tangent, dp, dp_tangent, lse, lse_tangent, delta, delta_tangent, scale, b, h, heads, rows, cols,
                           first_col, nq, nk, BIAS, bias_strides, BIAS_TANGENT, RNG, dropout, program,
                           SCORE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, SCORE_CURVATURE: tl.constexpr, MASK: tl.constexpr,
                           BIAS_COLS: tl.constexpr, DROPOUT: tl.constexpr, RAW: tl.constexpr, NATURAL: tl.constexpr,
                           MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """(kept p', dS', d loss / d (scale * q.k), its tangent) of a tile, from dp = dO.v and dp_tangent = dO.v' besides."""
    p = probabilities(s, lse, scale, b, h, rows, cols, nq, nk, BIAS, bias_strides, program, SCORE, MASK, BIAS_COLS, RAW,
                      NATURAL, MASKED)
    slope = of_score(s, scale, b, h, rows, cols, nq, nk, program, SCORE_GRADIENT)
    p_tangent = p * (of_finished(s_tangent, slope, scale, b, h, rows, cols, nq, nk, BIAS_TANGENT, bias_strides, program,
                                 BIAS_COLS) - lse_tangent)
    if MASKED:
        p_tangent = tl.where(p == 0.0, 0.0, p_tangent)                         # 0 also where its factor is not finite
    kept = p_tangent
    if DROPOUT:
        groups, rescale = first_col // 8 + tl.arange(0, BLOCK_N // 8), 65536.0 / (65536 - dropout)
        keep = philox.keep(RNG, dropout, b, h, heads, rows, groups[None, :], False)
        kept = tl.where(keep, p_tangent, 0.0)
        dp, dp_tangent = tl.where(keep, dp * rescale, 0.0), tl.where(keep, dp_tangent * rescale, 0.0)
    ds = p * (dp - delta)
    ds_tangent = p_tangent * (dp - delta) + p * (dp_tangent - delta_tangent)
    ds_raw, ds_raw_tangent = ds * slope, ds_tangent * slope
    if SCORE_CURVATURE is not None:
        bend = of_score(s, scale, b, h, rows, cols, nq, nk, program, SCORE_CURVATURE)
        ds_raw_tangent += bend * (s_tangent * scale) * ds
    if MASKED:
        ds_tangent = tl.where(p == 0.0, 0.0, ds_tangent)
        ds_raw, ds_raw_tangent = tl.where(p == 0.0, 0.0, ds_raw), tl.where(p == 0.0, 0.0, ds_raw_tangent)
    return kept, ds_tangent, ds_raw, ds_raw_tangent
