"""What fp8 (e4m3) changes of a forward pass: the order of keys in P V, probabilities raised into its range, values transposed.

wgmma takes operands of 8 bits only if they are contiguous along the summed dimension: for P V that is keys, so V comes
transposed (`turned_values.py`). The registers in which S = Q K^T leaves the tensor cores are those in which P enters them if
each 16 keys change places: a thread of a row's four holds columns 2t, 2t + 1, 8 + 2t and 9 + 2t of S, and gives columns 4t to
4t + 3 of P. Since a sum has no order, V's keys change theirs instead, and P never leaves its registers.

Probabilities are at most 1, e4m3 reaches 448 and has nothing between 0 and 2^-9: P is stored times 2^RAISED (FlashAttention-3
does so too). The running maximum is held that much lower, so sums are raised alike, and lse and out come out as they are.
"""
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tilewise.backends.gpu_math import softmax
from tilewise.backends.hopper.gluon_names import reinterpret

RAISED = tl.constexpr(8.0)              # 2^8 = 256: the largest power of two that e4m3 holds


@triton.jit
def key_at(place):
    """The key at a place of P V's order: of each 16, bits p3 p2 p1 p0 of the place are bits p1 p3 p2 p0 of the key."""
    return (place & -16) | ((place & 2) << 2) | ((place & 12) >> 1) | (place & 1)


@gluon.jit
def in_order(p):
    """P [rows, keys] with its keys in that order: another name for the same registers."""
    ROWS: gl.constexpr = p.shape[0]
    KEYS: gl.constexpr = p.shape[1]
    parts = p.reshape([ROWS, KEYS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    return parts.reshape([ROWS, KEYS])


@triton.jit
def step(m_i, l_i, s, unit):
    """`softmax.step` with probabilities times 2^RAISED: m_i is that much below the maximum."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * unit - RAISED)
    pivot = softmax.finite_or_zero(m_new)
    p = softmax.exponential(s, pivot[:, None], unit, False)
    alpha = softmax.ratio(m_i, pivot, False)
    return m_new, l_i * alpha + tl.sum(p, 1), alpha, p


@gluon.jit
def factors_of(scales, place, scale, RAW: gl.constexpr):
    """What the scores and the output of a key head are multiplied by, as bits. RAW: at least so much that -inf times it is not
    NaN, and less than any score shows."""
    Q_SCALE, K_SCALE, V_SCALE = scales
    of_scores = scale * gl.load(Q_SCALE + place) * gl.load(K_SCALE + place)
    if RAW:
        of_scores = gl.where(of_scores < 1e-30, 1e-30, of_scores)
    return of_scores.to(gl.int32, bitcast=True), gl.load(V_SCALE + place).to(gl.int32, bitcast=True)


@gluon.jit
def hide_columns(tile, first, lo, hi, PART: gl.constexpr, PARTS: gl.constexpr):
    """`tiles.hide_rows` of a tile [columns, keys] whose keys are in P V's order."""
    WARPS: gl.constexpr = gl.num_warps()
    PIECE: gl.constexpr = 4 * WARPS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [WARPS, 1], [1, 0])
    raw = reinterpret(tile, gl.uint8, tile.shape, gl.NVMMASharedLayout(tile.layout.swizzle_byte_width, 8))
    key = first + key_at(gl.arange(0, tile.shape[1], gl.SliceLayout(0, LAYOUT)))
    for piece in gl.static_range(tile.shape[0] // PIECE):
        if piece % PARTS == PART:
            some = raw.slice(piece * PIECE, PIECE)
            x = some.load(LAYOUT)
            some.store(gl.where(((key >= lo) & (key < hi))[None, :], x, gl.zeros_like(x)))
