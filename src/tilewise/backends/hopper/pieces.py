"""Tiles of keys whose rows lie in memory in pieces: as pages, which a block table names.

A tile in shared memory is a row of panels, one behind another: of all its rows the 128 bytes that a swizzle spans. A piece
is some rows of one panel, and what TMA copies at once.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tilewise.backends.hopper.gluon_names import reinterpret, tma_load


@gluon.jit
def located_pieces(first, r, slot, start, PAGES, page_size, ROWS: gl.constexpr, TOGETHER: gl.constexpr):
    """Where ROWS rows from `first` on lie: (slots or pages, first rows) of each TOGETHER of them. Pages without a visible row
    may not be there: they are -1, where TMA finds nothing and fills with 0."""
    slots, rows = (), ()
    for i in gl.static_range(ROWS // TOGETHER):
        row = first + i * TOGETHER
        if PAGES is None:
            slots, rows = slots + (slot,), rows + (start + row,)
        else:
            seen = (row < r[9]) & (row + TOGETHER > r[8])
            slots = slots + (gl.load(PAGES + row // page_size, mask=seen, other=-1),)
            rows = rows + (row % page_size,)
    return slots, rows


@gluon.jit
def load_pieces(desc, slots, head, rows, barrier, tile):
    """A tile of a head's rows into shared memory, 0 beyond the tensor; arrives at the barrier. A block of the descriptor is a
    piece."""
    ROWS: gl.constexpr = desc.block_type.shape[2]
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    mbarrier.expect(barrier, tile.shape[0] // ROWS * (tile.shape[1] // COLUMNS) * desc.block_type.nbytes)
    for i in gl.static_range(tile.shape[0] // ROWS):
        for panel in gl.static_range(tile.shape[1] // COLUMNS):
            tma_load(desc, [slots[i], head, rows[i], panel * COLUMNS], barrier, piece(tile, desc, i, panel))


@gluon.jit
def piece(tile, desc, i: gl.constexpr, panel: gl.constexpr):
    """The i-th piece of a panel of a tile."""
    PIECES: gl.constexpr = tile.shape[0] // desc.block_type.shape[2]
    PANELS: gl.constexpr = tile.shape[1] // desc.block_type.shape[3]
    pieces = reinterpret(tile, desc.dtype, [PIECES * PANELS] + desc.block_type.shape, desc.layout)
    return pieces.index(panel * PIECES + i)
