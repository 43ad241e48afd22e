"""Attention with a cache is attention over whole sequences, however they are stored: against dense recomputation.

In every cache here, whatever no sequence holds is NaN: unused rows, left padding, free and foreign pages.
"""
import random

import pytest
import torch
from support.backends import AVAILABLE, DEVICE

import tilewise as tw
from tilewise import api
from tilewise.bench import tolerance
from tilewise.state import AttentionState, merge_states

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned", "small_tiles")

NATIVE = "tiled" if "tiled" in AVAILABLE else "triton"
LAYOUTS = ("contiguous", "left padding", "pages", "foreign pages")
HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 8, 6
FP8 = torch.float8_e4m3fn

every_backend = pytest.mark.parametrize("backend", AVAILABLE)
on_triton = pytest.mark.skipif("triton" not in AVAILABLE, reason="no GPU and not interpreting")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def ends(counts):
    return torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)


def sequences(lengths, *, heads=KV_HEADS, dim=DIM, dim_v=DIM_V, dtype=torch.float32, seed=0):
    """Keys [n, H_kv, D] and values [n, H_kv, D_v] of each."""
    return [[normal(n, heads, size, seed=seed + 10 * b + size, dtype=dtype) for b, n in enumerate(lengths)]
            for size in (dim, dim_v)]


def tokens(counts, dtype=torch.float32):
    """q [n, H, D], k and v of n new tokens of each sequence."""
    return [[normal(n, heads, dim, seed=50 + 10 * b + heads + dim, dtype=dtype) for b, n in enumerate(counts)]
            for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V))]


def filled(layout, keys, values, *, room=24, dtype=None, rotary=None, v_in_k=False, k_scale=None, v_scale=None):
    """A cache that holds the sequences, with room for more keys each, and their names in it."""
    count, kv_heads, dim, dim_v = len(keys), *keys[0].shape[1:], values[0].shape[2]
    rows = max(map(len, keys)) + room
    dtype = keys[0].dtype if dtype is None else dtype
    scales = dict(k_scale=k_scale, v_scale=v_scale)
    shape = dict(kv_heads=kv_heads, head_dim=dim, head_dim_v=dim_v, dtype=dtype, device=DEVICE, v_in_k=v_in_k, **scales)
    if layout == "pages":
        each = -(-rows // 3)
        cache = tw.PagedKVCache(each * count, 3, max_sequences=count, **shape)
        random.Random(0).shuffle(cache.book.free_pages)
        which = [cache.new() for _ in keys]
    elif layout == "foreign pages":
        each = -(-rows // 5)
        k = torch.zeros(each * count + 2, 5, kv_heads, dim, dtype=dtype, device=DEVICE)
        v = k[..., :dim_v] if v_in_k else torch.zeros(*k.shape[:3], dim_v, dtype=dtype, device=DEVICE)
        table = torch.full((count, each + 2), -7, dtype=torch.int32)             # what lies behind the pages is no page
        table[:, :each] = torch.randperm(len(k), generator=torch.Generator().manual_seed(0))[:each * count].view(count, each)
        cache = tw.PagedKVCache.wrap(k, v, table.to(DEVICE), ints(*[0] * count), **scales)
        which = list(range(count))
    else:
        padding = ints(*[(3 * b + 2) % 7 for b in range(count)]) if layout == "left padding" else None
        cache = tw.KVCache(count, rows + 7, left_padding=padding, **shape)
        which = torch.arange(count, device=DEVICE)
    for x in (cache.k, cache.v):
        x.fill_(torch.nan)
    where = {"cache_batch_idx" if isinstance(cache, tw.KVCache) else "sequences": which}
    cache.append(torch.cat(keys), None if v_in_k else torch.cat(values), cu_seqlens=ends(map(len, keys)), rotary=rotary,
                 check=True, **where)
    return cache, which


def attend(cache, which, q, k_new=None, v_new=None, **options):
    """out [total, H, D_v] and lse [H, total], whatever the shape of q."""
    out, lse = tw.attention_with_kv_cache(q, cache, k_new, v_new, cache_batch_idx=which, return_lse=True, check=True, **options)
    return as_packed(out, lse)


def as_packed(out, lse):
    return (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)) if out.dim() == 4 else (out, lse)


def last_rows(queries, keys, values, options=lambda own: {}, rotary=None, whole=True):
    """What to expect, by dtype: of each sequence the last rows of standard attention over it whole; or, where rows count from
    the first query, attention of these queries alone. options(own): those of the sequences `own`, a slice."""
    def turned(x, first):
        positions = torch.arange(first, first + len(x), device=DEVICE)
        return x if rotary is None else rotary.rotate(x.transpose(0, 1), positions).transpose(0, 1)

    def of(dtype):
        found = []
        for b, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            q, k, v = (x.to(dtype) for x in (q, k, v))
            before = max(0, len(k) - len(q))
            q, k = turned(q, before), turned(k, 0)
            rows = torch.cat([q.new_zeros(before, *q.shape[1:]), q]) if whole else q
            own = options(slice(b, b + 1))
            out, lse = tw.attention(rows[None], k[None], v[None], **own, backend="reference", return_lse=True)
            found.append((out[0, len(rows) - len(q):], lse[0, :, len(rows) - len(q):]))
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], 1)
    return of


def assert_right(found, expected):
    """The tolerance rule of `bench/tolerance.py`, on out and lse."""
    dtype = found[0].dtype
    for name, x, truth, standard in zip(("out", "lse"), found, expected(torch.float64), expected(dtype), strict=True):
        verdict = tolerance._verdict(name, x, truth, standard, dtype, 1, None)
        assert verdict.ok, verdict


def grown(keys, new):
    return [torch.cat(pair) for pair in zip(keys, new, strict=True)]


# ---- positions ------------------------------------------------------------------------------------------------------

LENGTHS, NEW = (30, 1, 9), 3
SLOPES, LEVELS, WIDTHS = normal(3, HEADS).abs(), normal(HEADS, 64, seed=1), torch.tensor([2, 9, 4], device=DEVICE)
FIRST = torch.tensor([7, 2, 12], device=DEVICE)


def seen(own):
    return lambda b, h, q, k: (k <= q) & (((q - k) % 3 == h % 2) | (q - k < WIDTHS[own][b]))


def scored(s, b, h, q, k):
    return s * torch.log(2.0 + q) + LEVELS[h, (q - k).clamp(0, 63)] - 0.1 * k


POSITIONS = {
    "nothing": lambda own: {},
    "causal": lambda own: dict(causal=True),
    "window": lambda own: dict(mask=tw.window(6, 1)),
    "chunks": lambda own: dict(mask=tw.chunked(8) & tw.causal()),
    "prefix": lambda own: dict(mask=tw.causal() | tw.prefix(FIRST[own])),
    "key lengths": lambda own: dict(mask=tw.key_lengths(FIRST[own]), causal=True),
    "far keys": lambda own: dict(mask=~tw.window(3, None)),
    "alibi, softcap": lambda own: dict(score_mod=[tw.alibi(SLOPES[0]), tw.softcap(2.0)], causal=True),
    "alibi of sequences": lambda own: dict(score_mod=tw.alibi(SLOPES[own])),
    "mask function": lambda own: dict(mask=seen(own)),
    "score function": lambda own: dict(score_mod=scored, causal=True),
    "dropout": lambda own: dict(dropout_p=0.3, rng=tw.Rng(2**40 + 5, 3, 6 + (own.start or 0)), causal=True),
    "sinks, scale": lambda own: dict(sinks=normal(HEADS, seed=4), scale=-0.7),
    "everything": lambda own: dict(mask=seen(own), score_mod=[tw.alibi(SLOPES[own]), scored], sinks=normal(HEADS, seed=4),
                                   dropout_p=0.2, rng=tw.Rng(9, 0, own.start or 0), scale=0.5),
}


@every_backend
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_those_of_the_whole_sequence(name, backend):
    keys, values = sequences(LENGTHS)
    q, k, v = map(torch.stack, tokens(3 * [NEW]))
    expected = last_rows(q, grown(keys, k), grown(values, v), POSITIONS[name])
    number = list(POSITIONS).index(name)
    for layout in LAYOUTS if backend != "triton" else (LAYOUTS[number % 4], LAYOUTS[3 - number % 4]):
        cache, which = filled(layout, keys, values)
        assert_right(attend(cache, which, q, k, v, backend=backend, **POSITIONS[name](slice(None))), expected)
        assert_right(attend(cache, which, q, backend=backend, num_splits=3, **POSITIONS[name](slice(None))), expected)


@every_backend
def test_functions_may_look_positions_up(backend):
    """Positions reach from 0 to the sequence's length: a table that long will do."""
    keys, values = sequences((30, 33, 17))
    table, ids = normal(33), torch.arange(33, device=DEVICE) // 7
    functions = dict(mask=lambda b, h, q, k: (ids[q] == ids[k]) & (k <= q)), dict(score_mod=lambda s, b, h, q, k: s + table[q])
    for options in functions:
        for queries in (1, 5):
            q = normal(3, queries, HEADS, DIM, seed=5)
            cache, which = filled("pages", keys, values, room=0)
            found = attend(cache, which, q, backend=backend, **options)
            assert_right(found, last_rows(q, keys, values, lambda own, options=options: options))


TABLES = {
    "boolean": lambda b, nq, nk: dict(mask=(normal(3, 1, 4, 40) > -0.5)[b, :, :nq, :nk]),
    "boolean of keys": lambda b, nq, nk: dict(mask=(normal(40) > -0.5)[:nk], causal=True),
    "bias": lambda b, nq, nk: dict(bias=normal(3, HEADS, 4, 40)[b, :, :nq, :nk]),
    "bias of keys, -inf": lambda b, nq, nk: dict(bias=normal(HEADS, 1, 40).masked_fill(LEVELS[:, None, :40] < 0, -torch.inf)
                                                 [..., :nk]),
    "documents": lambda b, nq, nk: dict(mask=tw.documents((torch.arange(12).view(3, 4) // 3 - 1).to(DEVICE)[b, :nq],
                                                          (torch.arange(120).view(3, 40) % 5 // 2).to(DEVICE)[b, :nk])),
}


@every_backend
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_tables_are_queries(name, packed, backend):
    """Rows i, columns kv_idx; tables reach to the longest sequence."""
    keys, values = sequences((37, 3, 20))
    counts = (4, 1, 3) if packed else (4, 4, 4)
    q, k, v = tokens(counts)
    whole = [[x[-40:] for x in grown(*part)] for part in ((keys, k), (values, v))]
    keys, values = ([x[:len(x) - n] for x, n in zip(part, counts, strict=True)] for part in whole)

    def options(own):
        b = own.start
        return TABLES[name](own, 4, 40) if b is None else TABLES[name](own, counts[b], len(whole[0][b]))

    cache, which = filled("pages", keys, values, room=4)
    given = [torch.cat(x) if packed else torch.stack(x) for x in (q, k, v)]
    found = attend(cache, which, *given, backend=backend, cu_seqlens_q=ends(counts) if packed else None, **options(slice(None)))
    assert_right(found, last_rows(q, *whole, options, whole=False))


@every_backend
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout, dtype", [("left padding", torch.float32), ("pages", torch.bfloat16)])
def test_rotary(layout, dtype, interleaved, backend):
    rotary = tw.Rotary.of(6, 50, interleaved=interleaved, device=DEVICE)
    keys, values = sequences(LENGTHS, dtype=dtype)
    counts = (3, 0, 5)
    q, k, v = tokens(counts, dtype)
    cache, which = filled(layout, keys, values, rotary=rotary)
    found = attend(cache, which, *map(torch.cat, (q, k, v)), cu_seqlens_q=ends(counts), rotary=rotary, causal=True,
                   backend=backend)
    keys, values = grown(keys, k), grown(values, v)
    assert_right(found, last_rows(q, keys, values, lambda own: dict(causal=True), rotary))
    q, k, v = map(torch.stack, tokens((4, 4, 4), dtype))
    q = q[:, 3:]                                            # of four tokens the last one asks
    found = attend(cache, which, q, k, v, rotary=rotary, backend=backend)
    assert_right(found, last_rows(q, grown(keys, k), grown(values, v), rotary=rotary))


# ---- which sequences share a call ------------------------------------------------------------------------------------

@every_backend
@pytest.mark.parametrize("layout", ["left padding", "pages", "foreign pages"])
def test_some_sequences_in_any_order(layout, backend):
    keys, values = sequences((8, 0, 17, 5))
    cache, which = filled(layout, keys, values)
    chosen = [3, 1, 0]
    q, k, v = map(torch.stack, tokens((2, 2, 2)))
    picked = torch.tensor(chosen, device=DEVICE) if layout == "left padding" else [which[i] for i in chosen]
    found = attend(cache, picked, q, k, v, causal=True, backend=backend)
    for b, x, y in zip(chosen, k, v, strict=True):
        keys[b], values[b] = torch.cat([keys[b], x]), torch.cat([values[b], y])
    causal = lambda own: dict(causal=True)  # noqa: E731
    assert_right(found, last_rows(q, [keys[b] for b in chosen], [values[b] for b in chosen], causal))
    assert cache.lengths.tolist() == [10, 2, 17, 7]
    twice = ints(2, 2, 0) if layout == "left padding" else [which[i] for i in (2, 2, 0)]    # to read, a sequence may come twice
    found = attend(cache, twice, q, causal=True, backend=backend)
    assert_right(found, last_rows(q, [keys[b] for b in (2, 2, 0)], [values[b] for b in (2, 2, 0)], causal))


@every_backend
@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("layout, dtype", [("contiguous", torch.bfloat16), ("pages", torch.float32)])
def test_prompts_and_single_tokens_in_one_call(layout, dtype, num_splits, backend):
    """Rows behind cu_seqlens belong to no sequence: they hold NaN, and give out 0 and lse -inf, sinks or not."""
    lengths, counts, spare = (30, 5, 0, 1), (1, 0, 20, 1), 3
    keys, values = sequences(lengths, dtype=dtype)
    q, k, v = tokens(counts, dtype)
    options = dict(causal=True, sinks=normal(HEADS), score_mod=tw.softcap(2.0))
    cache, which = filled(layout, keys, values)
    given = [torch.cat([*x, torch.full((spare, *x[0].shape[1:]), torch.nan, dtype=dtype, device=DEVICE)]) for x in (q, k, v)]
    out, lse = attend(cache, which, *given, cu_seqlens_q=ends(counts), num_splits=num_splits, backend=backend, **options)
    assert_right((out[:-spare], lse[:, :-spare]), last_rows(q, grown(keys, k), grown(values, v), lambda own: options))
    assert (out[-spare:] == 0).all()
    assert (lse[:, -spare:] == -torch.inf).all()


@every_backend
@pytest.mark.parametrize("mask", [None, lambda b, h, q, k: (q + k + h) % 2 == 0])
def test_no_queries(mask, backend):
    """Nobody has a query, though q has rows: nothing is computed, and nothing read that is not there."""
    keys, values = sequences((4, 0))
    cache, which = filled("contiguous", keys, values)
    out, lse = attend(cache, which, normal(3, HEADS, DIM), cu_seqlens_q=ints(0, 0, 0), mask=mask, backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    _, k, v = map(torch.stack, tokens((2, 2)))
    out, lse = attend(cache, which, normal(2, 0, HEADS, DIM), k, v, mask=mask, num_splits=2, backend=backend)
    assert (out.shape, lse.shape, cache.lengths.tolist()) == ((0, HEADS, DIM_V), (HEADS, 0), [6, 2])
    nobody = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert attend(cache, nobody, normal(0, 3, HEADS, DIM), mask=mask, backend=backend)[0].shape == (0, HEADS, DIM_V)


@every_backend
@pytest.mark.parametrize("size", [1, 7, 16])
def test_chunked_prefill(size, backend):
    keys, values = sequences((17, 17))
    q = normal(2, 17, HEADS, DIM, seed=7)
    k, v = torch.stack(keys), torch.stack(values)
    options = dict(causal=True, sinks=normal(HEADS), backend=backend)
    cache, which = filled("pages", [x[:0] for x in keys], [x[:0] for x in values])
    found = [tw.attention_with_kv_cache(q[:, a:a + size], cache, k[:, a:a + size], v[:, a:a + size], cache_batch_idx=which,
                                        return_lse=True, **options) for a in range(0, 17, size)]
    assert_right(as_packed(torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 2)),
                 last_rows(q, keys, values, lambda own: dict(causal=True, sinks=options["sinks"])))


@every_backend
def test_speculative_decoding(backend):
    """Drafts in a tree, of which some are accepted; the rest is forgotten."""
    lengths = (14, 31)
    parents = torch.tensor([[-1, 0, 1, 0, 3, -1], [-1, -1, 0, 2, 2, 1]], device=DEVICE)
    keys, values = sequences(lengths)
    q, k, v = map(torch.stack, tokens((6, 6)))
    ancestors = torch.eye(6, dtype=torch.bool).repeat(2, 1, 1)
    for b, i in ((b, i) for b in range(2) for i in range(6) if parents[b, i] >= 0):
        ancestors[b, i] |= ancestors[b, parents[b, i]]

    def visible(own):
        return dict(mask=torch.cat([torch.ones(6, lengths[own.start], dtype=torch.bool), ancestors[own.start]], 1).to(DEVICE))

    for layout in ("left padding", "pages"):
        cache, which = filled(layout, keys, values)
        found = attend(cache, which, q, k, v, mask=tw.tree(parents), backend=backend)
        assert_right(found, last_rows(q, grown(keys, k), grown(values, v), visible, whole=False))
        if layout == "pages":
            cache.truncate(which[0], 14 + 3)
            cache.truncate(which[1], 31 + 1)
        else:
            cache.truncate(ints(14 + 3, 31 + 1))
        accepted = [[torch.cat([x[b], new[b, :n], new[b, 5:]]) for b, n in enumerate((3, 1))]
                    for x, new in ((keys, k), (values, v))]
        found = attend(cache, which, q[:, :1], k[:, 5:], v[:, 5:], causal=True, backend=backend)
        assert_right(found, last_rows(q[:, :1], *accepted, lambda own: dict(causal=True)))


@every_backend
def test_room_made_before(backend):
    """As for CUDA graphs."""
    keys, values = sequences((5, 17))
    q, k, v = map(torch.stack, tokens((2, 2)))
    cache, which = filled("pages", keys, values)
    cache.extend(which, [2, 2])
    assert_right(attend(cache, which, q, backend=backend), last_rows(q, keys, values))
    found = attend(cache, ints(*which), q, k, v, extended=True, backend=backend)
    assert_right(found, last_rows(q, grown(keys, k), grown(values, v)))


@pytest.mark.skipif("tiled" not in AVAILABLE, reason="in the interpreter's process only Triton runs")
def test_autocast():
    keys, values = sequences((5, 17), dtype=torch.bfloat16)
    q, k, v = map(torch.stack, tokens((2, 2)))
    cache, which = filled("left padding", keys, values)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = attend(cache, which, q, k, v)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    assert_right(found, last_rows(q, grown(keys, k), grown(values, v)))


# ---- what is stored --------------------------------------------------------------------------------------------------

def dequantised(x, scale):
    return (x.float() / scale[:, None]).clamp(-448, 448).to(FP8).double() * scale[:, None].double()


@every_backend
@pytest.mark.parametrize("layout", ["left padding", "pages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8(layout, dtype, backend):
    scales = dict(k_scale=torch.tensor([0.02, 0.5], device=DEVICE), v_scale=torch.tensor([0.3, 0.01], device=DEVICE))
    keys, values = sequences((20, 1, 34), dtype=dtype)
    cache, which = filled(layout, keys, values, dtype=FP8, **scales)
    q, k, v = map(torch.stack, tokens((2, 2, 2), dtype))
    found = attend(cache, which, q, k, v, causal=True, num_splits=2, backend=backend)
    keys = [dequantised(x, scales["k_scale"]) for x in grown(keys, k)]
    values = [dequantised(x, scales["v_scale"]) for x in grown(values, v)]
    assert_right(found, last_rows(q, keys, values, lambda own: dict(causal=True)))


@every_backend
@pytest.mark.parametrize("layout, dtype, dims, heads, queries", [
    ("contiguous", torch.float32, (40, 32), 4, 1), ("pages", torch.bfloat16, (40, 32), 6, 5),
    ("pages", torch.float32, (16, 16), 2, 3), ("foreign pages", torch.float16, (40, 32), 4, 30),
    ("left padding", torch.bfloat16, (40, 32), 40, 3), ("pages", torch.bfloat16, (576, 512), 8, 2)], ids=str)
def test_values_inside_keys(layout, dtype, dims, heads, queries, backend):
    """Multi-head latent attention: one key head, values are its first columns."""
    keys, _ = sequences((41, 0, 7), heads=1, dim=dims[0], dtype=dtype)
    cache, which = filled(layout, keys, [k[..., :dims[1]] for k in keys], v_in_k=True, room=32)
    assert cache.v_in_k
    q, k = normal(3, queries, heads, dims[0], dtype=dtype, seed=5), normal(3, queries, 1, dims[0], dtype=dtype, seed=6)
    keys = grown(keys, k)
    found = attend(cache, which, q, k, causal=True, num_splits=2, backend=backend)
    assert_right(found, last_rows(q, keys, [x[..., :dims[1]] for x in keys], lambda own: dict(causal=True)))


@every_backend
def test_fp8_values_inside_keys(backend):
    scale, dtype = torch.tensor([0.05], device=DEVICE), torch.bfloat16
    keys, _ = sequences((21, 4), heads=1, dim=24, dtype=dtype)
    cache, which = filled("pages", keys, [k[..., :16] for k in keys], v_in_k=True, dtype=FP8, k_scale=scale)
    q, k = normal(2, 1, 4, 24, dtype=dtype, seed=5), normal(2, 1, 1, 24, dtype=dtype, seed=6)
    keys = [dequantised(x, scale) for x in grown(keys, k)]
    assert_right(attend(cache, which, q, k, backend=backend), last_rows(q, keys, [x[..., :16] for x in keys]))


@every_backend
def test_wide_keys_beside_values_of_their_own(backend):
    keys, values = sequences((9,), heads=1, dim=576, dim_v=512)
    cache, which = filled("contiguous", keys, values)
    q, k, v = normal(1, 2, 2, 576), normal(1, 2, 1, 576, seed=1), normal(1, 2, 1, 512, seed=2)
    if backend == "triton":
        with pytest.raises(NotImplementedError, match="head dims over 512 but where values are stored as a part of keys"):
            attend(cache, which, q, k, v, backend=backend)
        assert cache.lengths.tolist() == [9]
    else:
        assert_right(attend(cache, which, q, k, v, backend=backend), last_rows(q, grown(keys, k), grown(values, v)))


# ---- splits and merges -----------------------------------------------------------------------------------------------

@every_backend
@pytest.mark.parametrize("num_splits, dtype, sink", [
    (1, torch.float32, True), (2, torch.bfloat16, False), (7, torch.float32, False), (7, torch.bfloat16, True),
    (64, torch.float32, True)])
def test_splits(num_splits, dtype, sink, backend):
    """Most shares of short sequences are empty, all of those without keys."""
    keys, values = sequences((0, 5, 75), heads=1, dtype=dtype)
    q, sinks = normal(3, 2, 3, DIM, dtype=dtype), normal(3)
    options = dict(sinks=sinks, causal=True) if sink else {}
    cache, which = filled("pages", keys, values, room=0)
    out, lse = attend(cache, which, q, num_splits=num_splits, backend=backend, **options)
    assert_right((out, lse), last_rows(q, keys, values, lambda own: options))
    assert (out[:2] == 0).all()
    assert torch.equal(lse[:, :2], (sinks if sink else torch.full_like(sinks, -torch.inf))[:, None].expand(3, 2))


@every_backend
def test_splits_merge_as_states_do(backend):
    """Shares of very different weight, and one that no query sees."""
    keys, values = sequences((96,))
    keys[0][64:] *= 30.0
    q = normal(1, 2, HEADS, DIM, seed=3)
    visible = torch.arange(96, device=DEVICE).sub(40).abs() > 9
    cache, which = filled("contiguous", keys, values)
    found = attend(cache, which, q, mask=visible, num_splits=3, backend=backend)

    def part(rows):
        k, v = keys[0][None, rows], values[0][None, rows]
        out, lse = tw.attention(q, k, v, mask=visible[rows], return_lse=True, backend=backend)
        return AttentionState(out.transpose(1, 2), lse)

    states = [part(slice(a, b)) for a, b in ((0, 31), (31, 50), (50, 64), (64, 96))]
    assert (states[1].lse == -torch.inf).all()
    for state in (merge_states(states), states[3].merge(states[1]).merge(states[0].merge(states[2]))):
        torch.testing.assert_close(found, as_packed(state.out.transpose(1, 2), state.lse), rtol=2e-5, atol=2e-5)


INVARIANT = {
    "causal": dict(causal=True),
    "bf16": dict(causal=True),
    "window, softcap, alibi": dict(mask=tw.window(70, 0), score_mod=[tw.softcap(2.0), tw.alibi(normal(2))]),
    "sinks, dropout": dict(causal=True, sinks=normal(2), dropout_p=0.2, rng=tw.Rng(5)),
    "function": dict(mask=lambda b, h, q, k: (k <= q) & ((q - k < 20) | (k % 40 < 9 + h))),
}


@on_triton
@pytest.mark.parametrize("name", INVARIANT)
def test_batch_invariant(name, monkeypatch, forgetful):
    """A row's bits are the same alone, among others, decoded one by one, in chunks or at once, in pages or not."""
    from tilewise.backends.gpu_math import splits
    from tilewise.backends.triton import configs
    monkeypatch.setattr(configs, "SPAN", 64)                # three spans
    monkeypatch.setattr(splits, "multiprocessors", lambda device: 132)      # other calls would split decoding
    length, other, heads, dtype = 150, 40, 2, torch.bfloat16 if name == "bf16" else torch.float32
    parts = sequences((length, other), heads=1, dtype=dtype)
    parts.append([normal(n, heads, DIM, seed=3 + n, dtype=dtype) for n in (length, other)])
    if dtype == torch.bfloat16:     # products are exact then: the bits of numpy's, in the interpreter, depend on a row's place
        parts = [[x.round().clamp(-1, 1) for x in part] for part in parts]
    (k, other_k), (v, other_v), (q, other_q) = parts
    options = INVARIANT[name] | dict(batch_invariant=True, backend="triton", return_lse=True)
    out, lse = (x[0] for x in tw.attention(q[None], k[None], v[None], **options))

    def same(found, rows):
        found = [x.narrow(axis, 0, len(out[rows])) for axis, x in enumerate(as_packed(*found))]
        assert torch.equal(found[0], out[rows])
        assert torch.equal(found[1], lse[:, rows])

    def call(cache, which, q, *new, **more):
        return tw.attention_with_kv_cache(q, cache, *new, cache_batch_idx=which, **options, **more)

    if name not in ("sinks, dropout", "function"):          # in dense calls rows count from the first query for these
        for first, end in ((length - 1, length), (64, 65), (40, 100)):
            same(tw.attention(q[None, first:end], k[None, :end], v[None, :end], **options), slice(first, end))
    for layout, chunks in (("contiguous", (0, 150)), ("pages", (0, 60, 80, 150))):
        cache, which = filled(layout, [k[:0], other_k], [v[:0], other_v], room=150)
        for rows in map(slice, chunks, chunks[1:]):
            same(call(cache, which[:1], q[None, rows], k[None, rows], v[None, rows]), rows)
        mixed = torch.cat([q[-4:], other_q[-1:]])
        same(call(cache, which, mixed, cu_seqlens_q=ints(0, 4, 5)), slice(length - 4, length))
    positions = torch.tensor([0, 31, 64, 95, 149], device=DEVICE)
    many = tw.KVCache.wrap(k.expand(5, -1, -1, -1), v.expand(5, -1, -1, -1), (positions + 1).int())
    if "rng" not in options:                                # its bits differ between sequences
        same(call(many, None, q[positions][:, None]), positions)
    same(call(many, ints(3).long(), q[95:96][None]), slice(95, 96))
    packed = torch.cat([q, other_q]), torch.cat([k, other_k]), torch.cat([v, other_v])
    same(tw.attention_varlen(*packed, ends((length, other)), **options), slice(0, length))


@pytest.mark.skipif("tiled" not in AVAILABLE, reason="in the interpreter's process only Triton runs")
def test_tiled_promises_no_batch_invariance():
    keys, values = sequences((5,))
    cache, which = filled("pages", keys, values)
    with pytest.raises(NotImplementedError, match=r"'tiled' cannot compute this: .* do not promise batch_invariant"):
        attend(cache, which, *map(torch.stack, tokens((1,))), batch_invariant=True, backend="tiled")
    assert cache.length(which[0]) == 5


# ---- a prefix that all share -----------------------------------------------------------------------------------------

CASCADES = {
    "nothing": ({}, {}),
    "causal": (dict(causal=True), dict(causal=True)),
    "sinks, softcap": (dict(causal=True, sinks=normal(HEADS), score_mod=tw.softcap(1.5)),) * 2,
    "heads": (dict(score_mod=lambda s, b, h, q, k: s / (1.0 + h), scale=0.9),) * 2,
    "window": (dict(mask=tw.window(4, 0)), dict(mask=lambda b, h, q, k: (k <= q) & ((k < 13) | (q - k <= 4)))),
}


@every_backend
@pytest.mark.parametrize("name", CASCADES)
@pytest.mark.parametrize("layout, packed", [("left padding", False), ("pages", True)])
def test_cascade(name, layout, packed, backend):
    """The second options are those of dense attention over prefix and own keys together."""
    given, options = CASCADES[name]
    dtype = torch.bfloat16 if name == "causal" else torch.float32
    keys, values = sequences((9, 0, 20), dtype=dtype)
    counts = (3, 1, 5) if packed else (2, 2, 2)
    q, k, v = tokens(counts, dtype)
    (prefix_k,), (prefix_v,) = sequences((13,), dtype=dtype, seed=70)
    cache, which = filled(layout, keys, values)
    join, given = (torch.cat, given | dict(cu_seqlens_q=ends(counts))) if packed else (torch.stack, given)
    found = tw.cascade_attention(join(q), prefix_k, prefix_v, cache, join(k), join(v), cache_batch_idx=which, num_splits=2,
                                 return_lse=True, backend=backend, check=True, **given)
    whole = [[torch.cat([prefix, x, new]) for x, new in zip(old, part, strict=True)]
             for prefix, old, part in ((prefix_k, keys, k), (prefix_v, values, v))]
    assert_right(as_packed(*found), last_rows(q, *whole, lambda own: options))
    assert cache.lengths.tolist() == [len(x) - 13 for x in whole[0]]


@every_backend
@pytest.mark.parametrize("interleaved", [False, True])
def test_cascade_turns_behind_the_prefix(interleaved, backend):
    rotary = tw.Rotary.of(DIM, 40, interleaved=interleaved, device=DEVICE)
    keys, values = sequences((24, 16))
    q = normal(2, 3, HEADS, DIM, seed=5)
    (prefix_k,), (prefix_v,) = sequences((13,), seed=70)
    keys, values = [torch.cat([prefix_k, x]) for x in keys], [torch.cat([prefix_v, x]) for x in values]
    turned = rotary.rotate(prefix_k.transpose(0, 1), torch.arange(13, device=DEVICE)).transpose(0, 1)
    cache, which = filled("pages", [x[:0] for x in keys], [x[:0] for x in values], room=40)
    own = [x[13:] for x in keys], [x[13:] for x in values]
    found = []
    for b in (0, 1):                                        # a prompt all at once, and in two pieces
        for rows in (slice(0, 10), slice(10, len(own[0][b]))):
            queries = q[b:b + 1, :2] if rows.start == 0 else q[b:b + 1]
            new = own[0][b][None, rows], own[1][b][None, rows]
            found = tw.cascade_attention(queries, turned, prefix_v, cache, *new, cache_batch_idx=[which[b]], rotary=rotary,
                                         causal=True, return_lse=True, backend=backend)
        expected = last_rows(q[b:b + 1], keys[b:b + 1], values[b:b + 1], lambda own: dict(causal=True), rotary)
        assert_right(as_packed(*found), expected)


@every_backend
def test_cascade_of_nothing(backend):
    """No prefix, no keys of one's own, or neither."""
    keys, values = sequences((6, 0))
    q, sinks = normal(2, 2, HEADS, DIM, seed=5), normal(HEADS)
    for length in (0, 5):
        (prefix_k,), (prefix_v,) = sequences((length,), seed=70)
        cache, which = filled("contiguous", keys, values)
        found = tw.cascade_attention(q, prefix_k, prefix_v, cache, cache_batch_idx=which, sinks=sinks, return_lse=True,
                                     backend=backend)
        whole = [torch.cat([prefix_k, x]) for x in keys], [torch.cat([prefix_v, x]) for x in values]
        assert_right(as_packed(*found), last_rows(q, *whole, lambda own: dict(sinks=sinks)))


# ---- errors ----------------------------------------------------------------------------------------------------------

def everything(cache):
    """All that a call may change, bit by bit."""
    memory = [x.contiguous().view(torch.uint8).tolist() for x in (cache.k, cache.v)]
    book = getattr(cache, "book", None)
    pages = [] if book is None else [
        cache.block_table.tolist(), book.free_pages.copy(), book.free_sequences.copy(), book.references.copy(),
        {sequence: list(pages) for sequence, pages in book.pages.items()}, book.lengths.copy()]
    return memory, cache.lengths.tolist(), pages


def unchanged(cache, before):
    return everything(cache) == before      # not in an assertion, which would print it all


Q, K, V = map(torch.stack, tokens((3, 3)))
NEEDS_GRADIENT = [({name: x.clone().requires_grad_()}, ValueError, f"{name}: expected no gradient, since a cache is for")
                  for name, x in (("q", Q), ("k_new", K), ("v_new", V))]
PACKED = dict(q=Q.flatten(0, 1), k_new=K.flatten(0, 1), v_new=V.flatten(0, 1))
ROTARY = tw.Rotary.of(DIM, 99, device=DEVICE)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(mask=3), TypeError, "mask: expected None, a mask"),
    (dict(mask="causal"), TypeError, "mask: expected None, a mask"),
    (dict(mask=torch.ones(5, 9, dtype=torch.bool, device=DEVICE)), ValueError, "mask: expected size 13 in dimension 1"),
    (dict(mask=lambda b, h, q, k: q > k if q > 0 else k > q), tw.CaptureError, "q"),
    (dict(mask=tw.key_lengths(ints(3, 14))), ValueError, "key_lengths: lengths: expected values from 0 to 13"),
    (dict(causal=1), TypeError, "causal: expected True or False, got 1"),
    (dict(score_mod="tanh"), TypeError, "score_mod: expected None, a score function"),
    (dict(bias=normal(HEADS, 3, 12)), ValueError, r"bias: expected a shape that .* \[2, 4, 3, 13\], got \[4, 3, 12\]"),
    (dict(bias=torch.ones(13, dtype=torch.int32, device=DEVICE)), TypeError, "bias: expected a floating tensor"),
    (dict(sinks=normal(3)), ValueError, r"sinks: expected a floating tensor \[H\] = \[4\], got torch.float32 \[3\]"),
    (dict(scale="1"), ValueError, "scale: expected None or a finite number, got '1'"),
    (dict(dropout_p=1.0), ValueError, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
    (dict(dropout_p=0.5, rng=7), TypeError, "rng: expected None or tw.Rng"),
    (dict(q=None), ValueError, r"q: expected \[B, S_q, heads, head_dim\] with B = 2 sequences, .* got NoneType"),
    (dict(q=Q[:1]), ValueError, r"q: expected \[B, S_q, heads, head_dim\] with B = 2 sequences, .* got \[1, 3, 4, 8\]"),
    (dict(q=Q[0]), ValueError, r"q: expected \[B, S_q, heads, head_dim\] .* got \[3, 4, 8\]"),
    (dict(q=Q[:, :, :3]), ValueError, "k: expected a number of heads that divides q's 3, got 2"),
    (dict(q=Q[..., :7]), ValueError, "k: expected q's head_dim 7, got 8"),
    (dict(q=Q.bfloat16()), TypeError, "q: expected the cache's dtype torch.float32, got torch.bfloat16"),
    (dict(k_new=K.bfloat16()), TypeError, "k_new: expected float32, got torch.bfloat16"),
    (dict(k_new=K[:, :2]), ValueError, r"v_new: expected \[2, 2, 2, 6\], got \[2, 3, 2, 6\]"),
    (dict(k_new=K[0]), ValueError, r"k_new: expected \[2, S_new, 2, 8\], got \[3, 2, 8\]"),
    (dict(v_new=None), ValueError, "v_new: expected a tensor like k_new, got None"),
    (dict(k_new=None), ValueError, "v_new: expected None without k_new"),
    (dict(k_new=None, v_new=None, rotary=ROTARY), ValueError, "rotary: expected None without k_new"),
    (dict(rotary=tw.Rotary.of(DIM, 12, device=DEVICE)), ValueError, "rotary: expected tables for 13 positions, got 12"),
    (dict(rotary=ROTARY, q=normal(2, 8, HEADS, DIM)), ValueError, r"q: expected at most as many queries .* \(7\), got 8"),
    (dict(PACKED, cu_seqlens_q=ints(0, 6)), ValueError, "cu_seqlens_q: expected 2 sequences, got 1"),
    (dict(PACKED, cu_seqlens_q=ints(0, 2, 7)), ValueError, r"cu_seqlens_q: .* got \[0, 2, 7\]"),
    (dict(PACKED, cu_seqlens_q=[0, 3, 6]), TypeError, "cu_seqlens_q: expected an int32 tensor of one dimension, got list"),
    (dict(PACKED, cu_seqlens_q=ints(0, 3, 6), max_seqlen_q=2), ValueError, "max_seqlen_q: expected at least the longest"),
    (dict(PACKED, cu_seqlens_q=ints(0, 3, 6), k_new=K), ValueError, r"k_new: expected \[total, 2, 8\], got \[2, 3, 2, 8\]"),
    (dict(q=Q, cu_seqlens_q=ints(0, 3, 6)), ValueError, "q: expected packed sequences"),
    (dict(num_splits=0), ValueError, "num_splits: expected None or an integer from 1 to 256, got 0"),
    (dict(num_splits=1000), ValueError, "num_splits: expected None or an integer from 1 to 256, got 1000"),
    (dict(num_splits=True), ValueError, "num_splits: expected None or an integer from 1 to 256, got True"),
    (dict(num_splits=2, batch_invariant=True), ValueError, "num_splits: expected None with batch_invariant"),
    (dict(backend="cuda"), ValueError,
     'backend: expected "auto" or one of hopper, triton, cpu, tiled, reference, got \'cuda\''),
    (dict(k_new=normal(2, 20, KV_HEADS, DIM), v_new=normal(2, 20, KV_HEADS, DIM_V)), (ValueError, tw.CacheFull),
     "k_new: expected at most .* got 20|pages: needed 12, free 6|block_table: expected pages .* got -7"),
    (dict(k_new=normal(2, 40, KV_HEADS, DIM), v_new=normal(2, 40, KV_HEADS, DIM_V)), ValueError, "expected at most .* got 40"),
    *NEEDS_GRADIENT,
])
@pytest.mark.parametrize("layout", ["left padding", "pages", "foreign pages"])
def test_errors_change_nothing(layout, arguments, error, message):
    keys, values = sequences((10, 4))
    cache, which = filled(layout, keys, values, room=6)
    before = everything(cache)
    given = dict(dict(q=Q, k_new=K, v_new=V, backend=NATIVE), **arguments)
    with pytest.raises(error, match=message):
        tw.attention_with_kv_cache(given.pop("q"), cache, cache_batch_idx=which, check=True, **given)
    assert unchanged(cache, before)
    attend(cache, which, Q, K, V, backend=NATIVE)
    assert cache.lengths.tolist() == [13, 7]


@pytest.mark.parametrize("quietly", [torch.no_grad, torch.inference_mode])
def test_without_gradients(quietly):
    keys, values = sequences((10, 4))
    cache, which = filled("pages", keys, values)
    with quietly():
        found = attend(cache, which, *(x.clone().requires_grad_() for x in (Q, K, V)), causal=True, backend=NATIVE)
    assert_right(found, last_rows(Q, grown(keys, K), grown(values, V), lambda own: dict(causal=True)))


@pytest.mark.parametrize("which, error, message", [
    (torch.tensor([0.0, 1.0]), TypeError, "expected int32 or int64, got torch.float32"), (ints(0, 2), ValueError, "got 2"),
    (ints(1, 1), ValueError, "got 1 twice"), (ints(0), ValueError, "with B = 1 sequences")])
@pytest.mark.parametrize("layout", ["left padding", "pages"])
def test_sequences_that_there_are_not(layout, which, error, message):
    cache, _ = filled(layout, *sequences((10, 4)))
    before = everything(cache)
    with pytest.raises(error, match=message):
        attend(cache, which, Q, K, V, backend=NATIVE)
    assert unchanged(cache, before)


@on_triton
def test_triton_takes_no_fp64():
    cache, which = filled("pages", *sequences((10, 4), dtype=torch.float64))
    before = everything(cache)
    with pytest.raises(NotImplementedError, match="backend='triton' cannot compute this: fp64"):
        attend(cache, which, Q.double(), K.double(), V.double(), backend="triton")
    assert unchanged(cache, before)


def test_what_is_no_cache():
    with pytest.raises(TypeError, match="cache: expected a KVCache or a PagedKVCache, got Tensor"):
        tw.attention_with_kv_cache(Q, K, K, V)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(score_mod=tw.alibi(normal(HEADS))), ValueError, "score_mod: expected a function of the score and the head alone"),
    (dict(score_mod=lambda s, b, h, q, k: s + b), ValueError, "score_mod: expected a function of the score and the head alone"),
    (dict(prefix_k=K), ValueError, r"prefix_k: expected \[S_p, 2, 8\], got \[2, 3, 2, 8\]"),
    (dict(prefix_v=None), TypeError, "prefix_v: expected .* got NoneType"),
    (dict(prefix_k=K[0, ..., :7]), ValueError, r"prefix_k: expected \[S_p, 2, 8\], got \[3, 2, 7\]"),
    (dict(prefix_v=V[0, :2]), ValueError, r"prefix_v: expected \[3, 2, 6\], got \[2, 2, 6\]"),
    (dict(prefix_k=K[0].double()), TypeError, "prefix_k: expected float32, got torch.float64"),
    (dict(prefix_k=K[0, :, :1], prefix_v=V[0, :, :1]), ValueError, r"prefix_k: expected \[S_p, 2, 8\], got \[3, 1, 8\]"),
    (dict(prefix_v=V[0, ..., :5]), ValueError, r"prefix_v: expected \[3, 2, 6\], got \[3, 2, 5\]"),
    (dict(sinks=normal(3)), ValueError, r"sinks: expected \[4\], got \[3\]"),
    (dict(rotary=tw.Rotary.of(DIM, 15, device=DEVICE)), ValueError, "rotary: expected tables for 1[36] positions"),
    (dict(rotary=tw.Rotary.of(DIM, 3, device=DEVICE)), ValueError, "rotary: expected a Rotary of more positions than"),
    (dict(rotary="llama"), ValueError, "rotary: expected a Rotary of more positions than .* got str"),
    (dict(mask=3), TypeError, "mask: expected None, a mask"), (dict(q=Q[:1]), ValueError, "with B = 2 sequences"),
])
def test_errors_of_cascades_change_nothing(arguments, error, message):
    cache, which = filled("pages", *sequences((10, 4)))
    before = everything(cache)
    given = dict(dict(q=Q, prefix_k=K[0], prefix_v=V[0], k_new=K, v_new=V), **arguments)
    with pytest.raises(error, match=message):
        tw.cascade_attention(*(given.pop(name) for name in ("q", "prefix_k", "prefix_v")), cache, cache_batch_idx=which,
                             backend=NATIVE, **given)
    assert unchanged(cache, before)


@every_backend
@pytest.mark.parametrize("layout", ["contiguous", "pages"])
@pytest.mark.parametrize("name", ["bias", "sinks", "slopes"])
def test_learned_tensors_get_no_wrong_gradient(name, layout, backend):
    """A cache is for inference: such a call raises, or its results need no gradient, or it is the right one."""
    keys, values = sequences((10, 4))
    cache, which = filled(layout, keys, values)
    learned = dict(bias=normal(HEADS, 3, 13), sinks=normal(HEADS), slopes=normal(HEADS))[name].requires_grad_()
    weights = normal(6, HEADS, DIM_V, seed=1)

    def options(own):
        bias = learned if own.start is None else learned[..., :(13, 7)[own.start]]
        return {"score_mod": tw.alibi(learned)} if name == "slopes" else {name: bias if name == "bias" else learned}

    try:
        out, _ = attend(cache, which, Q, K, V, backend=backend, **options(slice(None)))
    except ValueError as error:
        assert "expected no gradient" in str(error)     # noqa: PT017
        assert cache.lengths.tolist() == [10, 4]
        return
    if out.requires_grad:
        expected, _ = last_rows(Q, grown(keys, K), grown(values, V), options, whole=False)(torch.float64)
        gradients = [torch.autograd.grad((x * weights).sum(), learned)[0] for x in (out, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("num_splits", [None, 2])
def test_more_queries_than_keys(num_splits, backend):
    """The first queries stand before the first key."""
    keys, values = sequences((5, 0))
    q = normal(2, 8, HEADS, DIM)
    cache, which = filled("pages", keys, values)
    several = dict(causal=True), dict(mask=tw.window(2, None)), dict(score_mod=tw.alibi(normal(HEADS)), sinks=normal(HEADS))
    for options in several:
        found = attend(cache, which, q, num_splits=num_splits, backend=backend, **options)
        assert_right(found, last_rows(q, keys, values, lambda own, o=options: o))
    found = attend(cache, which[:1], q[:1], mask=lambda b, h, q, k: q + 3 >= 0, num_splits=num_splits, backend=backend)
    assert (found[1] > -torch.inf).all()
    found = attend(cache, which[:1], q[:1], mask=lambda b, h, q, k: q + 2 >= 0, num_splits=num_splits, backend=backend)
    assert (found[1] == -torch.inf).sum() == HEADS      # positions are -3 to 4


# ---- what a call will do ---------------------------------------------------------------------------------------------

@every_backend
def test_explain(backend):
    lengths = (75, 1, 0, 40)
    keys, values = sequences(lengths)
    for layout, text in (("contiguous", "from a cache"), ("pages", "from pages of 3")):
        cache, which = filled(layout, keys, values)
        before = everything(cache)
        q = normal(4, 2, HEADS, DIM)
        plan = tw.explain(q, cache, cache_batch_idx=which, causal=True, num_splits=5, return_lse=True, backend=backend)
        assert (plan.backend, plan.splits, plan.problem.batch, plan.problem.cached) == (backend, 5, 4, True)
        assert plan.tiles_in_all == HEADS * sum(-(-2 // plan.tiles[0]) * -(-n // plan.tiles[1]) for n in lengths)
        assert 0 < plan.visited <= plan.tiles_in_all
        assert 0 < plan.flops[0] <= 2 * HEADS * 2 * sum(-(-n // plan.tiles[1]) * plan.tiles[1] for n in lengths) * (DIM + DIM_V)
        for part in (text, "B 4, S 2, H 4, D 8", "in 5 shares", "a cache is for inference", f"backend       {backend}"):
            assert part in str(plan)
        assert unchanged(cache, before)
    counts = (30, 1, 0, 40)                                 # of queries: the end of a prompt, one, none, a whole prompt
    packed = tw.explain(normal(71, HEADS, DIM), cache, cache_batch_idx=which, cu_seqlens_q=ends(counts), causal=True,
                        backend=backend)
    assert "71 in B 4, S up to 40" in str(packed)
    assert packed.tiles_in_all == HEADS * sum(-(-m // packed.tiles[0]) * -(-n // packed.tiles[1])
                                              for m, n in zip(counts, lengths, strict=True))
    assert packed.written == 71 * HEADS * (DIM_V * 4 + 4)
    if backend == NATIVE:
        assert packed.visited < packed.tiles_in_all


@every_backend
def test_explain_packed(backend):
    counts = (64, 1, 0, 33)
    q, k = normal(98, HEADS, DIM), normal(98, KV_HEADS, DIM)
    plan = tw.explain(q, k, k, cu_seqlens_q=ends(counts), causal=True, backend=backend)
    assert "98 in B 4, S up to 64" in str(plan)
    assert plan.tiles_in_all == HEADS * sum(-(-n // plan.tiles[0]) * -(-n // plan.tiles[1]) for n in counts)
    alone = [tw.explain(q[None, :n], k[None, :n], k[None, :n], causal=True, backend=backend) for n in counts if n]
    if backend == "triton":                                 # whose tiles are the same for all lengths
        assert (plan.visited, plan.full, plan.flops[0]) == tuple(
            sum(x) for x in zip(*((p.visited, p.full, p.flops[0]) for p in alone), strict=True))
    assert plan.standard_workspace == sum(p.standard_workspace for p in alone)


def test_lengths_that_the_host_does_not_know():
    """On a device they are bounded by what there is memory for, or by what the host's book says."""
    shape, meta = (KV_HEADS, DIM), dict(device="meta", dtype=torch.float32)
    q, k = torch.empty(2, 3, HEADS, DIM, **meta), torch.empty(2, 3, *shape, **meta)
    flat, pages = tw.KVCache(2, 20, *shape, **meta), tw.PagedKVCache(16, 4, *shape, max_sequences=2, **meta)
    numbers = [pages.new(), pages.new()]
    pages.append(k, k, sequences=numbers)
    foreign = tw.PagedKVCache.wrap(pages.k, pages.v, pages.block_table[:, :3], pages.lengths)

    def longest(cache, which=None, extended=False):
        return api._of_cache(q, cache, k, cache_batch_idx=which, extended=extended)[0].seqlen_k

    assert longest(pages, numbers) == 6
    assert longest(flat) == 20
    assert longest(foreign) == 12
    pages.extend(numbers, [3, 3])
    assert longest(pages, numbers, extended=True) == 6


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "reference"])
def test_cascades_under_autocast(backend):
    """fp32 queries, prefix and tokens are cast together, to the dtype of the cache."""
    cache, twin = (tw.KVCache(2, 9, KV_HEADS, DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    x = normal(2, 3, HEADS, DIM), normal(5, KV_HEADS, DIM), normal(5, KV_HEADS, DIM)
    new = normal(2, 3, KV_HEADS, DIM), normal(2, 3, KV_HEADS, DIM)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = tw.cascade_attention(*x, cache, *new, causal=True, backend=backend)
    half = [t.bfloat16() for t in (*x, *new)]
    assert torch.equal(found, tw.cascade_attention(*half[:3], twin, *half[3:], causal=True, backend=backend))
