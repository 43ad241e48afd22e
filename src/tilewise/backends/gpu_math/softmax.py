"""Online softmax (FlashAttention-2, section 3.1): statistics per row, rescaled once per tile, divided once.

m_i  running row maximum of s                            [BLOCK_M]
l_i  running row sum of exp(s - m_i)                     [BLOCK_M]
acc  running sum of exp(s - m_i) @ v                     [BLOCK_M, BLOCK_DV]

`unit` turns a score into base 2: scale * log2(e) for raw products, log2(e) for finished scores. It is positive. m_i and lse
are in base 2, times unit, so that an exponential takes one multiply-add; NATURAL: they stay natural, scores are finished.
Base 2 rounds large scores once more, which shows in fp32.
"""
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finite_or_zero(m):
    """A pivot that can be subtracted: -inf, the maximum of nothing, would turn exp2(-inf - m) into NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def exponential(s, m, unit, NATURAL: tl.constexpr):
    """exp(s - m)."""
    if NATURAL:
        return tl.exp2((s - m) * LOG2E)
    else:
        return tl.exp2(s * unit - m)


@triton.jit
def ratio(a, b, NATURAL: tl.constexpr):
    """exp(a - b) of two statistics."""
    if NATURAL:
        return tl.exp2((a - b) * LOG2E)
    else:
        return tl.exp2(a - b)


@triton.jit
def step(m_i, l_i, s, unit, NATURAL: tl.constexpr):
    """Takes a tile of scores [BLOCK_M, BLOCK_N] into m_i and l_i: returns them, the factor of the old acc, and p, the tile's
    probabilities."""
    largest = tl.max(s, 1)
    m_new = tl.maximum(m_i, largest if NATURAL else largest * unit)
    pivot = finite_or_zero(m_new)
    p = exponential(s, pivot[:, None], unit, NATURAL)
    alpha = ratio(m_i, pivot, NATURAL)
    return m_new, l_i * alpha + tl.sum(p, 1), alpha, p


@triton.jit
def update(m_i, l_i, acc, s, unit, NATURAL: tl.constexpr):
    """Takes a tile of scores into all statistics: returns them with p."""
    m_i, l_i, alpha, p = step(m_i, l_i, s, unit, NATURAL)
    return m_i, l_i, acc * alpha[:, None], p


@triton.jit
def merge(m_i, l_i, acc, part, lse, NATURAL: tl.constexpr):
    """Takes in a finished part, out [BLOCK_M, BLOCK_DV] and natural lse [BLOCK_M], over other keys: a state with sum 1."""
    m_part = lse if NATURAL else lse * LOG2E
    m_new = tl.maximum(m_i, m_part)
    pivot = finite_or_zero(m_new)
    alpha, beta = ratio(m_i, pivot, NATURAL), ratio(m_part, pivot, NATURAL)
    return m_new, l_i * alpha + beta, acc * alpha[:, None] + part * beta[:, None]


@triton.jit
def add_sink(m_i, l_i, acc, sink, NATURAL: tl.constexpr):
    """One more logit in the denominator: a scalar, or one for each row."""
    if not NATURAL:
        sink = sink * LOG2E
    m_new = tl.maximum(m_i, sink)
    pivot = finite_or_zero(m_new)
    alpha = ratio(m_i, pivot, NATURAL)
    return m_new, l_i * alpha + ratio(sink, pivot, NATURAL), acc * alpha[:, None]


@triton.jit
def finalize(m_i, l_i, acc, NATURAL: tl.constexpr):
    """out [BLOCK_M, BLOCK_DV] and lse [BLOCK_M] in natural log; a row without keys gives 0 and -inf."""
    empty = l_i == 0.0
    out = acc / tl.where(empty, 1.0, l_i)[:, None]
    sum_base_2 = tl.log2(tl.where(empty, 1.0, l_i))
    lse = m_i + sum_base_2 * LN2 if NATURAL else (m_i + sum_base_2) * LN2
    return out, tl.where(empty, float("-inf"), lse)


@triton.jit
def subtrahend(lse, NATURAL: tl.constexpr):
    """lse as the m of `exponential`: +inf for a row without keys, whose probabilities are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse if NATURAL else lse * LOG2E)
