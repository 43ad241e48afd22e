"""The producer of `backward_kernel.py`: which tiles of queries come when, and what it tells of them."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tilewise.backends.gpu_math import masking
from tilewise.backends.hopper.gluon_names import thread_barrier, tma_load
from tilewise.backends.hopper.messages import tell
from tilewise.backends.hopper.tiles import first_of, load

# What is told of a tile: its first row in memory, inverted if no element is hidden; its head, -1 behind the last tile; how many
# rows the sequence has from there.
ROW, HEAD, LEFT = map(gl.constexpr, range(3))
FIELDS = gl.constexpr(4)


@gluon.constexpr_function
def has(PART, gradient):
    """Whether a launch for PART computes a gradient."""
    return gradient in PART.split()


@gluon.jit
def visits(QUERIES: gl.constexpr, VISIT: gl.constexpr, LIST, where, h, heads, cols, block, blocks, program,
           BLOCK_M: gl.constexpr):
    """(visits, how many tiles are partial, how many there are) of the block of keys by the queries of head h."""
    b, _h_kv, _q_slot, _q_row, _k_slot, _k_row, nq, nk = where
    r = masking.visits(QUERIES, VISIT, LIST, b, h, heads, cols, block, blocks, nk, nq, nk, nq, program, BLOCK_M)
    masked = masking.count(r, True, 0)
    return r, masked, masked + masking.count(r, False, 0)


@gluon.jit
def producer(descs, tiles, barriers, where, heads, group, first_col, blocks, LIST, lse_rows, program, QUERIES: gl.constexpr,
             VISIT: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, _dk_desc, _dv_desc = descs
    q_tiles, do_tiles, lse_tiles, delta_tiles, messages, row_tiles, k_tile, v_tile = tiles
    kv_full, q_full, do_full, empty = barriers
    _b, h_kv, q_slot, q_row, k_slot, k_row, nq, _nk = where
    if has(PART, "dk"):
        mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        load(v_desc, k_slot, h_kv, k_row + first_col, kv_full, v_tile, False)
    else:
        mbarrier.expect(kv_full, k_desc.block_type.nbytes)
    load(k_desc, k_slot, h_kv, k_row + first_col, kv_full, k_tile, False)
    cols = first_col + gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [1], [0]))
    slot, phase = 0, 0
    for member in range(group):
        h = h_kv * group + member
        r, masked, total = visits(QUERIES, VISIT, LIST, where, h, heads, cols, first_col // BLOCK_N, blocks, program, BLOCK_M)
        statistics = (q_slot * heads + h) * lse_rows
        for t in range(total):
            first = first_of(r, t, masked, LIST, VISIT, BLOCK_M)
            row = q_row + first
            mbarrier.wait(empty.index(slot), phase ^ 1)
            tell(messages, slot * FIELDS, (gl.where(t < masked, row, ~row), h, nq - first))
            row_tiles.index(slot).store(first + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [1], [0])))
            thread_barrier()            # all threads have stored before one of them arrives
            mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
            load(q_desc, q_slot, h, row, q_full.index(slot), q_tiles.index(slot), False)
            tma_load(lse_desc, [statistics + row], q_full.index(slot), lse_tiles.index(slot))
            mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
            load(do_desc, q_slot, h, row, do_full.index(slot), do_tiles.index(slot), False)
            tma_load(delta_desc, [statistics + row], do_full.index(slot), delta_tiles.index(slot))
            slot, phase = advance(slot, phase, STAGES)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    tell(messages, slot * FIELDS, (0, -1, 0))
    thread_barrier()
    mbarrier.arrive(q_full.index(slot), count=1)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next stage and its phase."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)
