"""Flash-Decoding for Hopper (Dao et al. 2023): few queries of a cache, at the speed of memory; warp-specialised, in Gluon.

A program has all queries of a group of heads, at most 64 rows (query, head of the group), and one of `splits` shares of the
keys; the parts are merged by `merge_kernel.py`. One warp, the producer, copies keys and values by TMA into a ring of STAGES
tiles each; one warpgroup, the consumer, computes scores, softmax and P V, one after another: that takes less time than memory
does, and two programs share a multiprocessor where the rings leave room. Keys in fp8 come as bytes; two further warps, the
converter, turn them into the queries' type, into a ring of WIDE tiles of its own, from which the consumer takes them.

Barriers, of which each stage has its own; phase of tile t: t // STAGES % 2
    k_full, v_full  the producer's TMA -> the consumer (fp8: the converter), each tile
    empty           the consumer, after P V is there (fp8: the converter, after it has read both) -> the producer, before it
                    loads tile t + STAGES
In fp8 there is another set, with WIDE in place of STAGES
    k_full, v_full  the converter, after it has written -> the consumer, each tile
    empty           the consumer, after P V is there -> the converter, before it writes tile t + WIDE

Q [slots, H, rows, D]  K [slots, H_kv, rows, D]  V [.., DV]: K and V are TMA descriptors, whose blocks are a panel's columns of
rows that lie together: BLOCK_N, or where PAGES [B, pages_row] says in which page a sequence's rows are, as many as divide a
page. Other names as in `triton/forward_kernel.py`. HIDES as in `forward_kernel.py`.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from tilewise.backends.gpu_math import masking, scoring, softmax
from tilewise.backends.gpu_math.places import sequence
from tilewise.backends.gpu_math.rows import located
from tilewise.backends.hopper.gluon_names import thread_barrier
from tilewise.backends.hopper.pieces import load_pieces, located_pieces
from tilewise.backends.hopper.tiles import first_of, hide_rows, reaches_out

ROWS = gl.constexpr(64)                 # (query, head of the group)
WIDE = gl.constexpr(2)                  # tiles of keys, and of values, that the converter has written or writes to


@gluon.jit
def producer(descs, tiles, barriers, where, r, masked, total, PAGES, page_size, VISIT: gl.constexpr, STAGES: gl.constexpr,
             BLOCK_N: gl.constexpr):
    k_desc, v_desc = descs
    k_tiles, v_tiles = tiles
    k_full, v_full, empty = barriers
    h_kv, slot, start = where
    for t in range(total):
        stage = t % STAGES
        first = first_of(r, t, masked, None, VISIT, BLOCK_N)
        places = located_pieces(first, r, slot, start, PAGES, page_size, BLOCK_N, k_desc.block_type.shape[2])
        mbarrier.wait(empty.index(stage), (t // STAGES & 1) ^ 1)
        load_pieces(k_desc, places, h_kv, k_full.index(stage), k_tiles.index(stage))
        load_pieces(v_desc, places, h_kv, v_full.index(stage), v_tiles.index(stage))


@gluon.jit
def converter(raw, loaded, tiles, barriers, total, STAGES: gl.constexpr):
    """From the producer's ring, `raw`, of which `loaded` are the barriers, to the consumer's."""
    k_raw, v_raw = raw
    k_loaded, v_loaded, read = loaded
    k_tiles, v_tiles = tiles
    k_full, v_full, empty = barriers
    for t in range(total):
        stage, slot = t % STAGES, t % WIDE
        mbarrier.wait(empty.index(slot), (t // WIDE & 1) ^ 1)
        mbarrier.wait(k_loaded.index(stage), t // STAGES & 1)
        widen(k_raw.index(stage), k_tiles.index(slot), k_full.index(slot))
        mbarrier.wait(v_loaded.index(stage), t // STAGES & 1)
        widen(v_raw.index(stage), v_tiles.index(slot), v_full.index(slot))
        mbarrier.arrive(read.index(stage), count=1)


@gluon.jit
def widen(raw, tile, barrier):
    """A tile of bytes that hold fp8 numbers, in the other tile's type; exact."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS_AT_A_TIME: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    for i in gl.static_range(tile.shape[0] // ROWS_AT_A_TIME):
        x = raw.slice(i * ROWS_AT_A_TIME, ROWS_AT_A_TIME).load(LAYOUT).to(gl.float8e4nv, bitcast=True)
        tile.slice(i * ROWS_AT_A_TIME, ROWS_AT_A_TIME).store(x.to(gl.float16).to(tile.dtype))
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def attend(q, tiles, barriers, state, t, first, r, where, rows, scale, program, SCORE: gl.constexpr, MASK: gl.constexpr,
           RAW: gl.constexpr, HIDES: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr):
    """Takes tile t, whose first column is `first`, into the statistics."""
    k_tiles, v_tiles = tiles
    k_full, v_full, empty = barriers
    m_i, l_i, acc = state
    b, h, nq, nk = where
    stage, phase = t % STAGES, t // STAGES & 1
    mbarrier.wait(k_full.index(stage), phase)
    k = k_tiles.index(stage)
    BLOCK_N: gl.constexpr = k.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    s = warpgroup_mma_wait(0, deps=[warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)])
    cols = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
    s = scoring.finish(s, scale, b, h[:, None], rows[:, None], cols[None, :], nq, nk, None, None, program, SCORE, MASK, None,
                       RAW, MASKED)
    m_i, l_i, alpha, p = softmax.step(m_i, l_i, s, softmax.LOG2E * (scale if RAW else 1.0), False)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    v = v_tiles.index(stage)
    mbarrier.wait(v_full.index(stage), phase)
    if MASKED and HIDES:
        hide(v, first, r)
    weights = gl.convert_layout(p.to(v.dtype), gl.DotOperandLayout(0, acc.type.layout, 2), assert_trivial=True)
    acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(weights, v, acc, is_async=True)])
    mbarrier.arrive(empty.index(stage), count=1)
    return m_i, l_i, acc


@gluon.jit
def hide(v, first, r):
    """Hides the values that no query sees, if the tile has some."""
    if reaches_out(first, v.shape[0], r[8], r[9]):
        hide_rows(v, first, r[8], r[9], 0, 1)
        fence_async_shared()
        thread_barrier()


@gluon.jit
def consumer(q_tile, tiles, barriers, where, r, masked, total, Q, OUT, LSE, SINKS, q_strides, out_strides, v_scale, group,
             scale, program, SCORE: gl.constexpr, MASK: gl.constexpr, VISIT: gl.constexpr, HAS_SINKS: gl.constexpr,
             RAW: gl.constexpr, HIDES: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
             DV: gl.constexpr):
    """Q, OUT, LSE are at the first query of the group's first head, h."""
    b, h, nq, nk, lse_rows = where
    BLOCK_DV: gl.constexpr = tiles[1].shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    OF_S: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    OF_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    load_queries(q_tile, Q, q_strides, group, nq, D)
    m_i = gl.full([ROWS], -float("inf"), gl.float32, OF_S)
    l_i = gl.full([ROWS], 0.0, gl.float32, OF_S)
    acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, O_LAYOUT)
    row = gl.arange(0, ROWS, OF_S)
    whose = (b, h + row % group, nq, nk)
    for t in range(masked):
        first = first_of(r, t, masked, None, VISIT, BLOCK_N)
        m_i, l_i, acc = attend(q_tile, tiles, barriers, (m_i, l_i, acc), t, first, r, whose, row // group, scale, program,
                               SCORE, MASK, RAW, HIDES, True, STAGES)
    for t in range(masked, total):
        first = first_of(r, t, masked, None, VISIT, BLOCK_N)
        m_i, l_i, acc = attend(q_tile, tiles, barriers, (m_i, l_i, acc), t, first, r, whose, row // group, scale, program,
                               SCORE, MASK, RAW, HIDES, False, STAGES)
    row = gl.arange(0, ROWS, OF_O)
    query, head = row // group, row % group
    m_i, l_i, acc = gl.convert_layout(m_i, OF_O), gl.convert_layout(l_i, OF_O), acc * v_scale
    if HAS_SINKS:
        m_i, l_i, acc = softmax.add_sink(m_i, l_i, acc, gl.load(SINKS + h + head).to(gl.float32), False)
    out, lse = softmax.finalize(m_i, l_i, acc, False)
    live = query < nq
    dims = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, O_LAYOUT))
    of_rows = OUT + (query.to(gl.int64) * out_strides[2] + head.to(gl.int64) * out_strides[1])[:, None]
    gl.store(of_rows + dims[None, :], out.to(OUT.dtype.element_ty), mask=live[:, None] & (dims < DV)[None, :])
    gl.store(LSE + (head * lse_rows + query), lse, mask=live)


@gluon.jit
def load_queries(tile, Q, strides, group, nq, D: gl.constexpr):
    """Rows (query, head of the group), 0 beyond the last query."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, tile.shape[1], gl.SliceLayout(0, LAYOUT))
    query, head = row // group, row % group
    of_rows = Q + (query.to(gl.int64) * strides[2] + head.to(gl.int64) * strides[1])[:, None]
    tile.store(gl.load(of_rows + dims[None, :], mask=(query < nq)[:, None] & (dims < D)[None, :], other=0.0))
    fence_async_shared()
    thread_barrier()


@gluon.constexpr_function
def of_rank_2(layout):
    """A descriptor's layout for a tile of rows and columns."""
    return gl.NVMMASharedLayout(layout.swizzle_byte_width, layout.element_bitwidth)


@gluon.jit
def new_barriers(COUNT: gl.constexpr):
    """(k_full, v_full, empty) of a ring."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], BARRIER)
    for i in gl.static_range(COUNT):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    return k_full, v_full, empty


@gluon.jit
def decode(k_desc, v_desc, Q, OUT, LSE, SINKS, Q_ROWS, K_ROWS, PAGES, K_SCALE, V_SCALE, q_strides, out_strides, scale, heads,
           group, nq, nk, lse_rows, page_size, pages_row, splits, out_split, lse_split, captured, ints, floats,
           SCORE: gl.constexpr, MASK: gl.constexpr, KEYS: gl.constexpr, VISIT: gl.constexpr, HAS_SINKS: gl.constexpr,
           RAW: gl.constexpr, HIDES: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr,
           BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):
    """Launched with 4 warps, on splits x key heads x sequences programs, the shares of one after another."""
    TYPE: gl.constexpr = Q.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    FP8: gl.constexpr = K_SCALE is not None
    split, one = gl.program_id(0) % splits, gl.program_id(0) // splits
    b, h_kv = one // (heads // group), one % (heads // group)
    h = h_kv * group
    q_slot, q_start, nq = sequence(Q_ROWS, b, nq)
    k_slot, k_start, nk = sequence(K_ROWS, b, nk)
    if PAGES is not None:
        PAGES += b.to(gl.int64) * pages_row
    v_scale = 1.0
    if FP8:
        scale *= gl.load(K_SCALE + h_kv)
        v_scale = gl.load(V_SCALE + h_kv)
    program = (captured, ints, floats)
    row = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [4], [0]))
    r = masking.visits(KEYS, VISIT, None, b, h + row % group, heads, row // group, 0, 1, nq, nq, nk, nk, program, BLOCK_N)
    r = masking.share(r, split, splits, 0)
    masked = masking.count(r, True, 0)
    total = masked + masking.count(r, False, 0)

    q_tile = gl.allocate_shared_memory(TYPE, [ROWS, BLOCK_D], TILE)
    k_loaded = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, BLOCK_D], of_rank_2(k_desc.layout))
    v_loaded = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, BLOCK_DV], of_rank_2(v_desc.layout))
    descs, loaded, of_loaded = (k_desc, v_desc), (k_loaded, v_loaded), new_barriers(STAGES)
    if FP8:
        k_wide = gl.allocate_shared_memory(TYPE, [WIDE, BLOCK_N, BLOCK_D], TILE)
        v_wide = gl.allocate_shared_memory(TYPE, [WIDE, BLOCK_N, BLOCK_DV], TILE)
        wide, of_wide = (k_wide, v_wide), new_barriers(WIDE)
    fence_async_shared()
    loads, queries = (h_kv, k_slot, k_start), (b, h, nq, nk, lse_rows)
    Q = located(Q, q_strides, q_slot, h, q_start)
    OUT = located(OUT, out_strides, q_slot, h, q_start) + split.to(gl.int64) * out_split
    LSE += (q_slot * heads + h).to(gl.int64) * lse_rows + q_start + split.to(gl.int64) * lse_split
    # Constants must stand in these tuples themselves: a tuple that is bound to a name first makes tensors of them.
    if FP8:
        gl.warp_specialize([
            (consumer, (q_tile, wide, of_wide, queries, r, masked, total, Q, OUT, LSE, SINKS, q_strides, out_strides, v_scale,
                        group, scale, program, SCORE, MASK, VISIT, HAS_SINKS, RAW, HIDES, WIDE, BLOCK_N, D, DV)),
            (converter, (loaded, of_loaded, wide, of_wide, total, STAGES)),
            (producer, (descs, loaded, of_loaded, loads, r, masked, total, PAGES, page_size, VISIT, STAGES, BLOCK_N)),
        ], [2, 1], [PRODUCER_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (q_tile, loaded, of_loaded, queries, r, masked, total, Q, OUT, LSE, SINKS, q_strides, out_strides,
                        v_scale, group, scale, program, SCORE, MASK, VISIT, HAS_SINKS, RAW, HIDES, STAGES, BLOCK_N, D, DV)),
            (producer, (descs, loaded, of_loaded, loads, r, masked, total, PAGES, page_size, VISIT, STAGES, BLOCK_N)),
        ], [1], [PRODUCER_REGISTERS])
