"""Online softmax in base 2 (FlashAttention-2, section 3.1): statistics per row, rescaled once per tile, divided once.

m_i  running row maximum of s * unit, in base 2          [BLOCK_M]
l_i  running row sum of exp2(s * unit - m_i)             [BLOCK_M]
acc  running sum of exp2(s * unit - m_i) @ v             [BLOCK_M, BLOCK_DV]

`unit` turns a score into base 2: scale * log2(e) for raw products, log2(e) for finished scores. It is positive.
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
def update(m_i, l_i, acc, s, unit):
    """Takes a tile of scores [BLOCK_M, BLOCK_N] into the statistics: returns them with p, the tile's probabilities."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * unit)
    pivot = finite_or_zero(m_new)
    p = tl.exp2(s * unit - pivot[:, None])
    alpha = tl.exp2(m_i - pivot)
    return m_new, l_i * alpha + tl.sum(p, 1), acc * alpha[:, None], p


@triton.jit
def add_sink(m_i, l_i, acc, sink):
    """One more logit in the denominator."""
    sink = tl.full(m_i.shape, sink * LOG2E, tl.float32)
    m_new = tl.maximum(m_i, sink)
    pivot = finite_or_zero(m_new)
    alpha = tl.exp2(m_i - pivot)
    return m_new, l_i * alpha + tl.exp2(sink - pivot), acc * alpha[:, None]


@triton.jit
def finalize(m_i, l_i, acc):
    """out [BLOCK_M, BLOCK_DV] and lse [BLOCK_M] in natural log; a row without keys gives 0 and -inf."""
    empty = l_i == 0.0
    out = acc / tl.where(empty, 1.0, l_i)[:, None]
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(tl.where(empty, 1.0, l_i))) * LN2)
    return out, lse


@triton.jit
def lse_base_2(lse):
    """What the backward pass subtracts: +inf for a row without keys, whose probabilities are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
