"""What the backward pass computes first: delta = rowsum(dO * O) - dlse, per row (FlashAttention-2, algorithm 2, line 4)."""
import triton
import triton.language as tl

from tilewise.backends.gpu_math.places import place, sequence
from tilewise.backends.gpu_math.rows import load_rows, located


@triton.jit
def preprocess(OUT, DO, DLSE, DELTA, Q_ROWS, WORK, out_strides, do_strides, heads, nq, lse_rows, HAS_DLSE: tl.constexpr,
               DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    b, h, _, first_row = place(tl.program_id(0), WORK, tl.cdiv(nq, BLOCK_M), heads, 1, BLOCK_M, False)
    slot, start, nq = sequence(Q_ROWS, b, nq)
    OUT, DO = located(OUT, out_strides, slot, h, start), located(DO, do_strides, slot, h, start)
    out = load_rows(OUT, out_strides[2], first_row, nq, BLOCK_M, DV, BLOCK_DV).to(tl.float32)
    do = load_rows(DO, do_strides[2], first_row, nq, BLOCK_M, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(out * do, 1)                                                # [BLOCK_M]
    rows = first_row + tl.arange(0, BLOCK_M)
    offsets = (slot * heads + h).to(tl.int64) * lse_rows + start + rows
    if HAS_DLSE:
        delta -= tl.load(DLSE + offsets, mask=rows < nq, other=0.0)
    tl.store(DELTA + offsets, delta, mask=rows < nq)
