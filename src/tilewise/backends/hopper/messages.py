"""What a producer tells consumers: numbers in shared memory, which a barrier makes known."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tell(tile, first, numbers):
    """Puts numbers into shared memory, from place `first` on: all threads of a warp do."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    COUNT: gl.constexpr = len(numbers)
    for i in gl.static_range(COUNT):
        tile.index(first + i).store(gl.full([1], numbers[i], gl.int32, ONE))


@gluon.jit
def told(tile, place):
    """The number at a place, for all threads."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(tile.index(place).load(ONE), 0)
