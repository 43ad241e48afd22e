"""Dropout's random bits in a kernel: `tilewise/rng.py`, which defines them, tile by tile."""
import triton
import triton.language as tl

MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four words of random bits. All uint32; counters broadcast to each other."""
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, tl.cast(MULTIPLIER_0, tl.uint32))
        high_1 = tl.umulhi(c2, tl.cast(MULTIPLIER_1, tl.uint32))
        low_0 = c0 * tl.cast(MULTIPLIER_0, tl.uint32)
        low_1 = c2 * tl.cast(MULTIPLIER_1, tl.uint32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = k0 + tl.cast(WEYL_0, tl.uint32)
        k1 = k1 + tl.cast(WEYL_1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep(RNG, t, b, h, heads, rows, groups, TRANSPOSED: tl.constexpr):
    """True where an element is kept: [ROWS, COLS], or [COLS, ROWS] if TRANSPOSED.

    t: the threshold; rows [ROWS, 1]; groups [1, COLS // 8]: the numbers first_col // 8 .. of a tile's groups of columns, where
    first_col and COLS are multiples of 32; h: a scalar, or [ROWS, 1]. All transposed if TRANSPOSED.
    """
    seed, stream = tl.load(RNG), (tl.load(RNG + 2) + b) * heads + h
    w0, w1, w2, w3 = philox(groups.to(tl.uint32), rows.to(tl.uint32), stream.to(tl.uint32), tl.load(RNG + 1).to(tl.uint32),
                            (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    x0 = tl.join(w0 & 0xFFFF, w0 >> 16)                        # [.., .., half]
    x1 = tl.join(w1 & 0xFFFF, w1 >> 16)
    x2 = tl.join(w2 & 0xFFFF, w2 >> 16)
    x3 = tl.join(w3 & 0xFFFF, w3 >> 16)
    bits = tl.join(tl.join(x0, x1), tl.join(x2, x3))           # [.., .., half, word % 2, word // 2]
    if TRANSPOSED:
        COLS: tl.constexpr = w0.shape[0] * 8
        ROWS: tl.constexpr = w0.shape[1]
        bits = tl.reshape(bits, (COLS // 32, 4, ROWS, 2, 2, 2))    # [block, pair, row, half, word % 2, word // 2]
        bits = tl.reshape(tl.permute(bits, (0, 5, 4, 1, 3, 2)), (COLS, ROWS))
    else:
        ROWS: tl.constexpr = w0.shape[0]
        COLS: tl.constexpr = w0.shape[1] * 8
        bits = tl.reshape(bits, (ROWS, COLS // 32, 4, 2, 2, 2))    # [row, block, pair, half, word % 2, word // 2]
        bits = tl.reshape(tl.permute(bits, (0, 1, 5, 4, 2, 3)), (ROWS, COLS))
    return bits >= t.to(tl.uint32)
