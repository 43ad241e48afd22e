"""FlashAttention-3, forward (Shah et al. 2024, sections 3.1 and 3.2), for Hopper: warp-specialised, in Gluon.

One warp, the producer, copies tiles by TMA; two or three warpgroups, the consumers, have 64 queries each. A consumer issues
the scores of tile t and P V of tile t - 1 together, and computes the softmax of tile t while the tensor cores work on P V.

    PINGPONG      named barriers let one warpgroup issue its products while another one computes its softmax.
    EARLY_K_WAIT  waits for the next tile of K between softmax and the wait for P V. Written plainly, ptxas moves the
                  exponentials behind that wait and nothing overlaps; the spin loop of an mbarrier is a border that they do
                  not cross.

Barriers, of which each stage has its own; phase of tile t: t // STAGES % 2
    q_full          the producer's TMA -> the warpgroup whose queries they are, once
    k_full, v_full  the producer's TMA -> all consumers, each tile
    k_empty         all consumers, after the scores are there -> the producer, before it loads tile t + STAGES
    v_empty         all consumers, after P V is there -> the producer, likewise
    named 8, 9, 10  PINGPONG: warpgroup w waits at 8 + w for its turn, which the one before it gives away
    named 12        `hide`: all consumers, of each other

Q [slots, H, rows, D]  K [slots, H_kv, rows, D]  V [.., DV]  O like Q with DV columns: TMA descriptors, whose blocks have 64
rows, BLOCK_N rows for K and V. Other names as in `triton/forward_kernel.py`. Partial tiles come first.
HIDES: there may be keys, another sequence's or padding, whose values must not reach a sum even times 0.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from tilewise.backends.gpu_math import masking, scoring, softmax
from tilewise.backends.gpu_math.places import place_together, sequence
from tilewise.backends.hopper.gluon_names import FIRST_BARRIER, named_barrier, tma_store, tma_store_wait
from tilewise.backends.hopper.tiles import as_block, first_of, first_of_full, hide_rows, load, reaches_out, store_rows

ROWS = gl.constexpr(64)                 # queries of a warpgroup
HIDING = gl.constexpr(FIRST_BARRIER.value + 4)      # the named barrier of `hide`


@gluon.jit
def producer(descs, tiles, barriers, where, r, masked, total, LIST, VISIT: gl.constexpr, WARPGROUPS: gl.constexpr,
             STAGES: gl.constexpr, BLOCK_N: gl.constexpr):
    q_desc, k_desc, v_desc, _o_desc = descs
    q_tiles, k_tiles, v_tiles, _o_tiles = tiles
    q_full, k_full, k_empty, v_full, v_empty = barriers
    _b, h, h_kv, q_slot, q_row, k_slot, k_row, _nq, _nk = where
    if total > 0:
        load(k_desc, k_slot, h_kv, k_row + first_of(r, 0, masked, LIST, VISIT, BLOCK_N), k_full.index(0), k_tiles.index(0),
             True)
        for w in gl.static_range(WARPGROUPS):
            load(q_desc, q_slot, h, q_row + w * ROWS, q_full.index(w), q_tiles.index(w), True)
    for t in range(total):              # K runs a tile ahead
        if t + 1 < total:
            slot = (t + 1) % STAGES
            mbarrier.wait(k_empty.index(slot), ((t + 1) // STAGES & 1) ^ 1)
            first = first_of(r, t + 1, masked, LIST, VISIT, BLOCK_N)
            load(k_desc, k_slot, h_kv, k_row + first, k_full.index(slot), k_tiles.index(slot), True)
        slot = t % STAGES
        mbarrier.wait(v_empty.index(slot), (t // STAGES & 1) ^ 1)
        first = first_of(r, t, masked, LIST, VISIT, BLOCK_N)
        load(v_desc, k_slot, h_kv, k_row + first, v_full.index(slot), v_tiles.index(slot), True)


@gluon.jit
def attend(q, tiles, barriers, state, t, total, first, first_before, rows, where, r, scale, program, SCORE: gl.constexpr,
           MASK: gl.constexpr, RAW: gl.constexpr, HIDES: gl.constexpr, MASKED: gl.constexpr, WARPGROUP: gl.constexpr,
           WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr, EARLY_K_WAIT: gl.constexpr):
    """Scores and softmax of tile t, P V of tile t - 1. first, first_before: their first columns."""
    _q_tiles, k_tiles, v_tiles, _o_tiles = tiles
    _q_full, k_full, k_empty, v_full, v_empty = barriers
    m_i, l_i, acc, p, turn = state
    MY_TURN: gl.constexpr = FIRST_BARRIER + WARPGROUP
    NEXT_TURN: gl.constexpr = FIRST_BARRIER + (WARPGROUP + 1) % WARPGROUPS
    slot, before, after = t % STAGES, (t - 1) % STAGES, (t + 1) % STAGES
    weights = operand(p, acc, k_tiles.dtype)
    if not EARLY_K_WAIT:
        mbarrier.wait(k_full.index(slot), t // STAGES & 1)
    if MASKED:
        mbarrier.wait(v_full.index(before), (t - 1) // STAGES & 1)
        if HIDES:                       # before the turn: whoever waits for the others must not hold it
            turn = hide(v_tiles.index(before), first_before, r, turn, WARPGROUP, WARPGROUPS)
    if PINGPONG:
        turn = named_barrier("sync", MY_TURN, 256, turn)
    s = products(q, k_tiles.index(slot))
    if not MASKED:
        mbarrier.wait(v_full.index(before), (t - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
    if PINGPONG:
        turn = named_barrier("arrive", NEXT_TURN, 256, turn)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    m_i, l_i, alpha, p = softmax_of(s, m_i, l_i, first, rows, where, scale, program, SCORE, MASK, RAW, MASKED)
    if EARLY_K_WAIT:
        mbarrier.wait(k_full.index(after), (t + 1) // STAGES & 1, pred=t + 1 < total)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return m_i, l_i, acc, p, turn


@gluon.jit
def hide(v, first, r, turn, WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Hides the values that no query of the block sees; all warpgroups take part and wait for each other."""
    if reaches_out(v, first, r):
        hide_rows(v, first, r[8], r[9], WARPGROUP, WARPGROUPS)
        fence_async_shared()
        turn = named_barrier("sync", HIDING, WARPGROUPS * 128, turn)
    return turn


@gluon.jit
def operand(p, acc, TYPE: gl.constexpr):
    """P as what multiplies V. It is carried from tile to tile in fp32: halves would be unpacked and packed again."""
    return gl.convert_layout(p.to(TYPE), gl.DotOperandLayout(0, acc.type.layout, 2), assert_trivial=True)


@gluon.jit
def products(q, k):
    """Q K^T, issued."""
    BLOCK_N: gl.constexpr = k.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def softmax_of(s, m_i, l_i, first, rows, where, scale, program, SCORE: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr,
               MASKED: gl.constexpr):
    """Statistics, the factor of what was summed before, and probabilities."""
    b, h, _h_kv, _q_slot, _q_row, _k_slot, _k_row, nq, nk = where
    cols = first + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    s = scoring.finish(s, scale, b, h, rows[:, None], cols[None, :], nq, nk, None, None, program, SCORE, MASK, None, RAW,
                       MASKED)
    return softmax.step(m_i, l_i, s, softmax.LOG2E * (scale if RAW else 1.0), False)


@gluon.jit
def consumer(descs, tiles, barriers, where, r, masked, total, block_row, LIST, OUT, LSE, SINKS, out_stride, scale, program,
             SCORE: gl.constexpr, MASK: gl.constexpr, VISIT: gl.constexpr, HAS_SINKS: gl.constexpr, RAW: gl.constexpr,
             HIDES: gl.constexpr, PACKED: gl.constexpr, WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr,
             STAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_DV: gl.constexpr, DV: gl.constexpr, PINGPONG: gl.constexpr,
             EARLY_K_WAIT: gl.constexpr):
    q_tiles, k_tiles, v_tiles, o_tiles = tiles
    q_full, k_full, k_empty, v_full, _v_empty = barriers
    _b, h, _h_kv, q_slot, q_row, _k_slot, _k_row, nq, _nk = where
    TYPE: gl.constexpr = k_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    gl.static_assert(STAGES >= 2, "with one stage it waits for a tile that is loaded after one that it still holds")
    rows = block_row + WARPGROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    m_i = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    l_i = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, O_LAYOUT)
    if total > 0:
        q = q_tiles.index(WARPGROUP)
        turn = q_row
        if PINGPONG and WARPGROUP == WARPGROUPS - 1:    # the first turn is the first warpgroup's
            turn = named_barrier("arrive", FIRST_BARRIER, 256, turn)
        mbarrier.wait(q_full.index(WARPGROUP), 0)
        mbarrier.wait(k_full.index(0), 0)
        s = warpgroup_mma_wait(0, deps=[products(q, k_tiles.index(0))])
        mbarrier.arrive(k_empty.index(0), count=1)
        first = first_of(r, 0, masked, LIST, VISIT, BLOCK_N)
        m_i, l_i, _, p = softmax_of(s, m_i, l_i, first, rows, where, scale, program, SCORE, MASK, RAW, True)
        if EARLY_K_WAIT:
            mbarrier.wait(k_full.index(1), 0, pred=total > 1)
        middle = gl.minimum(masked + 1, total)          # P V of the last partial tile comes with the next one's scores
        for t in range(1, middle):
            after = first_of(r, t, masked, LIST, VISIT, BLOCK_N)
            m_i, l_i, acc, p, turn = attend(
                q, tiles, barriers, (m_i, l_i, acc, p, turn), t, total, after, first, rows, where, r, scale, program, SCORE,
                MASK, RAW, HIDES, True, WARPGROUP, WARPGROUPS, STAGES, PINGPONG, EARLY_K_WAIT)
            first = after
        for t in range(middle, total):
            after = first_of_full(r, t - masked, LIST, VISIT, BLOCK_N)
            m_i, l_i, acc, p, turn = attend(
                q, tiles, barriers, (m_i, l_i, acc, p, turn), t, total, after, first, rows, where, r, scale, program, SCORE,
                MASK, RAW, HIDES, False, WARPGROUP, WARPGROUPS, STAGES, PINGPONG, EARLY_K_WAIT)
            first = after
        last = (total - 1) % STAGES
        mbarrier.wait(v_full.index(last), (total - 1) // STAGES & 1)
        if HIDES:
            turn = hide(v_tiles.index(last), first, r, turn, WARPGROUP, WARPGROUPS)
        acc = warpgroup_mma(operand(p, acc, TYPE), v_tiles.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if PINGPONG and WARPGROUP == 0:                 # the turn that nobody is left to take
            turn = named_barrier("sync", FIRST_BARRIER, 256, turn)
    m_i, l_i = gl.convert_layout(m_i, O_ROWS), gl.convert_layout(l_i, O_ROWS)
    if HAS_SINKS:
        m_i, l_i, acc = softmax.add_sink(m_i, l_i, acc, gl.load(SINKS + h).to(gl.float32), False)
    out, lse = softmax.finalize(m_i, l_i, acc, False)
    row = block_row + WARPGROUP * ROWS
    of_rows = row + gl.arange(0, ROWS, O_ROWS)
    gl.store(LSE + of_rows, lse, mask=of_rows < nq)
    o_tile = o_tiles.index(WARPGROUP)
    o_tile.store(out.to(TYPE))
    if PACKED:                          # the rows behind the sequence's own are another's
        store_rows(o_tile, OUT, out_stride, row, nq - row, DV)
    else:
        fence_async_shared()
        tma_store(descs[3], [q_slot, h, q_row + WARPGROUP * ROWS, 0], as_block(o_tile, descs[3]))
        tma_store_wait(0)


@gluon.jit
def forward(q_desc, k_desc, v_desc, o_desc, OUT, LSE, SINKS, LIST, Q_ROWS, K_ROWS, WORK, out_strides, scale, heads, group,
            together, nq, nk, lse_rows, captured, ints, floats, SCORE: gl.constexpr, MASK: gl.constexpr, KEYS: gl.constexpr,
            VISIT: gl.constexpr, HAS_SINKS: gl.constexpr, RAW: gl.constexpr, HIDES: gl.constexpr, DV: gl.constexpr,
            BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
            STAGES: gl.constexpr, PINGPONG: gl.constexpr, EARLY_K_WAIT: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
            PRODUCER_REGISTERS: gl.constexpr):
    """One program for BLOCK_M queries of a head; launched with 4 warps."""
    PACKED: gl.constexpr = WORK is not None
    WARPGROUPS: gl.constexpr = BLOCK_M // ROWS
    SLOTS: gl.constexpr = 4 if WARPGROUPS == 3 else WARPGROUPS          # allocations are powers of two
    TYPE: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    b, h, h_kv, first = place_together(gl.program_id(0), WORK, gl.cdiv(nq, BLOCK_M), heads, group, together, BLOCK_M)
    blocks = gl.cdiv(nq, BLOCK_M)
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    b = gl.maximum(b, 0)
    program = (captured, ints, floats)
    rows = first + gl.arange(0, BLOCK_M if WARPGROUPS < 3 else 256, gl.BlockedLayout([1], [32], [4], [0]))
    r = masking.visits(KEYS, VISIT, LIST, b, h, heads, rows, first // BLOCK_M, blocks, gl.minimum(nq, first + BLOCK_M), nq, nk,
                       nk, program, BLOCK_N)
    masked = masking.count(r, True, 0)
    total = masked + masking.count(r, False, 0)

    q_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, ROWS, BLOCK_D], TILE)
    k_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, BLOCK_D], TILE)
    v_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, BLOCK_DV], TILE)
    if BLOCK_D == BLOCK_DV:
        o_tiles = q_tiles               # free by then
    else:
        o_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, ROWS, BLOCK_DV], TILE)
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=WARPGROUPS)
        mbarrier.init(v_empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, o_desc)
    tiles = (q_tiles, k_tiles, v_tiles, o_tiles)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    where = (b, h, h_kv, q_slot, q_start + first, k_slot, k_start, nq, nk)
    OUT += q_slot.to(gl.int64) * out_strides[0] + h.to(gl.int64) * out_strides[1] + q_start * out_strides[2]
    LSE += (q_slot * heads + h).to(gl.int64) * lse_rows + q_start
    # Constants must stand in these tuples themselves: a tuple that is bound to a name first makes tensors of them.
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (consumer, (descs, tiles, barriers, where, r, masked, total, first, LIST, OUT, LSE, SINKS, out_strides[2], scale,
                        program, SCORE, MASK, VISIT, HAS_SINKS, RAW, HIDES, PACKED, 0, WARPGROUPS, STAGES, BLOCK_N,
                        BLOCK_DV, DV, PINGPONG, EARLY_K_WAIT)),
            (consumer, (descs, tiles, barriers, where, r, masked, total, first, LIST, OUT, LSE, SINKS, out_strides[2], scale,
                        program, SCORE, MASK, VISIT, HAS_SINKS, RAW, HIDES, PACKED, 1, WARPGROUPS, STAGES, BLOCK_N,
                        BLOCK_DV, DV, PINGPONG, EARLY_K_WAIT)),
            (producer, (descs, tiles, barriers, where, r, masked, total, LIST, VISIT, WARPGROUPS, STAGES, BLOCK_N)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (descs, tiles, barriers, where, r, masked, total, first, LIST, OUT, LSE, SINKS, out_strides[2], scale,
                        program, SCORE, MASK, VISIT, HAS_SINKS, RAW, HIDES, PACKED, 0, WARPGROUPS, STAGES, BLOCK_N,
                        BLOCK_DV, DV, PINGPONG, EARLY_K_WAIT)),
            (consumer, (descs, tiles, barriers, where, r, masked, total, first, LIST, OUT, LSE, SINKS, out_strides[2], scale,
                        program, SCORE, MASK, VISIT, HAS_SINKS, RAW, HIDES, PACKED, 1, WARPGROUPS, STAGES, BLOCK_N,
                        BLOCK_DV, DV, PINGPONG, EARLY_K_WAIT)),
            (consumer, (descs, tiles, barriers, where, r, masked, total, first, LIST, OUT, LSE, SINKS, out_strides[2], scale,
                        program, SCORE, MASK, VISIT, HAS_SINKS, RAW, HIDES, PACKED, 2, WARPGROUPS, STAGES, BLOCK_N,
                        BLOCK_DV, DV, PINGPONG, EARLY_K_WAIT)),
            (producer, (descs, tiles, barriers, where, r, masked, total, LIST, VISIT, WARPGROUPS, STAGES, BLOCK_N)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])
