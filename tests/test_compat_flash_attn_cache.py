"""flash_attn_with_kvcache of flash-attn 2 and 3, and paged flash_attn_varlen_func, against dense attention to whole sequences.

Whatever no sequence holds is NaN: unused rows, left padding, foreign pages.
"""
import pytest
import torch
from support.backends import AVAILABLE
from support.flash import HEAD_SLOPES, SINKS, Asked, drawn, ends, judge, normal, standard, visible

from tilewise import Rotary
from tilewise.compat import flash_attn as flash2
from tilewise.compat import flash_attn_interface as flash3

pytestmark = [pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs"),
              pytest.mark.usefixtures("one_thread", "poisoned", "small_tiles")]
H, H_KV, D, D_V = 4, 2, 8, 6
ROWS = 48
LAYOUTS = ("contiguous", "slots", "left padding", "pages of 1", "pages of 5", "pages of 16", "padded pages of 4",
           "padded pages of 5", "slots and pages of 3")
ROW_SLOPES = normal(3, H, seed=6)
TABLE = [
    Asked("plain"),
    Asked("scale", dict(scale=0.9), softmax_scale=0.9),
    Asked("causal", seen=dict(causal=True), causal=True, cpu=True),
    Asked("window", seen=dict(window=(5, 3)), window_size=(5, 3)),
    Asked("left", seen=dict(window=(7, None)), window_size=(7, -1)),
    Asked("window longer than the keys", seen=dict(window=(90, 45)), window_size=(90, 45)),
    Asked("softcap", dict(softcap=2.0), softcap=2.0),
    Asked("slopes", dict(slopes=HEAD_SLOPES[:H]), seen=dict(causal=True), alibi_slopes=HEAD_SLOPES[:H], causal=True),
    Asked("chunks", seen=dict(chunk=4, causal=True), attention_chunk=4, causal=True),
    Asked("everything", dict(scale=0.5, softcap=3.0, slopes=ROW_SLOPES, sink=SINKS[:H]), dropout_p=0.2, p=0.2, cpu=True,
          seen=dict(window=(30, 0)), softmax_scale=0.5, softcap=3.0, alibi_slopes=ROW_SLOPES, learnable_sink=SINKS[:H],
          causal=True, window_size=(30, 4)),
]


class Cache:
    """k and v in the caller's tensors, and what a call says of them; holds sequences of keys [n, H_kv, D] and values."""

    def __init__(self, layout, keys, values, dtype=torch.float32):
        batch = len(keys)
        padded = "padd" in layout
        self.padding = [3, 0, 10][:batch] if padded else [0] * batch
        self.where, names = {}, list(range(batch))
        if "slots" in layout:
            names = [5, 0, 3][:batch]
            self.where["cache_batch_idx"] = torch.tensor(names, dtype=torch.int32)
        if padded:
            self.where["cache_leftpad"] = torch.tensor(self.padding, dtype=torch.int32)
        if "pages" in layout:
            size = int(layout.rpartition(" of ")[2])
            each = -(-ROWS // size)
            table = torch.randperm(7 * each, generator=torch.Generator().manual_seed(0)).view(7, each)
            table = table[:6 if "slots" in layout else batch]
            self.where["block_table"] = table.int()
            shape, self.rows = (7 * each, size), [table[name].repeat_interleave(size) * size + torch.arange(size).repeat(each)
                                                  for name in names]
        else:
            shape = (6 if "slots" in layout else batch, ROWS)
            self.rows = [name * ROWS + torch.arange(ROWS) for name in names]
        self.k, self.v = (torch.full((*shape, H_KV, dim), torch.nan, dtype=dtype) for dim in (D, D_V))
        self.seqlens = torch.tensor([p + len(k) for p, k in zip(self.padding, keys, strict=True)], dtype=torch.int32)
        for memory, found in ((self.k, keys), (self.v, values)):
            for b, x in enumerate(found):
                memory.view(-1, H_KV, memory.shape[-1])[self.rows[b][self.padding[b]:self.seqlens[b]]] = x.to(dtype)

    def holds(self, b, n):
        """k and v of sequence b, n keys long, and whether all other rows of it are as they were."""
        own = self.rows[b][self.padding[b]:self.padding[b] + n]
        rest = torch.cat([self.rows[b][:self.padding[b]], self.rows[b][self.padding[b] + n:]])
        flat = [x.view(-1, H_KV, x.shape[-1]) for x in (self.k, self.v)]
        return flat[0][own], flat[1][own], all(x[rest].isnan().all() for x in flat)


def keys_of(lengths, dtype=torch.float32):
    return ([normal(n, H_KV, D, seed=10 + b).to(dtype) for b, n in enumerate(lengths)],
            [normal(n, H_KV, D_V, seed=20 + b).to(dtype) for b, n in enumerate(lengths)])


def assert_right(asked, found, queries, keys, values, empty=torch.inf):
    """found: (out [n, H, D_v], lse [H, n]) of each sequence."""
    def wanted(dtype):
        for b, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            means = dict(asked.means)
            if means.get("slopes") is not None and means["slopes"].dim() == 2:
                means["slopes"] = means["slopes"][b]
            t = round(asked.p * 65536)
            out, lse = standard(q.to(dtype), k.to(dtype), v.to(dtype), visible(len(q), len(k), **asked.seen), p=t / 65536,
                                keep=drawn(asked, b, len(q), len(k), H, len(k) - len(q)), **means)
            yield out, lse if "sink" in means else torch.where(lse == -torch.inf, empty, lse)
    dtype = queries[0].dtype
    for b, (own, truth, plain) in enumerate(zip(found, wanted(torch.float64), wanted(dtype), strict=True)):
        for name, x, t, p in zip(("out", "lse"), own, truth, plain, strict=True):
            judge(f"{name} {b}", x, t, p, eps=torch.finfo(torch.float32 if name == "lse" else dtype).eps)


def names3(where):
    """What the third generation calls the same."""
    return {{"block_table": "page_table"}.get(name, name): x for name, x in where.items()}


CALLS = [(asked, "contiguous", "tiled") for asked in TABLE]
CALLS += [(asked, layout, "tiled") for layout in LAYOUTS[1:] for asked in (TABLE[8], TABLE[-1])]
if "cpu" in AVAILABLE:
    CALLS += [(asked, layout, "cpu") for layout in ("slots", "padded pages of 4") for asked in TABLE if asked.cpu]


@pytest.mark.parametrize("asked, layout, backend", CALLS, ids=str)
def test_reading(asked, layout, backend):
    """Queries at the ends of what is stored; more queries than keys, and one key, among them."""
    keys, values = keys_of((31, 1, 9))
    cache, q = Cache(layout, keys, values), normal(3, 4, H, D, seed=30)
    seqlens = cache.seqlens.clone()
    torch.manual_seed(0)
    out, lse = flash2.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=seqlens, **cache.where, **asked.arguments,
                                              backend=backend, return_softmax_lse=True)
    assert_right(asked, zip(out, lse, strict=True), q, keys, values)
    assert torch.equal(seqlens, cache.seqlens)
    torch.manual_seed(0)
    third = flash3.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=seqlens, **names3(cache.where), **asked.arguments,
                                           backend=backend, return_softmax_lse=True)
    assert torch.equal(third[0], out)
    assert torch.equal(third[1].nan_to_num(posinf=0, neginf=0), lse.nan_to_num(posinf=0, neginf=0))
    assert [x.shape for x in third[2:]] == [(0,), (0,)]


def turned(x, positions, rotary):
    return rotary.rotate(x.transpose(0, 1), positions).transpose(0, 1)


@pytest.mark.parametrize("generation", [2, 3])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turning", ["none", "causal", "all at one position"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_appending(layout, turning, interleaved, generation):
    """New keys lie behind those present, in place; they and the queries stand at the rows of the cache, padding included."""
    keys, values = keys_of((30, 0, 9))
    cache = Cache(layout, keys, values)
    q, k, v = normal(3, 4, H, D, seed=30), normal(3, 4, H_KV, D, seed=31), normal(3, 4, H_KV, D_V, seed=32)
    asked = TABLE[2] if turning == "causal" else TABLE[0]
    rotary, more = None, {}
    if turning != "none":
        rotary = Rotary.of(6, 100, interleaved=interleaved)
        more = dict(rotary_cos=rotary.cos, rotary_sin=rotary.sin, rotary_interleaved=interleaved)
    where = cache.where if generation == 2 else names3(cache.where)
    call = (flash2 if generation == 2 else flash3).flash_attn_with_kvcache
    out, lse, *_ = call(q, cache.k, cache.v, k, v, cache_seqlens=cache.seqlens, **where, **more, **asked.arguments,
                        backend="tiled", return_softmax_lse=True)
    queries, grown = [], []
    for b, start in enumerate(cache.seqlens.tolist()):
        steps = torch.arange(4) + start
        new = k[b] if rotary is None else turned(k[b], steps, rotary)
        grown.append(torch.cat([keys[b], new]))
        queries.append(q[b] if rotary is None else turned(q[b], steps if asked.seen else steps * 0 + start, rotary))
        stored_k, stored_v, clean = cache.holds(b, len(grown[b]))
        torch.testing.assert_close(stored_k, grown[b], rtol=0, atol=1e-6)
        assert torch.equal(stored_v, torch.cat([values[b], v[b]]))
        assert clean
    assert_right(asked, zip(out, lse, strict=True), queries, grown, [torch.cat(x) for x in zip(values, v, strict=True)])


def test_lengths_as_a_number_or_none():
    keys, values = keys_of((ROWS, ROWS))
    cache, q = Cache("contiguous", keys, values), normal(2, 3, H, D, seed=30)
    for given, n in ((None, ROWS), (ROWS, ROWS), (7, 7)):
        out, lse = flash2.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=given, causal=True,
                                                  return_softmax_lse=True, backend="tiled")
        assert_right(TABLE[2], zip(out, lse, strict=True), q, [k[:n] for k in keys], [v[:n] for v in values])
    alone = flash2.flash_attn_with_kvcache(q[:1], cache.k, cache.v, cache_seqlens=7, causal=True, backend="tiled")
    torch.testing.assert_close(alone, out[:1])


def test_one_slot_read_by_several():
    keys, values = keys_of((31, 9))
    cache, q = Cache("contiguous", keys, values), normal(3, 2, H, D, seed=30)
    out, lse = flash2.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=torch.tensor([31, 8, 20], dtype=torch.int32),
                                              cache_batch_idx=torch.tensor([0, 1, 0], dtype=torch.int32),
                                              return_softmax_lse=True, backend="tiled")
    found = [keys[0], keys[1][:8], keys[0][:20]], [values[0], values[1][:8], values[0][:20]]
    assert_right(TABLE[0], zip(out, lse, strict=True), q, *found)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_splits(num_splits):
    keys, values = keys_of((31, 9))
    cache, q = Cache("contiguous", keys, values), normal(2, 1, H, D, seed=30)
    out, lse = flash2.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=cache.seqlens, num_splits=num_splits,
                                              return_softmax_lse=True, backend="tiled")
    assert_right(TABLE[0], zip(out, lse, strict=True), q, keys, values)


def test_without_gradient():
    """Programs call it with parameters that require one; flash-attn's has none to give."""
    keys, values = keys_of((31, 9))
    cache, q = Cache("contiguous", keys, values), normal(2, 1, H, D).requires_grad_()
    assert not flash2.flash_attn_with_kvcache(q * 2, cache.k, cache.v, cache_seqlens=cache.seqlens,
                                              backend="tiled").requires_grad


@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("asked", [TABLE[2], TABLE[-1]], ids=str)
def test_packed_queries_and_pages(asked, size):
    keys, values = keys_of((31, 1, 9))
    cache = Cache(f"pages of {size}", keys, values)
    queries = [normal(n, H, D, seed=40 + n) for n in (5, 1, 0)]
    found = []
    for show in (True, False):
        torch.manual_seed(0)
        found += [flash2.flash_attn_varlen_func(torch.cat(queries), cache.k, cache.v, ends([5, 1, 0]), ends([31, 1, 9]), 5, 31,
                                                **asked.arguments, return_attn_probs=show and not asked.p, **cache.where,
                                                backend="tiled")]
    torch.manual_seed(0)
    out, lse, *_ = flash3.flash_attn_with_kvcache(torch.cat(queries), cache.k, cache.v, cache_seqlens=cache.seqlens,
                                                  cu_seqlens_q=ends([5, 1, 0]), max_seqlen_q=5, **names3(cache.where),
                                                  **asked.arguments, return_softmax_lse=True, backend="tiled")
    assert torch.equal(found[1], out)
    if not asked.p:
        assert torch.equal(found[0][0], out)
        assert torch.equal(found[0][1], lse)
    assert_right(asked, zip(out.split([5, 1, 0]), lse.split([5, 1, 0], 1), strict=True), queries, keys, values)


def test_packed_new_keys():
    """Of the third generation: as many new keys of each sequence as there are, whatever the number of queries."""
    keys, values = keys_of((20, 0, 9))
    cache, counts = Cache("padded pages of 5", keys, values), [3, 4, 0]
    new = [normal(n, H_KV, D, seed=60 + n) for n in counts], [normal(n, H_KV, D_V, seed=70 + n) for n in counts]
    queries = [normal(2, H, D, seed=30 + b) for b in range(3)]
    starts = torch.tensor([7, 1, 50], dtype=torch.int32)
    rotary = Rotary.of(8, 100)
    out, lse, *_ = flash3.flash_attn_with_kvcache(
        torch.stack(queries), cache.k, cache.v, *map(torch.cat, new), rotary_cos=rotary.cos, rotary_sin=rotary.sin,
        cache_seqlens=cache.seqlens, cu_seqlens_k_new=ends(counts), rotary_seqlens=starts, rotary_interleaved=False,
        causal=True, return_softmax_lse=True, **names3(cache.where), backend="tiled")
    grown = [torch.cat([old, turned(x, torch.arange(len(x)) + start, rotary)])
             for old, x, start in zip(keys, new[0], starts.tolist(), strict=True)]
    queries = [turned(q, torch.arange(2) + start, rotary) for q, start in zip(queries, starts.tolist(), strict=True)]
    for b, k in enumerate(grown):
        torch.testing.assert_close(cache.holds(b, len(k))[0], k, rtol=0, atol=1e-6)
        assert cache.holds(b, len(k))[2]
    assert_right(TABLE[2], zip(out, lse, strict=True), queries, grown, [torch.cat(x) for x in zip(values, new[1], strict=True)],
                 empty=-torch.inf)


@pytest.mark.parametrize("form", ["values first", "keys first", "apart"])
@pytest.mark.parametrize("layout", ["contiguous", "padded pages of 5"])
def test_qv(layout, form):
    """Scores from two pairs of tensors, as in absorbed multi-head latent attention; k and v may be parts of one tensor."""
    keys, values = keys_of((20, 0, 9))
    cache = Cache(layout, keys, values)
    if form != "apart":
        order = ["v", "k"] if form == "values first" else ["k", "v"]
        parts = [getattr(cache, name) for name in order]
        for name, part in zip(order, torch.cat(parts, -1).split([x.shape[-1] for x in parts], -1), strict=True):
            setattr(cache, name, part)
    q, qv = normal(3, 2, H, D, seed=30), normal(3, 2, H, D_V, seed=31)
    k, v = normal(3, 2, H_KV, D, seed=32), normal(3, 2, H_KV, D_V, seed=33)
    out, lse, *_ = flash3.flash_attn_with_kvcache(q, cache.k, cache.v, k, v, qv, cache_seqlens=cache.seqlens, causal=True,
                                                  return_softmax_lse=True, backend="tiled", **names3(cache.where))
    grown, held = ([torch.cat(x) for x in zip(old, new, strict=True)] for old, new in ((keys, k), (values, v)))
    together = [torch.cat(x, -1) for x in zip(grown, held, strict=True)]
    assert_right(TABLE[2], zip(out, lse, strict=True), torch.cat([q, qv], -1), together, held, empty=-torch.inf)


@pytest.mark.parametrize("size", [0, 5])
def test_fp8(size):
    """Keys and values as they are stored, times the scales of each sequence and head; out in bf16."""
    keys, values = keys_of((20, 9), torch.float8_e4m3fn)
    cache = Cache(f"pages of {size}" if size else "contiguous", keys, values, torch.bfloat16)
    q = normal(2, 3, H, D, seed=30).to(torch.float8_e4m3fn)
    scales = [torch.rand(2, H_KV, generator=torch.Generator().manual_seed(s)) + 0.5 for s in range(3)]
    memory = [x.to(torch.float8_e4m3fn) for x in (cache.k, cache.v)]
    new = normal(2, 3, H_KV, D, seed=31).to(torch.float8_e4m3fn), normal(2, 3, H_KV, D_V, seed=32).to(torch.float8_e4m3fn)
    out, lse, *_ = flash3.flash_attn_with_kvcache(q, *memory, *new, cache_seqlens=cache.seqlens, causal=True, backend="tiled",
                                                  **dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True)),
                                                  **names3(cache.where), return_softmax_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    group = H // H_KV
    queries = [x.bfloat16().double() * scales[0][b].double().repeat_interleave(group)[:, None] for b, x in enumerate(q)]
    grown = [[torch.cat([old.double(), x.double()]) * scale[b].double()[:, None] for b, (old, x) in enumerate(
        zip(of, more, strict=True))] for of, more, scale in ((keys, new[0], scales[1]), (values, new[1], scales[2]))]
    for b in range(2):
        n = len(grown[0][b])
        seen = visible(3, n, causal=True)
        truth, truth_lse = standard(queries[b], grown[0][b], grown[1][b], seen)
        plain, plain_lse = standard(*(x.bfloat16() for x in (queries[b], grown[0][b], grown[1][b])), seen)
        judge("out", out[b], truth, plain, eps=torch.finfo(torch.bfloat16).eps)
        judge("lse", lse[b], truth_lse, plain_lse, eps=torch.finfo(torch.bfloat16).eps)
        assert torch.equal(memory[0].view(torch.uint8).view(-1, H_KV, D)[cache.rows[b][n - 3:n]],
                           new[0][b].view(torch.uint8))     # as they came, bit for bit


K8 = torch.zeros(2, 8, H_KV, D)
Q8, N8 = torch.zeros(2, 1, H, D), torch.zeros(2, 1, H_KV, D)
FULL, TABLE8 = torch.tensor([8, 8], dtype=torch.int32), torch.tensor([[0], [1]], dtype=torch.int32)
COS = torch.ones(8, 2)
TWO, THREE = flash2.flash_attn_with_kvcache, flash3.flash_attn_with_kvcache
REFUSED = [
    (lambda: TWO(Q8, K8, K8.clone(), N8, N8), ValueError, "cache_seqlens: expected the lengths"),
    (lambda: TWO(Q8, K8, K8.clone(), N8, N8, cache_seqlens=8), ValueError, "k_new: expected at most 0 tokens for sequence 0"),
    (lambda: TWO(Q8, K8, K8.clone(), N8, cache_seqlens=3), ValueError, "v: expected new keys k and new values v together"),
    (lambda: TWO(Q8, K8, K8.clone(), None, N8, cache_seqlens=3), ValueError, "k: expected new keys k and new"),
    (lambda: TWO(Q8, K8, K8.clone(), rotary_cos=COS, rotary_sin=COS), ValueError, "rotary_cos: expected None without new keys"),
    (lambda: TWO(Q8, K8, K8.clone(), N8, N8, COS, None, 3), ValueError, "rotary_cos, rotary_sin: expected both or none"),
    (lambda: TWO(Q8, K8, K8.clone(), N8, N8, COS[:7], COS[:7], 3), ValueError, "positions for all 8 rows of the cache, got 7"),
    (lambda: TWO(Q8, K8, K8.clone(), cache_seqlens=9), ValueError, "lengths: expected values from 0 to 8, got 9"),
    (lambda: TWO(Q8, K8, K8.clone(), cache_seqlens=FULL[:1]), ValueError, r"cache_seqlens: expected \[2\], got \[1\]"),
    (lambda: TWO(Q8, K8, K8.clone(), cache_seqlens=FULL.float()), TypeError, "cache_seqlens: expected int32 or int64"),
    (lambda: TWO(Q8, K8[:1], K8[:1].clone()), ValueError, "k_cache: expected at least q's 2 sequences, got 1"),
    (lambda: TWO(Q8, K8, K8.clone(), cache_batch_idx=FULL), ValueError, "slots: expected values from 0 to 1, got 8"),
    (lambda: TWO(Q8, K8, K8.clone(), N8, N8, cache_seqlens=3, cache_batch_idx=FULL * 0), ValueError, "slots: expected each"),
    (lambda: TWO(Q8, K8, K8.clone(), cache_leftpad=FULL + 1), ValueError, "left_padding: expected values from 0 to 8, got 9"),
    (lambda: TWO(Q8, K8, K8.clone(), block_table=TABLE8[:1]), ValueError, "block_table: expected a row for each of q's 2"),
    (lambda: TWO(Q8, K8, K8.clone(), block_table=TABLE8 + 1), ValueError, "block_table: expected pages from 0 to 1"),
    (lambda: TWO(Q8, K8, K8.clone(), num_splits=-1), ValueError, "num_splits: expected a number from 1 to 256"),
    (lambda: TWO(Q8.half(), K8, K8.clone()), TypeError, "q: expected the cache's dtype torch.float32"),
    (lambda: TWO(Q8, K8.mT.contiguous().mT, K8), ValueError, "k: expected a contiguous last dimension"),
    (lambda: TWO(Q8, K8.transpose(1, 2).contiguous().transpose(1, 2), K8, block_table=TABLE8, cache_leftpad=FULL * 0 + 3),
     ValueError, "k: expected pages whose rows follow each other in memory"),
    (lambda: THREE(Q8, K8, K8.clone(), rotary_seqlens=FULL), ValueError, "rotary_seqlens: expected None without rotary_cos"),
    (lambda: THREE(Q8, K8, K8.clone(), q_descale=COS), ValueError, "q_descale: expected None: only float8_e4m3fn tensors"),
    (lambda: THREE(Q8, K8, K8.clone(), qv=Q8[..., :3]), ValueError, r"qv: expected \[2, 1, 4, 8\], got \[2, 1, 4, 3\]"),
    (lambda: THREE(Q8, K8, K8.clone(), sm_margin=-1), ValueError, "sm_margin: expected a number of multiprocessors"),
    (lambda: THREE(Q8, K8, K8.clone(), pack_gqa=3), TypeError, "pack_gqa: expected None, True or False"),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
