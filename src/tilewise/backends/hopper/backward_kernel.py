"""FlashAttention-3, backward (Shah et al. 2024, section 3.3 and appendix B.1), for Hopper, in Gluon.

A program has a block of keys and walks the blocks of queries of all heads of its group. One warp, the producer, finds out
which, and copies tiles by TMA; eight warps multiply. Scores are transposed, S^T = K Q^T, so that P^T and dS^T feed dV and dK
from registers. dS goes through shared memory once, for dQ, which TMA adds to global memory in fp32, in any order.
dV and dK leave few registers: lse, delta, the numbers of the rows and what `tell` says wait in shared memory.

    PART          "": all gradients; " dk": dQ and dK, " dv": dV, where registers do not hold both accumulators
    EARLY_Q_WAIT  waits for the next tile of Q between the exponentials and the wait for dP = V dO^T, as in `forward_kernel.py`.

Barriers, of which each stage has its own; phase of tile i, counted over all heads of the group: i // STAGES % 2 (`advance`)
    kv_full           the producer's TMA -> the consumer, once
    q_full, do_full   the producer's TMA -> the consumer, each tile; q_full also when there are no more
    empty             the consumer, after dK and dV are there -> the producer, before it loads tile i + STAGES

Before it: `preprocess`, dQ set to 0. After it: dQ lacks the factor `scale`. Q, dO, dQ have blocks of BLOCK_M rows, K, V, dK,
dV of BLOCK_N. Other names as in `forward_kernel.py`.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from tilewise.backends.gpu_math import gradients, masking, scoring
from tilewise.backends.gpu_math.places import place, sequence
from tilewise.backends.hopper.gluon_names import reinterpret, thread_barrier, tma_add, tma_load, tma_store, tma_store_wait
from tilewise.backends.hopper.tiles import as_block, first_of, hide_rows, load, store_rows


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
             VISIT: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, _dq_desc, _dk_desc, _dv_desc = descs
    q_tiles, do_tiles, lse_tiles, delta_tiles, messages, row_tiles, k_tile, v_tile, _ds_tile, _dq_tile = tiles
    kv_full, q_full, do_full, empty = barriers
    _b, h_kv, q_slot, q_row, k_slot, k_row, nq, _nk = where
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    load(k_desc, k_slot, h_kv, k_row + first_col, kv_full, k_tile, False)
    load(v_desc, k_slot, h_kv, k_row + first_col, kv_full, v_tile, False)
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
            tell(messages, slot, gl.where(t < masked, row, ~row), h, nq - first)
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
    tell(messages, slot, 0, -1, 0)
    thread_barrier()
    mbarrier.arrive(q_full.index(slot), count=1)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next stage and its phase."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def tell(messages, slot, row, h, left):
    """Of a tile: its first row in memory, inverted if no element is hidden; its head, -1 behind the last tile; how many rows
    the sequence has from there."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    messages.index(4 * slot).store(gl.full([1], row, gl.int32, ONE))
    messages.index(4 * slot + 1).store(gl.full([1], h, gl.int32, ONE))
    messages.index(4 * slot + 2).store(gl.full([1], left, gl.int32, ONE))


@gluon.jit
def told(messages, slot, FIELD: gl.constexpr):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(messages.index(4 * slot + FIELD).load(ONE), 0)


@gluon.jit
def hide(tile, left):
    """Hides rows behind the `left` ones of the sequence, which may be another's; where there are none TMA fills with 0."""
    if left < tile.shape[0]:
        hide_rows(tile, 0, 0, left, 0, 1)
        fence_async_shared()
        thread_barrier()


@gluon.jit
def hide_unseen(tile, first, where, group, program, QUERIES: gl.constexpr, VISIT: gl.constexpr, PACKED: gl.constexpr):
    """Hides the keys that no query of any head sees, such as padding; where tiles are listed, only those behind
    the sequence."""
    b, h_kv, _q_slot, _q_row, _k_slot, _k_row, nq, nk = where
    WARPS: gl.constexpr = gl.num_warps()
    PIECE: gl.constexpr = 4 * WARPS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    if VISIT == 1 or VISIT == 2:
        for piece in gl.static_range(tile.shape[0] // PIECE):
            some = tile.slice(piece * PIECE, PIECE)
            col = first + piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, LAYOUT))
            inside = gl.maximum(gl.minimum(col, nk - 1), 0)
            seen = col < 0
            for member in range(group):
                bands = QUERIES(b, h_kv * group + member, inside, nq, nk, program[0], program[1], program[2])
                seen = seen | ((col < nk) & (bands[0] <= bands[1]))
                if VISIT == 2:
                    seen = seen | ((col < nk) & (bands[4] <= bands[5]))
            x = some.load(LAYOUT)
            some.store(gl.where(seen[:, None], x, gl.zeros_like(x)))
        fence_async_shared()
        thread_barrier()
    elif PACKED:
        hide(tile, nk - first)


@gluon.jit
def step(descs, tiles, barriers, sums, slot, phase, row, h, cols, where, scale, program, SCORE: gl.constexpr,
         SCORE_GRADIENT: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr, PACKED: gl.constexpr, MASKED: gl.constexpr,
         PART: gl.constexpr, STAGES: gl.constexpr, EARLY_Q_WAIT: gl.constexpr):
    """One tile of queries, of head h; row: its first one in memory."""
    q_tiles, do_tiles, lse_tiles, delta_tiles, messages, row_tiles, k_tile, v_tile, ds_tile, dq_tile = tiles
    _kv_full, q_full, do_full, empty = barriers
    b, _h_kv, q_slot, _q_row, _k_slot, _k_row, nq, nk = where
    dk, dv = sums
    BLOCK_M: gl.constexpr = q_tiles.shape[1]
    BLOCK_N: gl.constexpr = k_tile.shape[0]
    BLOCK_D: gl.constexpr = k_tile.shape[1]
    TYPE: gl.constexpr = k_tile.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_D // 2, 16])
    ROWS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S_LAYOUT)
    after, phase_after = advance(slot, phase, STAGES)
    q, do = q_tiles.index(slot), do_tiles.index(slot)
    if MASKED and PACKED:
        hide(q, told(messages, slot, 2))
    s = warpgroup_mma(k_tile, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = lse_tiles.index(slot).load(ROWS)
    mbarrier.wait(do_full.index(slot), phase)
    if MASKED and PACKED:
        hide(do, told(messages, slot, 2))
    if PART == " dv":
        s = warpgroup_mma_wait(0, deps=[s])
    else:
        dp = warpgroup_mma(v_tile, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
    rows = row_tiles.index(slot).load(ROWS)
    p = gradients.probabilities(s, lse[None, :], scale, b, h, rows[None, :], cols[:, None], nq, nk, None, None, program, SCORE,
                                None, None, RAW, False, False)
    if EARLY_Q_WAIT:
        mbarrier.wait(q_full.index(after), phase_after)
    rows = row_tiles.index(slot).load(ROWS)             # again, here and below: kept, they would spill
    if MASKED:                                          # p, not s: lse behind the sequence may be NaN
        p = gl.where(scoring.visible(b, h, rows[None, :], cols[:, None], nq, nk, program, MASK), p, 0.0)
    if PART == " dv":
        dv = warpgroup_mma(gl.convert_layout(p.to(TYPE), OPERAND, assert_trivial=True), do, dv, is_async=True)
        dv = warpgroup_mma_wait(0, deps=[dv])
    else:
        if PART == "":
            p_operand = gl.convert_layout(p.to(TYPE), OPERAND, assert_trivial=True)
        dp = warpgroup_mma_wait(0, deps=[dp])
        delta = delta_tiles.index(slot).load(ROWS)
        rows = row_tiles.index(slot).load(ROWS)
        _, ds = gradients.of_scores(p, s, dp, delta[None, :], scale, b, h, rows[None, :], cols[:, None], nq, nk, program,
                                    SCORE_GRADIENT, MASKED)
        ds = ds.to(TYPE)
        if PART == "":
            dv = warpgroup_mma(p_operand, do, dv, is_async=True)
        ds_tile.store(ds)
        fence_async_shared()
        zero_dq = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, DQ_LAYOUT)
        dq = warpgroup_mma(ds_tile.permute((1, 0)), k_tile, zero_dq, use_acc=False, is_async=True)
        dk = warpgroup_mma(gl.convert_layout(ds, OPERAND, assert_trivial=True), q, dk, is_async=True)
        if PART == "":
            dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
        else:
            dq = warpgroup_mma_wait(1, deps=[dq])
        tma_store_wait(0)               # the tile before has left shared memory
        dq_tile.store(dq)
        fence_async_shared()
        tma_add(descs[6], [q_slot, h, row, 0], as_block(dq_tile, descs[6]))
        dk = warpgroup_mma_wait(0, deps=[dk])
    if not EARLY_Q_WAIT:
        mbarrier.wait(q_full.index(after), phase_after)
    mbarrier.arrive(empty.index(slot), count=1)
    return dk, dv


@gluon.jit
def consumer(descs, tiles, barriers, where, kv_heads, group, first_col, DK, DV_, WORK, K_ROWS, dk_strides, dv_strides,
             scale, program, SCORE: gl.constexpr, SCORE_GRADIENT: gl.constexpr, MASK: gl.constexpr,
             QUERIES: gl.constexpr, VISIT: gl.constexpr, RAW: gl.constexpr, PACKED: gl.constexpr, D: gl.constexpr,
             DV: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, EARLY_Q_WAIT: gl.constexpr):
    q_tiles, _do_tiles, _lse_tiles, _delta_tiles, messages, _row_tiles, k_tile, v_tile, _ds_tile, _dq_tile = tiles
    kv_full, q_full, _do_full, _empty = barriers
    _b, h_kv, _q_slot, _q_row, k_slot, k_row, _nq, nk = where
    BLOCK_M: gl.constexpr = q_tiles.shape[1]
    BLOCK_N: gl.constexpr = k_tile.shape[0]
    BLOCK_D: gl.constexpr = k_tile.shape[1]
    BLOCK_DV: gl.constexpr = v_tile.shape[1]
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_D, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_DV, 16])
    COLS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16]))
    gl.static_assert(STAGES >= 2, "it waits for the next tile of Q before it frees this one")
    dk = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, DK_LAYOUT)
    dv = gl.zeros([BLOCK_N, BLOCK_DV], gl.float32, DV_LAYOUT)
    cols = first_col + gl.arange(0, BLOCK_N, COLS)
    mbarrier.wait(kv_full, 0)
    hide_unseen(k_tile, first_col, where, group, program, QUERIES, VISIT, PACKED)
    if PACKED:                          # full tiles have no mask: dP of keys behind the sequence must be finite
        hide(v_tile, nk - first_col)
    slot, phase = 0, 0
    mbarrier.wait(q_full.index(0), 0)
    h = told(messages, 0, 1)
    while h >= 0:
        row = told(messages, slot, 0)
        if row >= 0:
            dk, dv = step(descs, tiles, barriers, (dk, dv), slot, phase, row, h, cols, where, scale, program, SCORE,
                          SCORE_GRADIENT, MASK, RAW, PACKED, True, PART, STAGES, EARLY_Q_WAIT)
        else:
            dk, dv = step(descs, tiles, barriers, (dk, dv), slot, phase, ~row, h, cols, where, scale, program, SCORE,
                          SCORE_GRADIENT, MASK, RAW, PACKED, False, PART, STAGES, EARLY_Q_WAIT)
        slot, phase = advance(slot, phase, STAGES)
        h = told(messages, slot, 1)
    if PACKED:                          # found again rather than kept in registers
        b, _, h_kv, first_col = place(gl.program_id(0), WORK, 0, kv_heads, 1, BLOCK_N, False)
        k_slot, k_row, nk = sequence(K_ROWS, b, nk)
    if PART != " dv":                   # nothing reads K and V any more
        store(descs[7], k_tile, dk * scale, k_slot, h_kv, k_row + first_col, nk - first_col, DK, dk_strides, PACKED, D)
    if PART != " dk":
        store(descs[8], v_tile, dv, k_slot, h_kv, k_row + first_col, nk - first_col, DV_, dv_strides, PACKED, DV)
    tma_store_wait(0)


@gluon.jit
def store(desc, tile, x, slot, head, row, left, X, strides, PACKED: gl.constexpr, DIM: gl.constexpr):
    """dK or dV to memory. PACKED: the rows behind the `left` ones are another sequence's. Swizzled unlike the tiles of the
    loop: what their addresses have in common would be kept in registers throughout it."""
    tile = reinterpret(tile, tile.dtype, tile.shape, gl.NVMMASharedLayout(64, 16))
    tile.store(x.to(tile.dtype))
    if PACKED:
        X += slot.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1]
        store_rows(tile, X, strides[2], row, left, DIM)
    else:
        fence_async_shared()
        tma_store(desc, [slot, head, row, 0], as_block(tile, desc))


@gluon.jit
def backward(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk_desc, dv_desc, DK, DV_, LIST, Q_ROWS, K_ROWS,
             WORK, dk_strides, dv_strides, scale, heads, group, nq, nk, lse_rows, captured, ints, floats, SCORE: gl.constexpr,
             SCORE_GRADIENT: gl.constexpr, MASK: gl.constexpr, QUERIES: gl.constexpr, VISIT: gl.constexpr, RAW: gl.constexpr,
             D: gl.constexpr, DV: gl.constexpr, PART: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
             BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr, EARLY_Q_WAIT: gl.constexpr,
             PRODUCER_REGISTERS: gl.constexpr):
    """One program for BLOCK_N keys of a key head; launched with 8 warps."""
    PACKED: gl.constexpr = WORK is not None
    TYPE: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    b, _, h_kv, first_col = place(gl.program_id(0), WORK, gl.cdiv(nk, BLOCK_N), heads // group, 1, BLOCK_N, False)
    blocks = gl.cdiv(nk, BLOCK_N)
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = gl.maximum(b, 0)
    program = (captured, ints, floats)
    q_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_M, BLOCK_D], TILE)
    do_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_M, BLOCK_DV], TILE)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    messages = gl.allocate_shared_memory(gl.int32, [4 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    row_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_tile = gl.allocate_shared_memory(TYPE, [BLOCK_N, BLOCK_D], TILE)
    v_tile = gl.allocate_shared_memory(TYPE, [BLOCK_N, BLOCK_DV], TILE)
    ds_tile = gl.allocate_shared_memory(TYPE, [BLOCK_N, BLOCK_M], TILE)
    dq_tile = gl.allocate_shared_memory(gl.float32, [BLOCK_M, BLOCK_D], gl.NVMMASharedLayout(128, 32))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk_desc, dv_desc)
    tiles = (q_tiles, do_tiles, lse_tiles, delta_tiles, messages, row_tiles, k_tile, v_tile, ds_tile, dq_tile)
    barriers = (kv_full, q_full, do_full, empty)
    where = (b, h_kv, q_slot, q_start, k_slot, k_start, nq, nk)
    gl.warp_specialize([
        (consumer, (descs, tiles, barriers, where, heads // group, group, first_col, DK, DV_, WORK, K_ROWS, dk_strides,
                    dv_strides, scale, program, SCORE, SCORE_GRADIENT, MASK, QUERIES, VISIT, RAW, PACKED, D, DV,
                    PART, STAGES, EARLY_Q_WAIT)),
        (producer, (descs, tiles, barriers, where, heads, group, first_col, blocks, LIST, lse_rows, program, QUERIES, VISIT,
                    STAGES, BLOCK_M, BLOCK_N)),
    ], [1], [PRODUCER_REGISTERS])
