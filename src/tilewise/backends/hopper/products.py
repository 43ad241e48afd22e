"""Products of a warpgroup's 64 rows. Rows too wide for one tile lie in several: sums of P V come in tuples, one for each."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from tilewise.backends.hopper import narrow

ROWS = gl.constexpr(64)                 # queries of a warpgroup


@gluon.constexpr_function
def result_layout(columns, fp8=False):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32 if fp8 else 16])


@gluon.jit
def scores(q_tiles, k_tiles, warpgroup, slot, PIECES: gl.constexpr):
    """Q K^T, issued."""
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    FP8: gl.constexpr = k_tiles.dtype.is_fp8()
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, result_layout(BLOCK_N, FP8))
    for i in gl.static_range(PIECES):
        q, k = q_tiles.index(warpgroup * PIECES + i), k_tiles.index(slot * PIECES + i)
        s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=i > 0, is_async=True)
    return s


@gluon.jit
def no_sums():
    return ()


@gluon.jit
def nothing(COLUMNS: gl.constexpr, PIECES: gl.constexpr, FP8: gl.constexpr):
    """The sums of no products."""
    acc = no_sums()
    for _ in gl.static_range(PIECES):
        acc += (gl.zeros([ROWS, COLUMNS], gl.float32, result_layout(COLUMNS, FP8)),)
    return acc


@gluon.jit
def add_products(p, v_tiles, slot, acc):
    """acc + P V, issued. Tiles of V in fp8 are transposed, and their keys in `narrow`'s order."""
    PIECES: gl.constexpr = len(acc)
    TYPE: gl.constexpr = v_tiles.dtype
    FP8: gl.constexpr = TYPE.is_fp8()
    RESULT: gl.constexpr = result_layout(v_tiles.shape[1 if FP8 else 2], FP8)
    if FP8:
        weights = gl.convert_layout(narrow.in_order(p), gl.DotOperandLayout(0, RESULT, 4), assert_trivial=True).to(TYPE)
    else:
        weights = gl.convert_layout(p.to(TYPE), gl.DotOperandLayout(0, RESULT, 2), assert_trivial=True)
    sums = no_sums()
    for i in gl.static_range(PIECES):
        v = v_tiles.index(slot * PIECES + i)
        sums += (warpgroup_mma(weights, v.permute((1, 0)) if FP8 else v, acc[i], is_async=True),)
    return sums


@gluon.jit
def finished(acc):
    """Waits until all products are there."""
    if len(acc) == 1:
        found = (warpgroup_mma_wait(0, deps=[acc[0]]),)
    else:
        found = warpgroup_mma_wait(0, deps=acc)
    return found


@gluon.jit
def scaled(acc, alpha):
    """Rows times alpha."""
    PIECES: gl.constexpr = len(acc)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc[0].type.layout))[:, None]
    sums = no_sums()
    for i in gl.static_range(PIECES):
        sums += (acc[i] * alpha,)
    return sums
