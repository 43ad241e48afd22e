"""Tiles in shared memory: how TMA sees them, which comes when, and how rows are hidden that may hold NaN.

0 * NaN would reach the sums of a product: rows that nobody sees are set to 0 before it.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tilewise.backends.gpu_math import masking
from tilewise.backends.hopper.gluon_names import reinterpret, tma_load


@gluon.jit
def as_block(tile, desc):
    """A tile [rows, columns] as the block [1, 1, rows, columns] of a descriptor of (slots, heads, rows, columns)."""
    return reinterpret(tile, desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def load(desc, slot, head, row, barrier, tile, ALONE: gl.constexpr):
    """Rows of a head into shared memory, 0 beyond the tensor; arrives at the barrier, which ALONE: waits for nothing else."""
    if ALONE:
        mbarrier.expect(barrier, desc.block_type.nbytes)
    tma_load(desc, [slot, head, row, 0], barrier, as_block(tile, desc))


@gluon.jit
def load_pieces(desc, slot, head, row, barrier, tiles, place, PIECES: gl.constexpr):
    """As `load`, of rows that PIECES tiles make up, each with the columns of a block, from tile place * PIECES on."""
    mbarrier.expect(barrier, PIECES * desc.block_type.nbytes)
    for i in gl.static_range(PIECES):
        piece = as_block(tiles.index(place * PIECES + i), desc)
        tma_load(desc, [slot, head, row, i * desc.block_type.shape[3]], barrier, piece)


@gluon.jit
def load_columns(desc, slot, head, column, barrier, tiles, place, PIECES: gl.constexpr):
    """As `load_pieces`, of a tensor whose rows are a head's columns, from `column` on: each piece has the rows of a block."""
    mbarrier.expect(barrier, PIECES * desc.block_type.nbytes)
    for i in gl.static_range(PIECES):
        piece = as_block(tiles.index(place * PIECES + i), desc)
        tma_load(desc, [slot, head, i * desc.block_type.shape[2], column], barrier, piece)


@gluon.constexpr_function
def tile_layout(dtype, columns):
    """Of a tile in shared memory, for wgmma: the widest swizzle that a row fills."""
    bits = dtype.primitive_bitwidth
    return gl.NVMMASharedLayout(min(128, columns * bits // 8), bits)


@gluon.jit
def first_of_full(r, t, LIST, VISIT: gl.constexpr, BLOCK: gl.constexpr):
    """The first column of the t-th full tile."""
    return (masking.tile(r, t, LIST, VISIT, False, 0) * BLOCK).to(gl.int32)


@gluon.jit
def first_of(r, t, masked, LIST, VISIT: gl.constexpr, BLOCK: gl.constexpr):
    """The first column of the t-th of all visited tiles: the `masked` partial ones come first, then the full ones."""
    if t < masked:
        first = (masking.tile(r, t, LIST, VISIT, True, 0) * BLOCK).to(gl.int32)
    else:
        first = first_of_full(r, t - masked, LIST, VISIT, BLOCK)
    return first


@gluon.jit
def reaches_out(first, ROWS: gl.constexpr, low, high):
    """Whether ROWS rows from `first` on lie outside low .. high, the hull of what is visible."""
    return (first < low) | (first + ROWS > high)


@gluon.jit
def hide_rows(tile, first, lo, hi, PART: gl.constexpr, PARTS: gl.constexpr):
    """Sets rows of a tile outside lo .. hi to 0, of each PARTS pieces the one numbered PART. first: number of the first row.

    Before wgmma reads them: `fence_async_shared`, and a barrier of all who took part.
    """
    WARPS: gl.constexpr = gl.num_warps()
    PIECE: gl.constexpr = 4 * WARPS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    for piece in gl.static_range(tile.shape[0] // PIECE):
        if piece % PARTS == PART:
            some = tile.slice(piece * PIECE, PIECE)
            row = first + piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, LAYOUT))
            x = some.load(LAYOUT)
            some.store(gl.where(((row >= lo) & (row < hi))[:, None], x, gl.zeros_like(x)))


@gluon.jit
def store_rows(tile, X, stride, row, left, DIM: gl.constexpr):
    """The first `left` rows of a tile to rows row .. of X, which is at row 0 of a head; inside column DIM."""
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    rows = gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, tile.shape[1], gl.SliceLayout(0, LAYOUT))
    of_rows = X + ((row + rows).to(gl.int64) * stride)[:, None]
    gl.store(of_rows + dims[None, :], tile.load(LAYOUT), mask=(rows < left)[:, None] & (dims < DIM)[None, :])
