"""Dropout's random bits in the layouts of wgmma's results."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tilewise.backends.gpu_math import philox


@gluon.constexpr_function
def words_layout(cols):
    """Of philox's words [64, cols // 8], so that each of 4 warps draws the bits of its own elements [64, cols]."""
    registers = [[8, 0], *([0, 4 << i] for i in range((cols // 32).bit_length() - 1))]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, cols // 8])


@gluon.constexpr_function
def transposed_words_layout(cols, rows):
    """Likewise of words [cols // 8, rows] for 8 warps, 128 columns. A word's bits are those of another warp's elements: they
    go through shared memory."""
    registers = [[0, 1], *([0, 8 << i] for i in range((rows // 32).bit_length() - 1))]
    lanes = [[0, 2], [0, 4], [0, rows // 4], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, rows // 2], [4, 0], [8, 0]], [], [cols // 8, rows])


@gluon.jit
def keep(RNG, t, b, h, heads, first_row, first_col, COLS: gl.constexpr, LAYOUT: gl.constexpr):
    """`philox.keep` of a tile [64, COLS] in the layout LAYOUT of 4 warps' products; in registers throughout."""
    WORDS: gl.constexpr = words_layout(COLS)
    rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, WORDS))
    groups = first_col // 8 + gl.arange(0, COLS // 8, gl.SliceLayout(0, WORDS))
    kept = philox.keep(RNG, t, b, h, heads, rows[:, None], groups[None, :], False)
    return gl.convert_layout(kept, LAYOUT, assert_trivial=True)


@gluon.jit
def keep_transposed(RNG, t, b, h, heads, first_row, first_col, ROWS: gl.constexpr, COLS: gl.constexpr, LAYOUT: gl.constexpr):
    """The same of a tile [COLS, ROWS] of 8 warps."""
    WORDS: gl.constexpr = transposed_words_layout(COLS, ROWS)
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(0, WORDS))
    groups = first_col // 8 + gl.arange(0, COLS // 8, gl.SliceLayout(1, WORDS))
    return gl.convert_layout(philox.keep(RNG, t, b, h, heads, rows[None, :], groups[:, None], True), LAYOUT)
