"""dQ by itself (FlashAttention-2, algorithm 2, its loops exchanged), for Hopper: nothing is added in memory, so the bits are
the same each time.

A program has a block of queries and walks their keys, as the forward pass does: one warp, the producer, copies tiles by TMA;
two warpgroups, the consumers, have 64 queries each, whose Q and dO stay. A consumer issues S = Q K^T of tile t, dQ += dS K of
tile t - 1 with dS from registers, and dP = dO V^T of tile t, and computes the exponentials while the tensor cores work on the
latter two. So K is held for a tile longer than V, and has one stage more.

    EARLY_K_WAIT  waits for the next tile of K between the exponentials and the wait for dQ and dP, as in `forward_kernel.py`

Barriers, of which each stage has its own; n stages: phase of tile t: t // n % 2; n is STAGES for V, STAGES + 1 for K
    q_full          the producer's TMA -> the warpgroup whose queries they are, once, with dO
    k_full, v_full  the producer's TMA -> both consumers, each tile
    k_empty         both consumers, when dQ has tile t -> the producer, before it loads K of tile t + STAGES + 1
    v_empty         both consumers, when dP of tile t is there -> the producer, before it loads V of tile t + STAGES
    named 8         `hide`: the consumers, of each other

Before it: `preprocess`. Q, dO, dQ: TMA descriptors, whose blocks have 64 rows; K, V have BLOCK_N rows. Partial tiles come
first. drawn: (RNG, threshold, heads), from which dropout's bits come. HIDES and other names as in `forward_kernel.py`.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from tilewise.backends.gpu_math import gradients, masking
from tilewise.backends.gpu_math.places import place_together, sequence
from tilewise.backends.hopper import dropout
from tilewise.backends.hopper.gluon_names import FIRST_BARRIER, named_barrier, tma_store, tma_store_wait
from tilewise.backends.hopper.products import ROWS, result_layout
from tilewise.backends.hopper.tiles import as_block, first_of, first_of_full, hide_rows, load, reaches_out, store_rows

WARPGROUPS = gl.constexpr(2)


@gluon.jit
def producer(descs, tiles, barriers, where, r, masked, total, LIST, VISIT: gl.constexpr, STAGES: gl.constexpr,
             BLOCK_N: gl.constexpr):
    q_desc, k_desc, v_desc, do_desc, _dq_desc = descs
    q_tiles, k_tiles, v_tiles, do_tiles = tiles
    q_full, k_full, k_empty, v_full, v_empty = barriers
    _b, h, h_kv, q_slot, q_row, k_slot, k_row, _nq, _nk = where
    if total > 0:
        for w in gl.static_range(WARPGROUPS):
            mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
            load(q_desc, q_slot, h, q_row + w * ROWS, q_full.index(w), q_tiles.index(w), False)
            load(do_desc, q_slot, h, q_row + w * ROWS, q_full.index(w), do_tiles.index(w), False)
    for t in range(total):
        row = k_row + first_of(r, t, masked, LIST, VISIT, BLOCK_N)
        slot = t % (STAGES + 1)
        mbarrier.wait(k_empty.index(slot), (t // (STAGES + 1) & 1) ^ 1)
        load(k_desc, k_slot, h_kv, row, k_full.index(slot), k_tiles.index(slot), True)
        slot = t % STAGES
        mbarrier.wait(v_empty.index(slot), (t // STAGES & 1) ^ 1)
        load(v_desc, k_slot, h_kv, row, v_full.index(slot), v_tiles.index(slot), True)


@gluon.jit
def hide(k, first, r, turn, WARPGROUP: gl.constexpr):
    """Hides the keys that no query of the block sees: 0 * NaN would reach dQ. Both warpgroups take part and wait for each
    other."""
    if reaches_out(first, k.shape[0], r[8], r[9]):
        hide_rows(k, first, r[8], r[9], WARPGROUP, WARPGROUPS)
        fence_async_shared()
        turn = named_barrier("sync", FIRST_BARRIER, WARPGROUPS * 128, turn)
    return turn


@gluon.jit
def products(a, b):
    """A B^T, issued."""
    BLOCK_N: gl.constexpr = b.shape[0]
    LAYOUT: gl.constexpr = result_layout(BLOCK_N)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def add(dq, ds, k):
    """dQ + dS K, issued. dS is carried from tile to tile in fp32: halves would be unpacked and packed again."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    return warpgroup_mma(gl.convert_layout(ds.to(k.dtype), OPERAND, assert_trivial=True), k, dq, is_async=True)


@gluon.jit
def step(tiles, barriers, dq, ds, turn, t, total, first, lse, delta, row, where, r, scale, drawn, program, SCORE: gl.constexpr,
         SCORE_GRADIENT: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr, DROPOUT: gl.constexpr, HIDES: gl.constexpr,
         FIRST: gl.constexpr, MASKED: gl.constexpr, WARPGROUP: gl.constexpr, STAGES: gl.constexpr, EARLY_K_WAIT: gl.constexpr):
    """Takes tile t - 1, whose dS comes, into dQ, and returns dS of tile t, whose first column is `first`."""
    q_tiles, k_tiles, v_tiles, do_tiles = tiles
    _q_full, k_full, k_empty, v_full, v_empty = barriers
    b, h, _h_kv, _q_slot, _q_row, _k_slot, _k_row, nq, nk = where
    K_STAGES: gl.constexpr = STAGES + 1
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    LAYOUT: gl.constexpr = result_layout(BLOCK_N)
    before, slot, after, v_slot = (t - 1) % K_STAGES, t % K_STAGES, (t + 1) % K_STAGES, t % STAGES
    k, v = k_tiles.index(slot), v_tiles.index(v_slot)
    if not FIRST and not EARLY_K_WAIT:
        mbarrier.wait(k_full.index(slot), t // K_STAGES & 1)
    if MASKED and HIDES:
        turn = hide(k, first, r, turn, WARPGROUP)
    s = products(q_tiles.index(WARPGROUP), k)
    if not FIRST:
        dq = add(dq, ds, k_tiles.index(before))
    mbarrier.wait(v_full.index(v_slot), t // STAGES & 1)
    dp = products(do_tiles.index(WARPGROUP), v)
    s = warpgroup_mma_wait(1 if FIRST else 2, deps=[s])
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    cols = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    p = gradients.probabilities(s, lse[:, None], scale, b, h, rows[:, None], cols[None, :], nq, nk, None, None, program, SCORE,
                                MASK, None, RAW, False, MASKED)
    if DROPOUT:
        RNG, threshold, heads = drawn
        keep = dropout.keep(RNG, threshold, b, h, heads, row, first, BLOCK_N, LAYOUT)
    if EARLY_K_WAIT:
        mbarrier.wait(k_full.index(after), (t + 1) // K_STAGES & 1, pred=t + 1 < total)
    if FIRST:
        dp = warpgroup_mma_wait(0, deps=[dp])
    else:
        dq, dp = warpgroup_mma_wait(0, deps=[dq, dp])
        mbarrier.arrive(k_empty.index(before), count=1)
    mbarrier.arrive(v_empty.index(v_slot), count=1)
    if DROPOUT:
        dp = gradients.through_dropout(dp, keep, threshold)
    _, ds = gradients.of_scores(p, s, dp, delta[:, None], scale, b, h, rows[:, None], cols[None, :], nq, nk, program,
                                SCORE_GRADIENT, MASKED)
    return dq, ds, turn


@gluon.jit
def consumer(descs, tiles, barriers, where, r, masked, total, block_row, LIST, DQ, LSE, DELTA, dq_stride, scale, drawn, program,
             SCORE: gl.constexpr, SCORE_GRADIENT: gl.constexpr, MASK: gl.constexpr, VISIT: gl.constexpr, RAW: gl.constexpr,
             DROPOUT: gl.constexpr, HIDES: gl.constexpr, PACKED: gl.constexpr, D: gl.constexpr, WARPGROUP: gl.constexpr,
             STAGES: gl.constexpr, BLOCK_N: gl.constexpr, EARLY_K_WAIT: gl.constexpr):
    q_tiles = tiles[0]
    q_full, k_full, _k_empty, _v_full, _v_empty = barriers
    _b, h, _h_kv, q_slot, q_row, _k_slot, _k_row, nq, _nk = where
    BLOCK_D: gl.constexpr = q_tiles.shape[2]
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, result_layout(BLOCK_N))
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    gl.static_assert(STAGES >= 2, "K of one tile is held until the products of the next one are issued")
    row = block_row + WARPGROUP * ROWS
    of_rows = row + gl.arange(0, ROWS, OF_ROWS)
    lse = gl.load(LSE + of_rows, mask=of_rows < nq, other=float("inf"))
    delta = gl.load(DELTA + of_rows, mask=of_rows < nq, other=0.0)
    dq = gl.zeros([ROWS, BLOCK_D], gl.float32, DQ_LAYOUT)
    if total > 0:
        mbarrier.wait(q_full.index(WARPGROUP), 0)
        mbarrier.wait(k_full.index(0), 0)
        first = first_of(r, 0, masked, LIST, VISIT, BLOCK_N)
        dq, ds, turn = step(
            tiles, barriers, dq, None, q_row, 0, total, first, lse, delta, row, where, r, scale, drawn, program, SCORE,
            SCORE_GRADIENT, MASK, RAW, DROPOUT, HIDES, True, True, WARPGROUP, STAGES, EARLY_K_WAIT)
        for t in range(1, masked):
            first = first_of(r, t, masked, LIST, VISIT, BLOCK_N)
            dq, ds, turn = step(
                tiles, barriers, dq, ds, turn, t, total, first, lse, delta, row, where, r, scale, drawn, program, SCORE,
                SCORE_GRADIENT, MASK, RAW, DROPOUT, HIDES, False, True, WARPGROUP, STAGES, EARLY_K_WAIT)
        for t in range(gl.maximum(masked, 1), total):
            first = first_of_full(r, t - masked, LIST, VISIT, BLOCK_N)
            dq, ds, turn = step(
                tiles, barriers, dq, ds, turn, t, total, first, lse, delta, row, where, r, scale, drawn, program, SCORE,
                SCORE_GRADIENT, MASK, RAW, DROPOUT, HIDES, False, False, WARPGROUP, STAGES, EARLY_K_WAIT)
        dq = warpgroup_mma_wait(0, deps=[add(dq, ds, tiles[1].index((total - 1) % (STAGES + 1)))])
    tile = q_tiles.index(WARPGROUP)     # nothing reads Q any more
    tile.store((dq * scale).to(tile.dtype))
    if PACKED:                          # the rows behind the sequence's own are another's
        store_rows(tile, DQ, dq_stride, row, nq - row, D)
    else:
        fence_async_shared()
        tma_store(descs[4], [q_slot, h, q_row + WARPGROUP * ROWS, 0], as_block(tile, descs[4]))
        tma_store_wait(0)


@gluon.jit
def query_gradients(q_desc, k_desc, v_desc, do_desc, dq_desc, DQ, LSE, DELTA, RNG, LIST, Q_ROWS, K_ROWS, WORK, dq_strides,
                    scale, heads, group, together, nq, nk, lse_rows, dropout, captured, ints, floats, SCORE: gl.constexpr,
                    SCORE_GRADIENT: gl.constexpr, MASK: gl.constexpr, KEYS: gl.constexpr, VISIT: gl.constexpr,
                    RAW: gl.constexpr, DROPOUT: gl.constexpr, HIDES: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
                    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr,
                    EARLY_K_WAIT: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):
    """One program for BLOCK_M queries of a head; launched with 4 warps. LSE: as `preprocess` leaves it."""
    PACKED: gl.constexpr = WORK is not None
    TYPE: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    gl.static_assert(BLOCK_M == WARPGROUPS * ROWS, "two warpgroups of 64 queries")
    blocks = gl.cdiv(nq, BLOCK_M)
    b, h, h_kv, first = place_together(gl.program_id(0), WORK, blocks, heads, group, together, BLOCK_M)
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = gl.maximum(b, 0)
    program = (captured, ints, floats)
    rows = first + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0]))
    r = masking.visits(KEYS, VISIT, LIST, b, h, heads, rows, first // BLOCK_M, blocks, gl.minimum(nq, first + BLOCK_M), nq, nk,
                       nk, program, BLOCK_N)
    masked = masking.count(r, True, 0)
    total = masked + masking.count(r, False, 0)
    q_tiles = gl.allocate_shared_memory(TYPE, [WARPGROUPS, ROWS, BLOCK_D], TILE)
    do_tiles = gl.allocate_shared_memory(TYPE, [WARPGROUPS, ROWS, BLOCK_DV], TILE)
    k_tiles = gl.allocate_shared_memory(TYPE, [STAGES + 1, BLOCK_N, BLOCK_D], TILE)
    v_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, BLOCK_DV], TILE)
    q_full = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=WARPGROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, do_desc, dq_desc)
    tiles = (q_tiles, k_tiles, v_tiles, do_tiles)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    where = (b, h, h_kv, q_slot, q_start + first, k_slot, k_start, nq, nk)
    DQ += q_slot.to(gl.int64) * dq_strides[0] + h.to(gl.int64) * dq_strides[1] + q_start * dq_strides[2]
    LSE += (q_slot * heads + h).to(gl.int64) * lse_rows + q_start
    DELTA += (q_slot * heads + h).to(gl.int64) * lse_rows + q_start
    gl.warp_specialize([
        (consumer, (descs, tiles, barriers, where, r, masked, total, first, LIST, DQ, LSE, DELTA, dq_strides[2], scale,
                    (RNG, dropout, heads), program, SCORE, SCORE_GRADIENT, MASK, VISIT, RAW, DROPOUT, HIDES, PACKED, D, 0,
                    STAGES, BLOCK_N, EARLY_K_WAIT)),
        (consumer, (descs, tiles, barriers, where, r, masked, total, first, LIST, DQ, LSE, DELTA, dq_strides[2], scale,
                    (RNG, dropout, heads), program, SCORE, SCORE_GRADIENT, MASK, VISIT, RAW, DROPOUT, HIDES, PACKED, D, 1,
                    STAGES, BLOCK_N, EARLY_K_WAIT)),
        (producer, (descs, tiles, barriers, where, r, masked, total, LIST, VISIT, STAGES, BLOCK_N)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
