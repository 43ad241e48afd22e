"""The entropy of a row of probabilities, beside the online softmax (`softmax.py`), whose statistics m_i and l_i it takes.

w_i  running sum of p log(p), p = exp(s - m_i), the logarithm in the unit of m_i                [BLOCK_M]

The entropy is log(l_i) - w_i / l_i: two numbers of one sign, where lse less the mean score would be the difference of large
ones. The logarithm is taken of p: s would cost registers, to keep it so long.
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math.softmax import LN2, finite_or_zero, ratio


@triton.jit
def rescaled(w_i, m_before, l_before, pivot, NATURAL: tl.constexpr):
    """w_i as of another maximum."""
    shift = tl.where(m_before == float("-inf"), 0.0, m_before - pivot)
    return (w_i + l_before * shift) * ratio(m_before, pivot, NATURAL)


@triton.jit
def weighted(w_i, m_before, l_before, m_i, p, NATURAL: tl.constexpr):
    """Takes in a tile of which `softmax.update` has made m_i and p."""
    own = tl.sum(p * tl.log2(tl.where(p == 0.0, 1.0, p)), 1)
    if NATURAL:
        own *= LN2
    return rescaled(w_i, m_before, l_before, finite_or_zero(m_i), NATURAL) + own


@triton.jit
def weighted_part(w_i, m_before, l_before, m_i, w_part, l_part, m_part, NATURAL: tl.constexpr):
    """Takes in the statistics of a part over other keys, which `softmax.merge` has taken in, making m_i."""
    pivot = finite_or_zero(m_i)
    own = rescaled(w_part, m_part, l_part, pivot, NATURAL)
    return rescaled(w_i, m_before, l_before, pivot, NATURAL) + own


@triton.jit
def entropy(w_i, l_i, NATURAL: tl.constexpr):
    """In nats; 0 for a row without keys."""
    total = tl.where(l_i == 0.0, 1.0, l_i)
    if NATURAL:
        return tl.log2(total) * LN2 - w_i / total
    else:
        return (tl.log2(total) - w_i / total) * LN2


@triton.jit
def natural(m_i, NATURAL: tl.constexpr):
    """A maximum of scores in natural units."""
    if NATURAL:
        return m_i
    else:
        return m_i * LN2
