"""What the backward pass computes first: delta, and lse as exponentials subtract it: TMA copies both as they are used."""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import softmax
from tilewise.backends.gpu_math.places import place, sequence
from tilewise.backends.gpu_math.preprocess import preprocess as find_delta


@triton.jit
def preprocess(OUT, DO, DLSE, LSE, SUBTRAHEND, DELTA, Q_ROWS, WORK, out_strides, do_strides, heads, nq, lse_rows,
               HAS_DLSE: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    find_delta(OUT, DO, DLSE, DELTA, Q_ROWS, WORK, out_strides, do_strides, heads, nq, lse_rows, HAS_DLSE, DV, BLOCK_M,
               BLOCK_DV)
    b, h, _, first_row = place(tl.program_id(0), WORK, tl.cdiv(nq, BLOCK_M), heads, 1, BLOCK_M, False)
    slot, start, nq = sequence(Q_ROWS, b, nq)
    rows = first_row + tl.arange(0, BLOCK_M)
    offsets = (slot * heads + h).to(tl.int64) * lse_rows + start + rows
    lse = tl.load(LSE + offsets, mask=rows < nq, other=0.0)
    tl.store(SUBTRAHEND + offsets, softmax.subtrahend(lse, False), mask=rows < nq)
