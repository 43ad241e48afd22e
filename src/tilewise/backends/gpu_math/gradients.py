"""One tile backward: probabilities from scores and lse, and the gradient of the scores (FlashAttention-2, algorithm 2).

Tiles are [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] if TRANSPOSED; lse, delta, rows and cols broadcast to them.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import philox, scoring, softmax


@triton.jit
def probabilities(s, lse, scale, b, h, rows, cols, nq, nk, BIAS, bias_strides, program, SCORE: tl.constexpr,
                  MASK: tl.constexpr, BIAS_COLS: tl.constexpr, RAW: tl.constexpr, NATURAL: tl.constexpr, MASKED: tl.constexpr):
    """P from s = q.k."""
    finished = scoring.finish(s, scale, b, h, rows, cols, nq, nk, BIAS, bias_strides, program, SCORE, MASK, BIAS_COLS, RAW,
                              MASKED)
    return softmax.exponential(finished, lse, softmax.LOG2E * (scale if RAW else 1.0), NATURAL)


@triton.jit
def of_scores(p, s, dp, delta, scale, b, h, rows, cols, nq, nk, program, SCORE_GRADIENT: tl.constexpr, MASKED: tl.constexpr):
    """(d loss / d finished score, d loss / d (scale * q.k)) from dp, the gradient of p."""
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(p == 0.0, 0.0, ds)                                       # 0 also where dp is not finite
    ds_raw = scoring.score_gradient(ds, s, scale, b, h, rows, cols, nq, nk, program, SCORE_GRADIENT)
    if MASKED and SCORE_GRADIENT is not None:
        ds_raw = tl.where(p == 0.0, 0.0, ds_raw)                               # and where s is not
    return ds, ds_raw


@triton.jit
def tile_gradients(s, dp, lse, delta, scale, b, h, heads, rows, cols, first_col, nq, nk, BIAS, bias_strides,
                   RNG, dropout, program, SCORE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, MASK: tl.constexpr,
                   BIAS_COLS: tl.constexpr, DROPOUT: tl.constexpr, RAW: tl.constexpr, NATURAL: tl.constexpr,
                   MASKED: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(kept p, d loss / d finished score, d loss / d (scale * q.k)) of a tile, from s = q.k and dp = dO.v."""
    p = probabilities(s, lse, scale, b, h, rows, cols, nq, nk, BIAS, bias_strides, program, SCORE, MASK, BIAS_COLS, RAW,
                      NATURAL, MASKED)
    kept = p
    if DROPOUT:
        groups = first_col // 8 + tl.arange(0, BLOCK_N // 8)
        if TRANSPOSED:
            keep = philox.keep(RNG, dropout, b, h, heads, rows, groups[:, None], True)
        else:
            keep = philox.keep(RNG, dropout, b, h, heads, rows, groups[None, :], False)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * (65536.0 / (65536 - dropout)), 0.0)
    ds, ds_raw = of_scores(p, s, dp, delta, scale, b, h, rows, cols, nq, nk, program, SCORE_GRADIENT, MASKED)
    return kept, ds, ds_raw
