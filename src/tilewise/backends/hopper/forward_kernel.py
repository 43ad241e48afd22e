"""FlashAttention-3, forward (Shah et al. 2024, sections 3.1 and 3.2), for Hopper: warp-specialised, in Gluon.

One warp, the producer, finds the work and copies tiles by TMA; two or three warpgroups, the consumers, have 64 queries each. A
consumer issues the scores of tile t and P V of tile t - 1 together, and computes the softmax of tile t while the tensor cores
work on P V.

    PINGPONG      named barriers let one warpgroup issue its products while another one computes its softmax.
    EARLY_K_WAIT  waits for the next tile of K between softmax and the wait for P V. Written plainly, ptxas moves the
                  exponentials behind that wait and nothing overlaps; the spin loop of an mbarrier is a border that they do
                  not cross.
    PERSISTENT    as many programs as multiprocessors, which take items, blocks of queries of a head, from a counter, longest
                  first: the next one's Q and K arrive while the last one's output leaves. Otherwise a program has one item.
    O_APART       O has shared memory of its own, so that Q is free once its last scores are there. Otherwise it takes Q's.

Barriers, of which each stage, or warpgroup for Q, has its own. Tiles are counted over all items of a program: phase of tile t:
t // STAGES % 2; items likewise: phase of item i: i % 2
    q_full          the producer's TMA -> the warpgroup whose queries they are, each item; brings `tell`'s message; without
                    TMA for an item without tiles, and behind the last item
    q_empty         the warpgroup, after its last scores, or if not O_APART after O has left -> the producer, before the next Q
                    and message
    k_full, v_full  the producer's TMA -> all consumers, each tile; k_full brings the number of the tile's first column
    k_empty         all consumers, after the scores are there -> the producer, before it loads tile t + STAGES
    v_empty         all consumers, after P V is there -> the producer, likewise
    named 8, 9, 10  PINGPONG: warpgroup w waits at 8 + w for its turn, which the one before it gives away
    named 12        `hide`: all consumers, of each other

Q [slots, H, rows, D]  K [slots, H_kv, rows, D]  V [.., DV]  O like Q with DV columns: TMA descriptors, whose blocks have 64
rows, BLOCK_N rows for K and V, and BLOCK_D or BLOCK_DV columns: D_PIECES, DV_PIECES of them make up a row. Other names as in
`triton/forward_kernel.py`. Partial tiles come first.
In fp8, with Q_SCALE, K_SCALE and V_SCALE [B, H_kv], O is bf16 and V comes transposed, [slots, H_kv, DV, keys] in the order of
`narrow.py`, in blocks of BLOCK_DV rows and BLOCK_N columns.
HIDES: there may be keys, another sequence's or padding, whose values must not reach a sum even times 0.
"""
from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from tilewise.backends.gpu_math import masking, scoring, softmax
from tilewise.backends.gpu_math.places import place_together, sequence
from tilewise.backends.hopper import dropout, narrow
from tilewise.backends.hopper.gluon_names import (
    FIRST_BARRIER,
    named_barrier,
    reinterpret,
    thread_barrier,
    tma_store,
    tma_store_wait,
)
from tilewise.backends.hopper.messages import tell, told
from tilewise.backends.hopper.products import ROWS, add_products, finished, nothing, result_layout, scaled, scores
from tilewise.backends.hopper.tiles import (
    as_block,
    first_of,
    hide_rows,
    load_columns,
    load_pieces,
    reaches_out,
    store_rows,
    tile_layout,
)
from tilewise.backends.hopper.turned_values import first_column

HIDING = gl.constexpr(FIRST_BARRIER.value + 4)      # the named barrier of `hide`

# What the producer tells of an item: its sequence, head, first row there and in memory, slot, numbers of queries and keys, the
# columns from LOW to HIGH that may be seen, how many tiles are partial, and how many there are: -1 behind the last item.
# In fp8 also what scores and output are multiplied by, as bits.
SEQUENCE, HEAD, FIRST_ROW, MEMORY_ROW, SLOT, QUERIES, KEYS_, LOW, HIGH, PARTIAL, TOTAL, SCALES = map(gl.constexpr, range(12))
FIELDS = gl.constexpr(13)


@dataclass(frozen=True)
class Constants:
    """What a variant of the kernel is compiled for, in the order of the kernel's parameters."""
    SCORE: Any
    MASK: Any
    KEYS: Any
    VISIT: Any
    HAS_SINKS: Any
    RAW: Any
    DROPOUT: Any
    HIDES: Any
    PACKED: Any
    FP8: Any
    DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any
    D_PIECES: Any
    BLOCK_DV: Any
    DV_PIECES: Any
    STAGES: Any
    PINGPONG: Any
    EARLY_K_WAIT: Any
    PERSISTENT: Any
    O_APART: Any


@gluon.constexpr_function
def constants(*values):
    return Constants(*values)


@gluon.jit
def producer(given, C: gl.constexpr):
    descs, tiles, barriers, memory, sizes, program = given
    q_desc, _k_desc, _v_desc, _o_desc = descs
    q_tiles, _k_tiles, _v_tiles, _o_tiles, _first_cols, messages = tiles
    q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty = barriers
    _OUT, _LSE, _SINKS, _RNG, LIST, Q_ROWS, K_ROWS, WORK, COUNTER, factors = memory
    _out_stride, scale, heads, group, together, items, nq_most, nk_most, _lse_rows, _dropout = sizes
    VISIT: gl.constexpr = C.VISIT
    WARPGROUPS: gl.constexpr = C.BLOCK_M // ROWS
    blocks = gl.cdiv(nq_most, C.BLOCK_M)
    item, done, parity = gl.program_id(0), 0, 0
    while item < items:
        b, h, h_kv, first = place_together(item, WORK, blocks, heads, group, together, C.BLOCK_M)
        q_slot, q_start, nq = sequence(Q_ROWS, b, nq_most)
        k_slot, k_start, nk = sequence(K_ROWS, b, nk_most)
        b = gl.maximum(b, 0)
        rows = first + gl.arange(0, C.BLOCK_M if WARPGROUPS < 3 else 256, gl.BlockedLayout([1], [32], [1], [0]))
        r = masking.visits(C.KEYS, VISIT, LIST, b, h, heads, rows, first // C.BLOCK_M, blocks,
                           gl.minimum(nq, first + C.BLOCK_M), nq, nk, nk, program, C.BLOCK_N)
        masked = masking.count(r, True, 0)
        total = masked + masking.count(r, False, 0)
        of_keys = (k_slot, h_kv, k_start, first_column(b, k_start, C.PACKED, C.BLOCK_N))
        col = 0
        if total > 0:
            col = first_of(r, 0, masked, LIST, VISIT, C.BLOCK_N)
            load_keys(given, of_keys, col, done, C)
        for w in gl.static_range(WARPGROUPS):
            mbarrier.wait(q_empty.index(w), parity ^ 1)
        tell(messages, parity * FIELDS, (b, h, first, q_start + first, q_slot, nq, nk, r[8], r[9], masked, total))
        if C.FP8:
            of_head = narrow.factors_of(factors, b * (heads // group) + h_kv, scale, C.RAW)
            tell(messages, parity * FIELDS + SCALES, of_head)
        thread_barrier()                # all threads have stored before one of them arrives
        for w in gl.static_range(WARPGROUPS):
            if total > 0:
                load_pieces(q_desc, q_slot, h, q_start + first + w * ROWS, q_full.index(w), q_tiles, w, C.D_PIECES)
            else:
                mbarrier.arrive(q_full.index(w), count=1)
        for t in range(total):          # K runs a tile ahead
            after = col
            if t + 1 < total:
                after = first_of(r, t + 1, masked, LIST, VISIT, C.BLOCK_N)
                load_keys(given, of_keys, after, done + t + 1, C)
            load_values(given, of_keys, col, done + t, C)
            col = after
        item = items
        if C.PERSISTENT:                # waits for memory while consumers still have two tiles to work on
            item = gl.num_programs(0) + gl.atomic_add(COUNTER, 1, sem="relaxed")
        parity ^= 1
        done += total
    if C.PERSISTENT:
        for w in gl.static_range(WARPGROUPS):
            mbarrier.wait(q_empty.index(w), parity ^ 1)
        tell(messages, parity * FIELDS + TOTAL, (-1,))
        thread_barrier()
        for w in gl.static_range(WARPGROUPS):
            mbarrier.arrive(q_full.index(w), count=1)


@gluon.jit
def load_keys(given, of_keys, col, t, C: gl.constexpr):
    descs, tiles, barriers, _memory, _sizes, _program = given
    slot = t % C.STAGES
    mbarrier.wait(barriers[3].index(slot), (t // C.STAGES & 1) ^ 1)
    tell(tiles[4], slot, (col,))
    thread_barrier()
    load_pieces(descs[1], of_keys[0], of_keys[1], of_keys[2] + col, barriers[2].index(slot), tiles[1], slot, C.D_PIECES)


@gluon.jit
def load_values(given, of_keys, col, t, C: gl.constexpr):
    descs, tiles, barriers, _memory, _sizes, _program = given
    slot = t % C.STAGES
    mbarrier.wait(barriers[5].index(slot), (t // C.STAGES & 1) ^ 1)
    if C.FP8:
        load_columns(descs[2], of_keys[0], of_keys[1], of_keys[3] + col, barriers[4].index(slot), tiles[2], slot, C.DV_PIECES)
    else:
        load_pieces(descs[2], of_keys[0], of_keys[1], of_keys[2] + col, barriers[4].index(slot), tiles[2], slot, C.DV_PIECES)


@gluon.jit
def consumer(given, C: gl.constexpr, WARPGROUP: gl.constexpr):
    _descs, tiles, barriers, _memory, _sizes, _program = given
    messages, q_full = tiles[5], barriers[0]
    done, parity, turn = 0, 0, 0
    if C.PINGPONG and WARPGROUP == C.BLOCK_M // ROWS - 1:       # the first turn is the first warpgroup's
        turn = named_barrier("arrive", FIRST_BARRIER, 256, turn)
    mbarrier.wait(q_full.index(WARPGROUP), 0)
    total = told(messages, TOTAL)
    while total >= 0:
        m_i, l_i, acc, done, turn = attend_all(given, done, total, parity, turn, C, WARPGROUP)
        write(given, parity, m_i, l_i, acc, C, WARPGROUP)
        total = -1
        if C.PERSISTENT:
            parity ^= 1
            mbarrier.wait(q_full.index(WARPGROUP), parity)
            total = told(messages, parity * FIELDS + TOTAL)
    if C.PINGPONG and WARPGROUP == 0:                           # the turn that nobody is left to take
        turn = named_barrier("sync", FIRST_BARRIER, 256, turn)
    tma_store_wait(0)


@gluon.jit
def attend_all(given, done, total, parity, turn, C: gl.constexpr, WARPGROUP: gl.constexpr):
    """Statistics and sums of an item over its tiles; and how many tiles there have been with them: `done` before."""
    _descs, tiles, barriers, _memory, _sizes, _program = given
    q_tiles, k_tiles, v_tiles, _o_tiles, first_cols, messages = tiles
    _q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    gl.static_assert(C.STAGES >= 2, "with one stage it waits for a tile that is loaded after one that it still holds")
    STAGES: gl.constexpr = C.STAGES
    S_ROWS: gl.constexpr = gl.SliceLayout(1, result_layout(C.BLOCK_N, C.FP8))
    message = parity * FIELDS
    m_i = gl.full([ROWS], -float("inf"), gl.float32, S_ROWS)
    l_i = gl.full([ROWS], 0.0, gl.float32, S_ROWS)
    acc = nothing(C.BLOCK_DV, C.DV_PIECES, C.FP8)
    if total > 0:
        slot = done % STAGES
        mbarrier.wait(k_full.index(slot), done // STAGES & 1)
        first = told(first_cols, slot)
        s = warpgroup_mma_wait(0, deps=[scores(q_tiles, k_tiles, WARPGROUP, slot, C.D_PIECES)])
        mbarrier.arrive(k_empty.index(slot), count=1)
        m_i, l_i, _, p = softmax_of(s, m_i, l_i, first, given, message, C, True, WARPGROUP)
        if C.EARLY_K_WAIT:
            after = done + 1
            mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=total > 1)
        last = done + total - 1
        middle = gl.minimum(done + told(messages, message + PARTIAL), last)     # V of the last partial tile comes one later
        for t in range(done + 1, middle + 1):
            m_i, l_i, acc, p, first, turn = attend(given, (m_i, l_i, acc, p, first, turn), t, last, message, C, True, WARPGROUP)
        for t in range(middle + 1, last + 1):           # `first` stays that of the last partial tile
            m_i, l_i, acc, p, _of_t, turn = attend(
                given, (m_i, l_i, acc, p, first, turn), t, last, message, C, False, WARPGROUP)
        if C.O_APART:
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        slot = last % STAGES
        mbarrier.wait(v_full.index(slot), last // STAGES & 1)
        if C.HIDES and last == middle:          # of a full tile there is nothing to hide
            turn = hide(tiles, slot, first, messages, message, turn, C, WARPGROUP)
        acc = finished(add_products(p, v_tiles, slot, acc))
        mbarrier.arrive(v_empty.index(slot), count=1)
        done = last + 1
    elif C.O_APART:
        mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
    return m_i, l_i, acc, done, turn


@gluon.jit
def attend(given, state, t, last, message, C: gl.constexpr, MASKED: gl.constexpr, WARPGROUP: gl.constexpr):
    """Scores and softmax of tile t, P V of tile t - 1. `first` in the state: its first column."""
    _descs, tiles, barriers, _memory, _sizes, _program = given
    q_tiles, k_tiles, v_tiles, _o_tiles, first_cols, messages = tiles
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = barriers
    m_i, l_i, acc, p, first, turn = state
    STAGES: gl.constexpr = C.STAGES
    DV_PIECES: gl.constexpr = C.DV_PIECES
    MY_TURN: gl.constexpr = FIRST_BARRIER + WARPGROUP
    NEXT_TURN: gl.constexpr = FIRST_BARRIER + (WARPGROUP + 1) % (C.BLOCK_M // ROWS)
    slot, before, after = t % STAGES, (t - 1) % STAGES, (t + 1) % STAGES
    if not C.EARLY_K_WAIT:
        mbarrier.wait(k_full.index(slot), t // STAGES & 1)
    if MASKED:
        mbarrier.wait(v_full.index(before), (t - 1) // STAGES & 1)
        if C.HIDES:                     # before the turn: whoever waits for the others must not hold it
            turn = hide(tiles, before, first, messages, message, turn, C, WARPGROUP)
    first = told(first_cols, slot)
    if C.PINGPONG:
        turn = named_barrier("sync", MY_TURN, 256, turn)
    s = scores(q_tiles, k_tiles, WARPGROUP, slot, C.D_PIECES)
    if not MASKED:
        mbarrier.wait(v_full.index(before), (t - 1) // STAGES & 1)
    acc = add_products(p, v_tiles, before, acc)
    if C.PINGPONG:
        turn = named_barrier("arrive", NEXT_TURN, 256, turn)
    s = warpgroup_mma_wait(DV_PIECES, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    m_i, l_i, alpha, p = softmax_of(s, m_i, l_i, first, given, message, C, MASKED, WARPGROUP)
    if C.EARLY_K_WAIT:
        mbarrier.wait(k_full.index(after), (t + 1) // STAGES & 1, pred=t < last)
    acc = finished(acc)
    mbarrier.arrive(v_empty.index(before), count=1)
    return m_i, l_i, scaled(acc, alpha), p, first, turn


@gluon.jit
def hide(tiles, slot, first, messages, message, turn, C: gl.constexpr, WARPGROUP: gl.constexpr):
    """Hides the values that no query of the block sees; all warpgroups take part and wait for each other."""
    WARPGROUPS: gl.constexpr = C.BLOCK_M // ROWS
    DV_PIECES: gl.constexpr = C.DV_PIECES
    low, high = told(messages, message + LOW), told(messages, message + HIGH)
    if reaches_out(first, C.BLOCK_N, low, high):
        for i in gl.static_range(DV_PIECES):
            tile = tiles[2].index(slot * DV_PIECES + i)
            if C.FP8:
                narrow.hide_columns(tile, first, low, high, WARPGROUP, WARPGROUPS)
            else:
                hide_rows(tile, first, low, high, WARPGROUP, WARPGROUPS)
        fence_async_shared()
        turn = named_barrier("sync", HIDING, WARPGROUPS * 128, turn)
    return turn


@gluon.jit
def softmax_of(s, m_i, l_i, first, given, message, C: gl.constexpr, MASKED: gl.constexpr, WARPGROUP: gl.constexpr):
    """Statistics, the factor of what was summed before, and probabilities: if registers suffice in fp32, as halves would be
    unpacked and packed again on their way to the next tile."""
    _descs, tiles, _barriers, memory, sizes, program = given
    messages = tiles[5]
    _out_stride, scale, heads, _group, _together, _items, _nq_most, _nk_most, _lse_rows, threshold = sizes
    if C.FP8:
        scale = told(messages, message + SCALES).to(gl.float32, bitcast=True)
    b, h = told(messages, message + SEQUENCE), told(messages, message + HEAD)
    nq, nk = told(messages, message + QUERIES), told(messages, message + KEYS_)
    first_row = told(messages, message + FIRST_ROW) + WARPGROUP * ROWS
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, s.type.layout))
    cols = first + gl.arange(0, C.BLOCK_N, gl.SliceLayout(0, s.type.layout))
    s = scoring.finish(s, scale, b, h, rows[:, None], cols[None, :], nq, nk, None, None, program, C.SCORE, C.MASK, None, C.RAW,
                       MASKED)
    unit = softmax.LOG2E * (scale if C.RAW else 1.0)
    if C.FP8:
        m_i, l_i, alpha, p = narrow.step(m_i, l_i, s, unit)
    else:
        m_i, l_i, alpha, p = softmax.step(m_i, l_i, s, unit, False)
    if C.DROPOUT:
        LAYOUT: gl.constexpr = s.type.layout
        kept = dropout.keep(memory[3], threshold, b, h, heads, first_row, first, C.BLOCK_N, LAYOUT)
        p = gl.where(kept, p, 0.0)
    if not C.FP8 and (C.BLOCK_DV > 128 or C.BLOCK_M > 128):     # registers are scarce
        p = p.to(tiles[2].dtype)
    return m_i, l_i, alpha, p


@gluon.jit
def write(given, parity, m_i, l_i, acc, C: gl.constexpr, WARPGROUP: gl.constexpr):
    """An item's output and lse."""
    descs, tiles, barriers, memory, sizes, _program = given
    _q_tiles, _k_tiles, _v_tiles, o_tiles, _first_cols, messages = tiles
    OUT, LSE, SINKS, _RNG, _LIST, _Q_ROWS, _K_ROWS, _WORK, _COUNTER, _factors = memory
    out_strides, _scale, heads, _group, _together, _items, _nq_most, _nk_most, lse_rows, threshold = sizes
    DV_PIECES: gl.constexpr = C.DV_PIECES
    O_ROWS: gl.constexpr = gl.SliceLayout(1, result_layout(C.BLOCK_DV, C.FP8))
    # the first tile of O: in Q's memory it begins at a multiple of its own size
    PLACE: gl.constexpr = WARPGROUP * DV_PIECES if C.O_APART else (
        WARPGROUP * C.D_PIECES * C.BLOCK_D + C.BLOCK_DV - 1) // C.BLOCK_DV
    message = parity * FIELDS
    h, slot = told(messages, message + HEAD), told(messages, message + SLOT)
    row = told(messages, message + FIRST_ROW) + WARPGROUP * ROWS
    memory_row = told(messages, message + MEMORY_ROW) + WARPGROUP * ROWS
    left = told(messages, message + QUERIES) - row
    m_i, l_i = gl.convert_layout(m_i, O_ROWS), gl.convert_layout(l_i, O_ROWS)
    of_rows = gl.arange(0, ROWS, O_ROWS)
    if C.O_APART and not C.PACKED:
        tma_store_wait(0)               # the item before has left
    for i in gl.static_range(DV_PIECES):
        out, m, l = acc[i], m_i, l_i
        if C.DROPOUT:
            out = out * (65536.0 / (65536 - threshold))
        if C.HAS_SINKS:
            m, l, out = softmax.add_sink(m, l, out, gl.load(SINKS + h).to(gl.float32), False)
        out, lse = softmax.finalize(m, l, out, False)
        if C.FP8:
            out = out * told(messages, message + SCALES + 1).to(gl.float32, bitcast=True)
        if i == 0:
            gl.store(LSE + ((slot * heads + h).to(gl.int64) * lse_rows + memory_row) + of_rows, lse, mask=of_rows < left)
        o_tile = o_tiles.index(PLACE + i)
        o_tile.store(out.to(o_tile.dtype))
        if C.PACKED:                    # the rows behind the sequence's own are another's
            of_head = OUT + slot.to(gl.int64) * out_strides[0] + h.to(gl.int64) * out_strides[1] + i * C.BLOCK_DV
            store_rows(o_tile, of_head, out_strides[2], memory_row, left, C.DV - i * C.BLOCK_DV)
    fence_async_shared()
    if not C.PACKED:
        for i in gl.static_range(DV_PIECES):
            o_tile = o_tiles.index(PLACE + i)
            tma_store(descs[3], [slot, h, memory_row, i * C.BLOCK_DV], as_block(o_tile, descs[3]))
    if not C.O_APART:
        tma_store_wait(0)
        mbarrier.arrive(barriers[1].index(WARPGROUP), count=1)


@gluon.jit
def forward(q_desc, k_desc, v_desc, o_desc, OUT, LSE, SINKS, RNG, LIST, Q_ROWS, K_ROWS, WORK, COUNTER, Q_SCALE, K_SCALE,
            V_SCALE, out_strides, scale, heads, group, together, items, nq, nk, lse_rows, dropout, captured, ints, floats,
            SCORE: gl.constexpr, MASK: gl.constexpr, KEYS: gl.constexpr, VISIT: gl.constexpr, HAS_SINKS: gl.constexpr,
            RAW: gl.constexpr, DROPOUT: gl.constexpr, HIDES: gl.constexpr, DV: gl.constexpr, BLOCK_M: gl.constexpr,
            BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, D_PIECES: gl.constexpr, BLOCK_DV: gl.constexpr,
            DV_PIECES: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr, EARLY_K_WAIT: gl.constexpr,
            PERSISTENT: gl.constexpr, O_APART: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
            PRODUCER_REGISTERS: gl.constexpr):
    """A program for an item of BLOCK_M queries of a head, or PERSISTENT: for as many as it gets; launched with 4 warps.

    COUNTER: how many items have been taken beyond the first of each program; 0 at the launch.
    """
    WARPGROUPS: gl.constexpr = BLOCK_M // ROWS
    TYPE: gl.constexpr = q_desc.dtype
    FP8: gl.constexpr = Q_SCALE is not None
    OUTPUT: gl.constexpr = o_desc.dtype
    O_TILE: gl.constexpr = tile_layout(OUTPUT, BLOCK_DV)
    V_ROWS: gl.constexpr = BLOCK_DV if FP8 else BLOCK_N
    V_COLUMNS: gl.constexpr = BLOCK_N if FP8 else BLOCK_DV
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    C: gl.constexpr = constants(
        SCORE, MASK, KEYS, VISIT, HAS_SINKS, RAW, DROPOUT, HIDES, WORK is not None, FP8, DV, BLOCK_M, BLOCK_N, BLOCK_D,
        D_PIECES, BLOCK_DV, DV_PIECES, STAGES, PINGPONG, EARLY_K_WAIT, PERSISTENT, O_APART)
    q_tiles = gl.allocate_shared_memory(TYPE, [WARPGROUPS * D_PIECES, ROWS, BLOCK_D], tile_layout(TYPE, BLOCK_D))
    k_tiles = gl.allocate_shared_memory(TYPE, [STAGES * D_PIECES, BLOCK_N, BLOCK_D], tile_layout(TYPE, BLOCK_D))
    v_tiles = gl.allocate_shared_memory(TYPE, [STAGES * DV_PIECES, V_ROWS, V_COLUMNS], tile_layout(TYPE, V_COLUMNS))
    if O_APART:
        o_tiles = gl.allocate_shared_memory(OUTPUT, [WARPGROUPS * DV_PIECES, ROWS, BLOCK_DV], O_TILE)
    else:
        o_tiles = reinterpret(q_tiles, OUTPUT, [WARPGROUPS * D_PIECES * BLOCK_D // BLOCK_DV, ROWS, BLOCK_DV], O_TILE)
    first_cols = gl.allocate_shared_memory(gl.int32, [STAGES, 1], NUMBERS)
    messages = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], NUMBERS)
    q_full = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=WARPGROUPS)
        mbarrier.init(v_empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    given = ((q_desc, k_desc, v_desc, o_desc), (q_tiles, k_tiles, v_tiles, o_tiles, first_cols, messages),
             (q_full, q_empty, k_full, k_empty, v_full, v_empty),
             (OUT, LSE, SINKS, RNG, LIST, Q_ROWS, K_ROWS, WORK, COUNTER, (Q_SCALE, K_SCALE, V_SCALE)),
             (out_strides, scale, heads, group, together, items, nq, nk, lse_rows, dropout), (captured, ints, floats))
    if WARPGROUPS == 2:
        gl.warp_specialize([(consumer, (given, C, 0)), (consumer, (given, C, 1)), (producer, (given, C))],
                           [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([(consumer, (given, C, 0)), (consumer, (given, C, 1)), (consumer, (given, C, 2)),
                            (producer, (given, C))], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])
