"""Small Gluon kernels that use what attention kernels use. With mbarriers "full" and "empty" for each slot of a ring."""
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from support.hopper import named_barrier, simulate, store_complete, tma_reduce_add
from tilewise.backends.gpu_math import elementary, softmax
from tilewise.backends.hopper import dropout

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def tma_add(desc, coord, src, _semantic=None):
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@gluon.jit
def instruction(TEXT: gl.constexpr, token):
    """One without a result; `token`, any int32 scalar, goes through it and so keeps the order."""
    return gl.inline_asm_elementwise(TEXT + " mov.b32 $0, $1;", "=r,r", [token], gl.int32, False, 1)


@gluon.jit
def tma_complete(PENDINGS: gl.constexpr, token):
    return instruction(gl.constexpr(f"cp.async.bulk.wait_group {PENDINGS};"), token)


@gluon.jit
def turn(OPERATION: gl.constexpr, NUMBER: gl.constexpr, THREADS: gl.constexpr, token):
    return instruction(gl.constexpr(f"bar.{OPERATION} {NUMBER}, {THREADS};"), token)


simulate(tma_add, tma_reduce_add)
simulate(tma_complete, store_complete)
simulate(turn, named_barrier)


LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
ROW = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def ring(STAGES: gl.constexpr):
    """Barriers of a ring of slots with one reader."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return full, empty


@gluon.jit
def rows_and_columns(ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    return rows, gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))[None, :]


# --- a copy through a ring of slots, from `first_row` on ------------------------------------------------------------------


@gluon.jit
def load_tiles(source, tiles, full, empty, first_row, n, STAGES: gl.constexpr):
    for i in range(n):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), source.block_type.nbytes)
        tma_load(source, [first_row + i * source.block_type.shape[0], 0], full.index(slot), tiles.index(slot))


@gluon.jit
def store_tiles(target, tiles, staging, full, empty, first_row, n, FUNCTION: gl.constexpr, STAGES: gl.constexpr):
    for i in range(n):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), (i // STAGES) & 1)
        x = tiles.index(slot).load(LAYOUT)
        mbarrier.arrive(empty.index(slot), count=1)
        tma.store_wait(0)
        staging.store(FUNCTION(x).to(target.dtype))
        fence_async_shared()
        tma_store(target, [first_row + i * target.block_type.shape[0], 0], staging)
    tma.store_wait(0)


@gluon.jit
def copy(source, target, first_row, n, FUNCTION: gl.constexpr, STAGES: gl.constexpr):
    ROWS: gl.constexpr = source.block_type.shape[0]
    tiles = gl.allocate_shared_memory(source.dtype, [STAGES, ROWS, source.block_type.shape[1]], source.layout)
    staging = gl.allocate_shared_memory(target.dtype, target.block_type.shape, target.layout)
    full, empty = ring(STAGES)
    gl.warp_specialize([
        (store_tiles, (target, tiles, staging, full, empty, first_row, n, FUNCTION, STAGES)),
        (load_tiles, (source, tiles, full, empty, first_row, n, STAGES)),
    ], [1], [24])


@gluon.jit
def transpose_heads(source, target):
    """[B, S, H, D] to [B, H, S, D], by TMA: program (tile of S, H, B)."""
    ROWS: gl.constexpr = source.block_type.shape[1]
    COLUMNS: gl.constexpr = source.block_type.shape[3]
    tile = gl.allocate_shared_memory(source.dtype, [ROWS, COLUMNS], gl.NVMMASharedLayout(128, 32, 2))
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    fence_async_shared()
    first_row = gl.program_id(0) * ROWS - 8
    mbarrier.expect(barrier, source.block_type.nbytes)
    tma_load(source, [gl.program_id(2), first_row, gl.program_id(1), 0], barrier, tile)
    mbarrier.wait(barrier, 0)
    tma_store(target, [gl.program_id(2), gl.program_id(1), first_row, 0], tile)
    tma.store_wait(0)


# --- c = a @ b.T, one product always in flight ---------------------------------------------------------------------------


@gluon.jit
def load_operands(a, b, a_tiles, b_tiles, full, empty, n, STAGES: gl.constexpr):
    for i in range(n):
        slot = i % STAGES
        k = i * a.block_type.shape[1]
        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), a.block_type.nbytes + b.block_type.nbytes)
        tma_load(a, [gl.program_id(0) * a.block_type.shape[0], k], full.index(slot), a_tiles.index(slot))
        tma_load(b, [gl.program_id(1) * b.block_type.shape[0], k], full.index(slot), b_tiles.index(slot))


@gluon.jit
def multiply(c, a_tiles, b_tiles, c_tile, full, empty, n, STAGES: gl.constexpr):
    ROWS: gl.constexpr = c.block_type.shape[0]
    COLUMNS: gl.constexpr = c.block_type.shape[1]
    K_STEP: gl.constexpr = 256 // a_tiles.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, K_STEP])
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    for i in range(n):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), (i // STAGES) & 1)
        acc = warpgroup_mma(a_tiles.index(slot), b_tiles.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((i - 1 + STAGES) % STAGES), count=1, pred=i > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    c_tile.store(acc.to(c.dtype))
    fence_async_shared()
    tma_store(c, [gl.program_id(0) * ROWS, gl.program_id(1) * COLUMNS], c_tile)
    tma.store_wait(0)


@gluon.jit
def product(a, b, c, n, STAGES: gl.constexpr):
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, a.block_type.shape[0], a.block_type.shape[1]], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, b.block_type.shape[0], b.block_type.shape[1]], b.layout)
    c_tile = gl.allocate_shared_memory(c.dtype, c.block_type.shape, c.layout)
    full, empty = ring(STAGES)
    gl.warp_specialize([
        (multiply, (c, a_tiles, b_tiles, c_tile, full, empty, n, STAGES)),
        (load_operands, (a, b, a_tiles, b_tiles, full, empty, n, STAGES)),
    ], [1], [24])


# --- softmax-like: P from registers, V and K transposed or not ------------------------------------------------------------


@gluon.jit
def attend(q, k, v, out, FUNCTION: gl.constexpr):
    """out = FUNCTION(q @ k.T) @ v, and shared memory seen through views; one partition."""
    M: gl.constexpr = q.block_type.shape[0]
    N: gl.constexpr = k.block_type.shape[0]
    D: gl.constexpr = q.block_type.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    memory = gl.allocate_shared_memory(q.dtype, [3, N, D], k.layout)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    fence_async_shared()
    mbarrier.expect(barrier, q.block_type.nbytes + 2 * k.block_type.nbytes)
    q_tile = memory.index(0)._reinterpret(q.dtype, [M, D], q.layout)
    tma_load(q, [0, 0], barrier, q_tile)
    tma_load(k, [0, 0], barrier, memory.index(1))
    tma_load(v, [0, 0], barrier, memory.index(2))
    mbarrier.wait(barrier, 0)
    s = warpgroup_mma(q_tile, memory.index(1).permute((1, 0)), gl.zeros([M, N], gl.float32, S_LAYOUT), use_acc=False,
                      is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    p = gl.convert_layout(FUNCTION(s).to(q.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    o = warpgroup_mma(p, memory.index(2), gl.zeros([M, D], gl.float32, O_LAYOUT), is_async=True)
    o = warpgroup_mma_wait(0, deps=[o])
    q_tile.store(o.to(q.dtype))
    fence_async_shared()
    tma_store(out, [0, 0], q_tile)
    tma.store_wait(0)


# --- turns by named barriers ----------------------------------------------------------------------------------------------


@gluon.jit
def take_turns(tile, n, SECOND: gl.constexpr, MINE: gl.constexpr, OTHER: gl.constexpr):
    token = n
    if SECOND:
        token = turn("arrive", OTHER, 256, token)
    for _ in range(n):
        token = turn("sync", MINE, 256, token)
        x = tile.load(LAYOUT)
        tile.store(x + 1.0 if SECOND else x * 2.0)
        token = turn("arrive", OTHER, 256, token)
    if not SECOND:
        token = turn("sync", MINE, 256, token)


@gluon.jit
def turns(out, n):
    """Two warpgroups in turn double a tile and add 1."""
    tile = gl.allocate_shared_memory(gl.float32, [32, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    tile.store(gl.full([32, 32], 1.0, gl.float32, LAYOUT))
    gl.warp_specialize([
        (take_turns, (tile, n, False, 8, 9)),
        (take_turns, (tile, n, True, 9, 8)),
    ], [4], [96])
    rows, columns = rows_and_columns(32, 32, LAYOUT)
    gl.store(out + rows * 32 + columns, tile.load(LAYOUT))


# --- programs that meet ---------------------------------------------------------------------------------------------------


@gluon.jit
def sum_by_tma(x, total):
    """Every program adds a tile to the same one."""
    tile = gl.allocate_shared_memory(gl.float32, total.block_type.shape, total.layout)
    rows, columns = rows_and_columns(total.block_type.shape[0], total.block_type.shape[1], LAYOUT)
    tile.store(gl.load(x + gl.program_id(0) * total.block_type.shape[0] * total.block_type.shape[1]
                       + rows * total.block_type.shape[1] + columns))
    fence_async_shared()
    tma_add(total, [0, 0], tile)
    tma.store_wait(0)


@gluon.jit
def sum_in_order(x, total, turn, N: gl.constexpr, BY_TMA: gl.constexpr):
    """The same in the order of the programs, `turn` being whose turn it is; `total` a descriptor if BY_TMA, else a pointer."""
    rows, columns = rows_and_columns(N, N, LAYOUT)
    offsets = rows * N + columns
    mine = gl.load(x + gl.program_id(0) * N * N + offsets)
    if BY_TMA:
        tile = gl.allocate_shared_memory(gl.float32, [N, N], total.layout)
        tile.store(mine)
        fence_async_shared()
    while gl.atomic_add(turn, 0, sem="acquire") != gl.program_id(0):
        pass
    if BY_TMA:
        tma_add(total, [0, 0], tile)
        tma_complete(0, gl.program_id(0))
    else:
        gl.store(total + offsets, gl.load(total + offsets) + mine)
    gl.thread_barrier()
    gl.atomic_add(turn, 1, sem="release")


@gluon.jit
def by_tickets(out, counter, n):
    """Programs take the next of n rows as they get to it."""
    columns = gl.arange(0, 128, layout=ROW)
    row = gl.atomic_add(counter, 1)
    while row < n:
        gl.store(out + row.to(gl.int64) * 128 + columns, gl.program_id(0).to(gl.float32) + columns * 0.0)
        row = gl.atomic_add(counter, 1)


@gluon.jit
def by_assembly(out):
    """All threads wait for each other and double what they have stored."""
    tile = gl.allocate_shared_memory(gl.float32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile.store(gl.full([128], 1.0, gl.float32, ROW))
    instruction(gl.constexpr("bar.sync 9, 128;"), gl.program_id(0))
    gl.store(out + gl.arange(0, 128, layout=ROW), tile.load(ROW) * 2.0)


# --- arithmetic -----------------------------------------------------------------------------------------------------------


@gluon.jit
def kept(seeds, out, threshold, h, heads, first_row, first_col, ROWS: gl.constexpr, COLS: gl.constexpr):
    """What dropout keeps of a tile [ROWS, COLS]: by 8 warps, transposed; by 4, of 64 rows."""
    if gl.num_warps() == 4:
        TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
        i, j = rows_and_columns(ROWS, COLS, TILE)
        keep = dropout.keep(seeds, threshold, gl.program_id(0), h, heads, first_row, first_col, COLS, TILE)
        gl.store(out + i * COLS + j, keep)
    else:
        TURNED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, ROWS, 16])
        j, i = rows_and_columns(COLS, ROWS, TURNED)
        keep = dropout.keep_transposed(seeds, threshold, gl.program_id(0), h, heads, first_row, first_col, ROWS, COLS, TURNED)
        gl.store(out + i * COLS + j, keep)


@triton.jit
def floor_divide(a, b):
    quotient = a // b
    return tl.where((quotient * b != a) & ((a < 0) != (b < 0)), quotient - 1, quotient)


@gluon.jit
def arithmetic(x, i, floats, integers):
    """Rows of results that `test_hopper_simulator.py` computes again with torch; x is bf16 [64], i int32 [64]."""
    at = gl.arange(0, 64, layout=ROW)
    a, b, n = gl.load(x + at), gl.load(x + 63 - at), gl.load(i + at)
    gl.store(floats + at, (a * b + a).to(gl.float32))
    gl.store(floats + 64 + at, a / b)
    gl.store(floats + 128 + at, gl.sum(a.to(gl.float32), 0) + gl.max(a, 0) * gl.min(a, 0) + at.to(gl.float32))
    gl.store(floats + 192 + at, (a.to(gl.float32) * 300.0).to(gl.float8e4nv).to(gl.float32))
    gl.store(floats + 256 + at, gl.where(at < 5, gl.exp2(a.to(gl.float32)), 3))
    gl.store(floats + 320 + at, gl.load(x + at, mask=at > 9, other=-1.0).to(gl.float32))
    gl.store(integers + at, n // 7)
    gl.store(integers + 64 + at, n % 7)
    gl.store(integers + 128 + at, floor_divide(n, 7))
    gl.store(integers + 192 + at, n * 0x7654321)
    gl.store(integers + 256 + at, (n.to(gl.uint32) >> 3).to(gl.int32))
    gl.store(integers + 320 + at, a.to(gl.int16, bitcast=True).to(gl.int32))


@gluon.jit
def softmax_of(x, out, sums):
    """Two tiles of scores through the leaf functions of the GPU backends."""
    rows, columns = rows_and_columns(64, 64, LAYOUT)
    m = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    l = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
    acc = gl.full([64, 64], 0.0, gl.float32, LAYOUT)
    for tile in range(2):
        s = elementary.tanh(gl.load(x + rows * 128 + tile * 64 + columns))
        m, l, acc, p = softmax.update(m, l, acc, s, softmax.LOG2E, False)
        acc += p
    acc, lse = softmax.finalize(m, l, acc, False)
    gl.store(out + rows * 64 + columns, acc)
    gl.store(sums + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), lse)
