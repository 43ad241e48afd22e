"""Flash-Decoding's second step: a row's parts merged, all at once, so that it takes the time of one read of memory.

One program per row. PARTS [splits, slots, H, rows, DV], with their PART_LSE, natural, -inf where a part has no key; such a
part may never have been written. A part's lse is its only score, and its out its value (`tilewise/state.py`).
"""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import softmax
from tilewise.backends.gpu_math.rows import load_at, located


@triton.jit
def merge(PARTS, PART_LSE, SINKS, OUT, LSE, out_strides, heads, nq, splits, out_split, lse_split, HAS_SINKS: tl.constexpr,
          DV: tl.constexpr, BLOCK_DV: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """ALL: as many parts as there may be; BLOCK: those that are read at once."""
    row, of_head = tl.program_id(0) % nq, tl.program_id(0) // nq
    slot, h = of_head // heads, of_head % heads
    place = of_head.to(tl.int64) * nq + row
    m_i, l_i = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    every = lse_of(PART_LSE + place, lse_split, 0, splits, ALL)
    m_i, l_i, _, _ = softmax.step(m_i, l_i, every[None, :], softmax.LOG2E, False)
    for first in range(0, splits, BLOCK):
        some = lse_of(PART_LSE + place, lse_split, first, splits, BLOCK)
        split = first + tl.arange(0, BLOCK)[:, None]
        of_part = PARTS + place * DV + split.to(tl.int64) * out_split
        part = load_at(of_part, split < splits, DV, BLOCK_DV, True)
        p = softmax.exponential(some, softmax.finite_or_zero(m_i), softmax.LOG2E, False)[:, None]
        acc += tl.sum(tl.where(p > 0.0, p * part, 0.0), 0)[None, :]
    if HAS_SINKS:
        m_i, l_i, acc = softmax.add_sink(m_i, l_i, acc, tl.load(SINKS + h).to(tl.float32), False)
    out, lse = softmax.finalize(m_i, l_i, acc, False)
    dims = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(located(OUT, out_strides, slot, h, row) + dims, out.to(OUT.dtype.element_ty), mask=dims < DV)
    tl.store(LSE + place + tl.arange(0, 1), lse)


@triton.jit
def lse_of(PART_LSE, stride, first, splits, COUNT: tl.constexpr):
    """Of COUNT parts from the first on."""
    split = first + tl.arange(0, COUNT)
    return tl.load(PART_LSE + split.to(tl.int64) * stride, mask=split < splits, other=float("-inf"))
