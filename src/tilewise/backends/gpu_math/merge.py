"""Flash-Decoding's second step (Dao et al. 2023): the parts of keys that were split, merged."""
import triton
import triton.language as tl

from tilewise.backends.gpu_math import softmax
from tilewise.backends.gpu_math.places import place
from tilewise.backends.gpu_math.rows import load_at, located, store_at


@triton.jit
def merge(PARTS, PART_LSE, SINKS, OUT, LSE, out_strides, heads, nq, splits, out_split, lse_split, HAS_SINKS: tl.constexpr,
          NATURAL: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Parts [splits, slots, H, rows, DV] merged in order, with their PART_LSE (`tilewise/state.py`)."""
    slot, h, _, first = place(tl.program_id(0), None, tl.cdiv(nq, BLOCK_M), heads, 1, BLOCK_M, False)
    rows = first + tl.arange(0, BLOCK_M)
    of_rows = (slot * heads + h).to(tl.int64) * nq + rows
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for split in range(splits):
        lse = tl.load(PART_LSE + tl.cast(split, tl.int64) * lse_split + of_rows, mask=rows < nq, other=float("-inf"))
        of_part = PARTS + tl.cast(split, tl.int64) * out_split + (of_rows * DV)[:, None]
        part = load_at(of_part, (lse > float("-inf"))[:, None], DV, BLOCK_DV, True)
        m_i, l_i, acc = softmax.merge(m_i, l_i, acc, part, lse, NATURAL)
    if HAS_SINKS:
        m_i, l_i, acc = softmax.add_sink(m_i, l_i, acc, tl.load(SINKS + h).to(tl.float32), NATURAL)
    out, lse = softmax.finalize(m_i, l_i, acc, NATURAL)
    OUT = located(OUT, out_strides, slot, h, 0)
    store_at(OUT + (rows.to(tl.int64) * out_strides[2])[:, None], (rows < nq)[:, None], out, DV, BLOCK_DV)
    tl.store(LSE + of_rows, lse, mask=rows < nq)
