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
    return [[normal(n, heads, size, seed=seed + 10 * b + size, dtype=dtype) for b, n in enumerate(lengths)] for size in (dim, dim_v)]


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
    cache.append(torch.cat(keys), None if v_in_k else torch.cat(values), cu_seqlens=ends(map(len, keys)), rotary=rotary, check=True,
                 **where)
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
            out, lse = tw.attention(rows[None], k[None], v[None], **options(slice(b, b + 1)), backend="reference", return_lse=True)
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
    q, k, v = (normal(3, NEW, heads, dim, seed=9 + dim) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
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
    for queries in (1, 5):
        q = normal(3, queries, HEADS, DIM, seed=5)
        for options in (dict(mask=lambda b, h, q, k: (ids[q] == ids[k]) & (k <= q)), dict(score_mod=lambda s, b, h, q, k: s + table[q])):
            cache, which = filled("pages", keys, values, room=0)
            assert_right(attend(cache, which, q, backend=backend, **options), last_rows(q, keys, values, lambda own, o=options: o))


TABLES = {
    "boolean": lambda own, b, nq, nk: dict(mask=(normal(3, 1, 4, 40) > -0.5)[b, :, :nq, :nk]),
    "boolean of keys": lambda own, b, nq, nk: dict(mask=(normal(40) > -0.5)[:nk], causal=True),
    "bias": lambda own, b, nq, nk: dict(bias=normal(3, HEADS, 4, 40)[b, :, :nq, :nk]),
    "bias of keys, -inf": lambda own, b, nq, nk: dict(bias=(3 - 9 * normal(HEADS, 1, 40).relu()).log()[:, :, :nk].nan_to_num(
        -torch.inf)),
    "documents": lambda own, b, nq, nk: dict(mask=tw.documents((torch.arange(12, device=DEVICE).view(3, 4) // 3 - 1)[b, :nq],
                                                               (torch.arange(120, device=DEVICE).view(3, 40) % 5 // 2)[b, :nk])),
}


@every_backend
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_tables_are_queries(name, packed, backend):
    """Rows i, columns kv_idx; tables reach to the longest sequence."""
    keys, values = sequences((37, 3, 20))
    counts = (4, 1, 3) if packed else (4, 4, 4)
    q, k, v = ([normal(n, heads, dim, seed=b + dim) for b, n in enumerate(counts)]
               for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
    whole = grown(keys, k), grown(values, v)
    whole = [[x[-40:] for x in part] for part in whole]
    keys, values = ([x[:len(x) - n] for x, n in zip(part, counts, strict=True)] for part in whole)

    def options(own):
        b = own.start
        return TABLES[name](own, slice(None), 4, 40) if b is None else TABLES[name](own, own, counts[b], len(whole[0][b]))

    cache, which = filled("pages", keys, values, room=4)
    given = [torch.cat(x) if packed else torch.stack(x) for x in (q, k, v)]
    found = attend(cache, which, *given, backend=backend, cu_seqlens_q=ends(counts) if packed else None, **options(slice(None)))
    assert_right(found, last_rows(q, *whole, options, whole=False))


@every_backend
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout, dtype", [("left padding", torch.float32), ("pages", torch.bfloat16)])
def test_rotary(layout, dtype, interleaved, backend):
    rotary = tw.Rotary.of(6, 40, interleaved=interleaved, device=DEVICE)
    keys, values = sequences(LENGTHS, dtype=dtype)
    counts = (3, 0, 5)
    q, k, v = ([normal(n, heads, dim, seed=b + dim, dtype=dtype) for b, n in enumerate(counts)]
               for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
    cache, which = filled(layout, keys, values, rotary=rotary)
    found = attend(cache, which, *map(torch.cat, (q, k, v)), cu_seqlens_q=ends(counts), rotary=rotary, causal=True, backend=backend)
    keys, values = grown(keys, k), grown(values, v)
    assert_right(found, last_rows(q, keys, values, lambda own: dict(causal=True), rotary))
    q, k, v = (normal(3, 1, heads, dim, dtype=dtype) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
    found = attend(cache, which, q, k, v, rotary=rotary, backend=backend)
    assert_right(found, last_rows(q, grown(keys, k), grown(values, v), rotary=rotary))


# ---- which sequences share a call ------------------------------------------------------------------------------------

@every_backend
@pytest.mark.parametrize("layout", ["left padding", "pages", "foreign pages"])
def test_some_sequences_in_any_order(layout, backend):
    keys, values = sequences((8, 0, 17, 5))
    cache, which = filled(layout, keys, values)
    chosen = [3, 1, 0]
    q, k, v = (normal(3, 2, heads, dim, seed=3) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
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
    q, k, v = ([normal(n, heads, dim, seed=b + dim, dtype=dtype) for b, n in enumerate(counts)]
               for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
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
    out, lse = attend(cache, which, normal(2, 0, HEADS, DIM), normal(2, 2, KV_HEADS, DIM), normal(2, 2, KV_HEADS, DIM_V), mask=mask,
                      num_splits=2, backend=backend)
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
    q, k, v = (normal(2, 6, heads, dim, seed=dim) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
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
        accepted = [[torch.cat([x[b], new[b, :n], new[b, 5:]]) for b, n in enumerate((3, 1))] for x, new in ((keys, k), (values, v))]
        found = attend(cache, which, q[:, :1], k[:, 5:], v[:, 5:], causal=True, backend=backend)
        assert_right(found, last_rows(q[:, :1], *accepted, lambda own: dict(causal=True)))


# ---- what is stored --------------------------------------------------------------------------------------------------

@every_backend
@pytest.mark.parametrize("layout", ["left padding", "pages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8(layout, dtype, backend):
    scales = dict(k_scale=torch.tensor([0.02, 0.5], device=DEVICE), v_scale=torch.tensor([0.3, 0.01], device=DEVICE))
    keys, values = sequences((20, 1, 34), dtype=dtype)
    cache, which = filled(layout, keys, values, dtype=FP8, **scales)
    q, k, v = (normal(3, 2, heads, dim, seed=dim, dtype=dtype) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)))
    found = attend(cache, which, q, k, v, causal=True, num_splits=2, backend=backend)

    def dequantised(x, scale):
        return (x.float() / scale[:, None]).clamp(-448, 448).to(FP8).double() * scale[:, None].double()

    keys = [dequantised(x, scales["k_scale"]) for x in grown(keys, k)]
    values = [dequantised(x, scales["v_scale"]) for x in grown(values, v)]
    assert_right(found, last_rows(q, keys, values, lambda own: dict(causal=True)))


@every_backend
@pytest.mark.parametrize("layout, dtype, dims, heads, queries", [
    ("contiguous", torch.float32, (40, 32), 4, 1), ("pages", torch.bfloat16, (40, 32), 6, 5), ("pages", torch.float32, (16, 16), 2, 3),
    ("foreign pages", torch.float16, (40, 32), 4, 30), ("pages", torch.bfloat16, (576, 512), 8, 2)], ids=str)
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
@pytest.mark.parametrize("num_splits", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits(num_splits, dtype, backend):
    """Most shares of short sequences are empty, all of those without keys."""
    keys, values = sequences((0, 1, 5, 75), heads=1, dtype=dtype)
    q, sinks = normal(4, 2, 3, DIM, dtype=dtype), normal(3)
    cache, which = filled("pages", keys, values, room=0)
    for options in ({}, dict(sinks=sinks, causal=True)):
        out, lse = attend(cache, which, q, num_splits=num_splits, backend=backend, **options)
        assert_right((out, lse), last_rows(q, keys, values, lambda own, o=options: o))
        assert (out[:2] == 0).all()
        assert torch.equal(lse[:, :2], sinks[:, None].expand(3, 2) if options else torch.full_like(lse[:, :2], -torch.inf))


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
        out, lse = tw.attention(q, keys[0][None, rows], values[0][None, rows], mask=visible[rows], return_lse=True, backend=backend)
        return AttentionState(out.transpose(1, 2), lse)

    states = [part(slice(a, b)) for a, b in ((0, 31), (31, 50), (50, 64), (64, 96))]
    assert (states[1].lse == -torch.inf).all()
    for state in (merge_states(states), states[3].merge(states[1]).merge(states[0].merge(states[2]))):
        torch.testing.assert_close(found, as_packed(state.out.transpose(1, 2), state.lse), rtol=2e-5, atol=2e-5)


INVARIANT = {
    "causal": lambda own: dict(causal=True),
    "bf16": lambda own: dict(causal=True),
    "window, softcap, alibi": lambda own: dict(mask=tw.window(70, 0), score_mod=[tw.softcap(2.0), tw.alibi(SLOPES[0])]),
    "sinks, dropout": lambda own: dict(causal=True, sinks=normal(HEADS), dropout_p=0.2, rng=tw.Rng(5, 0, own.start or 0)),
    "function": lambda own: dict(mask=lambda b, h, q, k: (k <= q) & ((q - k < 20) | (k % 40 < 9 + h))),
}


@on_triton
@pytest.mark.parametrize("name", INVARIANT)
def test_batch_invariant(name, monkeypatch):
    """A row's bits are the same alone, among others, decoded one by one, in chunks or at once, in pages or not."""
    from tilewise.backends.triton import configs
    monkeypatch.setattr(configs, "SPAN", 32)
    length, dtype = 150, torch.bfloat16 if name == "bf16" else torch.float32
    (k, other_k), (v, other_v) = sequences((length, 70), dtype=dtype)
    q, other_q = normal(length, HEADS, DIM, seed=3, dtype=dtype), normal(70, HEADS, DIM, seed=4, dtype=dtype)
    options = INVARIANT[name](slice(0, 1)) | dict(batch_invariant=True, backend="triton")
    out, lse = tw.attention(q[None], k[None], v[None], return_lse=True, **options)
    out, lse = out[0], lse[0]

    def same(found, rows):
        assert torch.equal(found[0], out[rows])
        assert torch.equal(found[1], lse[:, rows])

    def last(n, end=length):
        return tw.attention(q[None, end - n:end], k[None, :end], v[None, :end], return_lse=True, **options)

    if "dropout_p" not in options and name != "function":          # there rows of dense calls count from their first query
        same(as_packed(*last(1)), slice(length - 1, length))
        same(as_packed(*last(50, 120)), slice(70, 120))
    for layout, chunks in (("contiguous", (150,)), ("pages", (97, 20, 33))):
        cache, which = filled(layout, [k[:0], other_k], [v[:0], other_v], room=160)
        at = 0
        for n in chunks:
            rows = slice(at, at + n)
            same(attend(cache, which[:1], q[None, rows], k[None, rows], v[None, rows], **options), rows)
            at += n
        both = torch.cat([q[-4:], other_q[-1:]])
        same([x.narrow(axis, 0, 4) for axis, x in enumerate(attend(cache, which, both, cu_seqlens_q=ints(0, 4, 5), **options))],
             slice(length - 4, length))
    positions = torch.tensor([0, 31, 32, 95, 149], device=DEVICE)
    many = tw.KVCache.wrap(k.expand(5, -1, -1, -1), v.expand(5, -1, -1, -1), (positions + 1).int())
    if "rng" not in options:                                          # whose bits differ between sequences
        same(attend(many, None, q[positions][:, None], **options), positions)
    same(attend(many, ints(3), q[95:96][None], **options), slice(95, 96))
    if name != "function":
        packed = tw.attention_varlen(torch.cat([q, other_q]), torch.cat([k, other_k]), torch.cat([v, other_v]), ends((length, 70)),
                                     return_lse=True, **options)
        same([x.narrow(axis, 0, length) for axis, x in enumerate(packed)], slice(0, length))


@pytest.mark.skipif("tiled" not in AVAILABLE, reason="in the interpreter's process only Triton runs")
def test_tiled_promises_no_batch_invariance():
    keys, values = sequences((5,))
    cache, which = filled("pages", keys, values)
    with pytest.raises(NotImplementedError, match="backend='tiled' cannot compute this: torch's products do not promise batch_inv"):
        attend(cache, which, normal(1, 1, HEADS, DIM), *(normal(1, 1, KV_HEADS, n) for n in (DIM, DIM_V)), batch_invariant=True,
               backend="tiled")
    assert cache.length(which[0]) == 5
