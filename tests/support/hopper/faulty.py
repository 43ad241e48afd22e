"""Gluon kernels that each have one fault."""
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from support.hopper.examples import LAYOUT, ROW, tma_load


@gluon.jit
def reads_unwritten(out):
    tile = gl.allocate_shared_memory(gl.float32, [2, 32, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    tile.index(0).store(gl.full([32, 32], 0.0, gl.float32, LAYOUT))
    tile.index(1).load(LAYOUT)


@gluon.jit
def reads_outside(out):
    gl.load(out + 96 + gl.arange(0, 64, layout=ROW))


@gluon.jit
def index_outside(out):
    tile = gl.allocate_shared_memory(gl.float32, [2, 32, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for i in range(3):
        tile.index(i).store(gl.full([32, 32], 0.0, gl.float32, LAYOUT))


@gluon.jit
def writes_twice(out):
    gl.store(out + gl.arange(0, 128, layout=ROW), gl.program_id(0).to(gl.float32))


@gluon.jit
def waits_for_nobody(out):
    while gl.atomic_add(out, 0.0) == 0.0:
        pass


@gluon.jit
def behind(barrier, n):
    for _ in range(n):
        mbarrier.arrive(barrier, count=1)


@gluon.jit
def sleeper(barrier):
    mbarrier.wait(barrier, 0)
    mbarrier.wait(barrier, 1)


@gluon.jit
def outruns(out):
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    gl.warp_specialize([(sleeper, (barrier,)), (behind, (barrier, 2))], [1], [24])


@gluon.jit
def wrong_rank(out):
    rows = gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))
    gl.store(out + rows, gl.full([32, 32], 0.0, gl.float32, LAYOUT) + rows)


@triton.jit
def counted(n: tl.constexpr):
    return tl.arange(0, n)


@gluon.jit
def arange_without_layout(out):
    gl.store(out + counted(32), 0.0)


@gluon.jit
def not_simulated(out):
    gl.histogram(gl.arange(0, 128, layout=ROW), 2, layout=ROW)


@gluon.jit
def taken_twice(out):
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    zero = gl.zeros([64, 64], gl.float32, ACC)
    tile = gl.allocate_shared_memory(gl.float16, [64, 64], SHARED, zero.to(gl.float16))
    fence_async_shared()
    first = warpgroup_mma(tile, tile, zero, is_async=True)
    warpgroup_mma(tile, tile, first, is_async=True)
    warpgroup_mma_wait(0, deps=[first])


@gluon.jit
def odd_sizes(out):
    gl.store(out + gl.arange(0, 48, layout=ROW), 0.0)


@gluon.jit
def unknown_instruction(out):
    gl.inline_asm_elementwise("lop3.b32 $0, $1, $1, $1, 3;", "=r,r", [gl.program_id(0)], gl.int32, True, 1)


@gluon.jit
def transposed_fp8(out):
    LAYOUT_8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    tile = gl.allocate_shared_memory(gl.float8e4nv, [64, 64], gl.NVMMASharedLayout(64, 8, 2))
    warpgroup_mma(tile, tile, gl.zeros([64, 64], gl.float32, LAYOUT_8))


@gluon.jit
def taken_by_tma(source, out):
    """Data stored in this kernel reaches a TMA load without a fence between the proxies."""
    tile = gl.allocate_shared_memory(gl.float32, [32, 32], source.layout)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    fence_async_shared()
    gl.store(out + gl.arange(0, 128, layout=ROW), 1.0)
    mbarrier.expect(barrier, source.block_type.nbytes)
    tma_load(source, [0, 0], barrier, tile)
    mbarrier.wait(barrier, 0)
