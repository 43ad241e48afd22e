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
    """Where ROWS rows from `first` on lie: (slot or page, first row in it) of each TOGETHER of them."""
    places = ()
    for i in gl.static_range(ROWS // TOGETHER):
        one = (located_piece(first + i * TOGETHER, r, slot, start, PAGES, page_size, TOGETHER),)
        places = places + one           # type: ignore[assignment]
    return places


@gluon.jit
def located_piece(row, r, slot, start, PAGES, page_size, TOGETHER: gl.constexpr):
    """Pages without a visible row may not be there: they are -1, where TMA finds nothing and fills with 0."""
    place = slot, start + row
    if PAGES is not None:
        visible = (row < r[9]) & (row + TOGETHER > r[8])
        place = gl.load(PAGES + row // page_size, mask=visible, other=-1), row % page_size
    return place


@gluon.jit
def load_pieces(desc, places, head, barrier, tile):
    """A tile of a head's rows into shared memory, 0 beyond the tensor; arrives at the barrier. A block of the descriptor is a
    piece."""
    ROWS: gl.constexpr = desc.block_type.shape[2]
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    mbarrier.expect(barrier, tile.shape[0] // ROWS * (tile.shape[1] // COLUMNS) * desc.block_type.nbytes)
    for i in gl.static_range(tile.shape[0] // ROWS):
        for panel in gl.static_range(tile.shape[1] // COLUMNS):
            tma_load(desc, [places[i][0], head, places[i][1], panel * COLUMNS], barrier, piece(tile, desc, i, panel))


@gluon.jit
def piece(tile, desc, i: gl.constexpr, panel: gl.constexpr):
    """The i-th piece of a panel of a tile."""
    ROWS: gl.constexpr = desc.block_type.shape[2]
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    PIECES: gl.constexpr = tile.shape[0] // ROWS
    pieces = reinterpret(tile, desc.dtype, [PIECES * (tile.shape[1] // COLUMNS), 1, 1, ROWS, COLUMNS], desc.layout)
    return pieces.index(panel * PIECES + i)
