"""Which tiles a block of rows visits, and which elements of a tile count.

A row block's visible columns lie in one or two intervals (`masks.Band`). In tiles, each interval is
    [start, full_start) partial    [full_start, full_end) full    [full_end, end) partial
and a kernel walks all full tiles first, without a mask, then all partial ones with it. Rows and columns are queries and
keys, or keys and queries where a kernel walks along the queries. Masks without intervals come with lists of tiles instead
(`trace/tile_lists.py`): then ranges are of positions in the list.
"""
import triton
import triton.language as tl


@triton.jit
def tile_range(lo, hi, inner_lo, inner_hi, live, n, BLOCK: tl.constexpr):
    """The tiles of `n` columns that a block of rows visits, from each row's interval, and the columns from first to last.

    live: rows that exist.
    """
    shown = live & (lo <= hi)
    first = tl.maximum(tl.min(tl.where(shown, lo, n)), 0)
    last = tl.minimum(tl.max(tl.where(shown, hi, -1)), n - 1)
    start = first // BLOCK
    end = tl.maximum((last + BLOCK) // BLOCK, start)
    inner_first = tl.maximum(tl.max(tl.where(live, inner_lo, 0)), 0)
    inner_last = tl.maximum(tl.minimum(tl.min(tl.where(live, inner_hi, n)), n - 1), -1)
    full_start = tl.minimum(tl.maximum((inner_first + BLOCK - 1) // BLOCK, start), end)
    full_end = tl.maximum(tl.minimum((inner_last + 1) // BLOCK, end), full_start)
    return start, full_start, full_end, end, first, last


@triton.jit
def after(start, full_start, full_end, end, previous_end):
    """A range without the tiles before previous_end."""
    start = tl.maximum(start, previous_end)
    end = tl.maximum(end, start)
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    full_end = tl.minimum(tl.maximum(full_end, full_start), end)
    return start, full_start, full_end, end


@triton.jit
def visits(INTERVALS: tl.constexpr, VISIT: tl.constexpr, LIST, b, h, heads, rows, block, blocks, n_rows, nq, nk, n, program,
           BLOCK: tl.constexpr):
    """The tiles that a block of rows visits, as ten numbers: two disjoint ranges, then the first and the end of the columns
    that may be visible. Columns outside them must not be loaded: padding may hold NaN.

    VISIT  0: all tiles;  1, 2: so many intervals, by INTERVALS, the emitted `keys` or `queries`;
           "list": those in LIST (`trace/tile_lists.py`), whose range is given by positions; "list b", "list h", "list bh": each
           sequence, head has its own
    rows: the indices of a block, one of `blocks` of the longest sequence; beyond n_rows they are clamped, so that no lookup
    leaves its table, and do not count.
    """
    if VISIT == 0:
        tiles = (n + BLOCK - 1) // BLOCK
        return 0, 0, n // BLOCK, tiles, tiles, tiles, tiles, tiles, 0, n
    elif VISIT == 1 or VISIT == 2:
        live = rows < n_rows
        inside = tl.maximum(tl.minimum(rows, n_rows - 1), 0)
        bands = INTERVALS(b, h, inside, nq, nk, program[0], program[1], program[2])
        s0, f0, g0, e0, first, last = tile_range(bands[0], bands[1], bands[2], bands[3], live, n, BLOCK)
        if VISIT == 1:
            return s0, f0, g0, e0, e0, e0, e0, e0, first, last + 1
        else:
            s1, f1, g1, e1, first_1, last_1 = tile_range(bands[4], bands[5], bands[6], bands[7], live, n, BLOCK)
            swap = s1 < s0
            a0, a1, a2, a3 = tl.where(swap, s1, s0), tl.where(swap, f1, f0), tl.where(swap, g1, g0), tl.where(swap, e1, e0)
            c0, c1, c2, c3 = tl.where(swap, s0, s1), tl.where(swap, f0, f1), tl.where(swap, g0, g1), tl.where(swap, e0, e1)
            c0, c1, c2, c3 = after(c0, c1, c2, c3, a3)
            return a0, a1, a2, a3, c0, c1, c2, c3, tl.minimum(first, first_1), tl.maximum(last, last_1) + 1
    else:
        row = block
        if VISIT == "list h" or VISIT == "list bh":
            row += h * blocks
        if VISIT == "list b":
            row += b * blocks
        if VISIT == "list bh":
            row += b * heads * blocks
        start = LIST + 2 * row
        f, p, e = tl.load(start), tl.load(start + 1), tl.load(start + 2)
        return f, f, p, e, e, e, e, e, 0, n


@triton.jit
def share(r, part, parts, SPAN: tl.constexpr):
    """The visits of r that one of `parts` equal shares of them has, or if SPAN those in the part-th span of so many tiles."""
    end = tl.maximum(r[3], r[7])
    size = SPAN if SPAN > 0 else tl.cdiv(end - r[0], parts)
    lo = part * size + (0 if SPAN > 0 else r[0])
    hi = lo + size
    return (tl.minimum(tl.maximum(r[0], lo), hi), tl.minimum(tl.maximum(r[1], lo), hi), tl.minimum(tl.maximum(r[2], lo), hi),
            tl.minimum(tl.maximum(r[3], lo), hi), tl.minimum(tl.maximum(r[4], lo), hi), tl.minimum(tl.maximum(r[5], lo), hi),
            tl.minimum(tl.maximum(r[6], lo), hi), tl.minimum(tl.maximum(r[7], lo), hi), r[8], r[9])


@triton.jit
def count(r, MASKED: tl.constexpr, ASCENDING: tl.constexpr):
    """How many tiles of the visits r are full, or MASKED: partial, or ASCENDING: either."""
    if ASCENDING:
        return r[3] - r[0] + r[7] - r[4]
    elif MASKED:
        return r[1] - r[0] + r[3] - r[2] + r[5] - r[4] + r[7] - r[6]
    else:
        return r[2] - r[1] + r[6] - r[5]


@triton.jit
def tile(r, t, LIST, VISIT: tl.constexpr, MASKED: tl.constexpr, ASCENDING: tl.constexpr):
    """The t-th of those tiles."""
    if VISIT == 0 or VISIT == 1 or VISIT == 2:
        return tile_in_ranges(r, t, MASKED, ASCENDING)
    else:
        return tl.load(LIST + tile_in_ranges(r, t, MASKED, ASCENDING))


@triton.jit
def tile_in_ranges(r, t, MASKED: tl.constexpr, ASCENDING: tl.constexpr):
    if ASCENDING:
        first = r[3] - r[0]
        return tl.where(t < first, r[0] + t, r[4] + t - first)
    elif MASKED:
        c0 = r[1] - r[0]
        c1 = c0 + r[3] - r[2]
        c2 = c1 + r[5] - r[4]
        first = tl.where(t < c0, r[0] + t, r[2] + t - c0)
        second = tl.where(t < c2, r[4] + t - c1, r[6] + t - c2)
        return tl.where(t < c1, first, second)
    else:
        first = r[2] - r[1]
        return tl.where(t < first, r[1] + t, r[5] + t - first)
