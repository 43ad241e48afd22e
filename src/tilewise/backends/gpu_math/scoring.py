"""From raw products to finished scores, and back: score function, bias, mask, dropout, one tile at a time.

`rows` and `cols` are int32 blocks of query and key indices that broadcast to the tile's shape: [BLOCK_M, 1] and
[1, BLOCK_N], or [1, BLOCK_M] and [BLOCK_N, 1] where the tile is transposed. Indices beyond the sequence are clamped into
it before anything is looked up by them, so that no lookup leaves its tensor.
"""
import triton
import triton.language as tl


@triton.jit
def finish(s, scale, b, h, rows, cols, nq, nk, BIAS, bias_strides, program, SCORE: tl.constexpr, MASK: tl.constexpr,
           BIAS_COLS: tl.constexpr, RAW: tl.constexpr, MASKED: tl.constexpr):
    """Finished scores of a tile, -inf where hidden.

    RAW: leave the factor `scale` to the caller's exponential. BIAS_COLS: None without bias; the bias tensor's column stride
    where it is 0 or 1, else "any".
    """
    inside_rows = tl.minimum(rows, nq - 1)
    inside_cols = tl.minimum(cols, nk - 1)
    if not RAW:
        s = s * scale
    if SCORE is not None:
        s = SCORE(s, b, h, inside_rows, inside_cols, nq, nk, program[0], program[1], program[2])
    if BIAS_COLS is not None:
        col_stride = bias_strides[3] if BIAS_COLS == "any" else BIAS_COLS
        offsets = inside_rows.to(tl.int64) * bias_strides[2] + inside_cols.to(tl.int64) * col_stride
        s += tl.load(BIAS + b.to(tl.int64) * bias_strides[0] + h.to(tl.int64) * bias_strides[1] + offsets).to(tl.float32)
    if MASKED:
        s = tl.where(visible(b, h, rows, cols, nq, nk, program, MASK), s, float("-inf"))
    return s


@triton.jit
def visible(b, h, rows, cols, nq, nk, program, MASK: tl.constexpr):
    """Which elements of a tile lie inside the sequence and pass the mask."""
    keep = (rows < nq) & (cols < nk)
    if MASK is not None:
        keep = keep & MASK(b, h, tl.minimum(rows, nq - 1), tl.minimum(cols, nk - 1), nq, nk,
                           program[0], program[1], program[2])
    return keep


@triton.jit
def score_gradient(ds, s, scale, b, h, rows, cols, nq, nk, program, SCORE_GRADIENT: tl.constexpr):
    """d loss / d (scale * q.k) from d loss / d score, `s` being the raw product."""
    if SCORE_GRADIENT is None:
        return ds
    else:
        return ds * SCORE_GRADIENT(s * scale, b, h, tl.minimum(rows, nq - 1), tl.minimum(cols, nk - 1), nq, nk,
                                   program[0], program[1], program[2])
