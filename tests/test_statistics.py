"""max_score, entropy and key_mass on every backend, against their dense definition in fp64 by the tolerance rule."""
import functools
import importlib.util

import pytest
import torch
from support.backends import AVAILABLE, DEVICE, INTERPRETING

import tilewise as tw
from tilewise import backends
from tilewise.bench import tolerance
from tilewise.bench.cases import draw, named, rows_in_use

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned", "small_tiles")

NAMES = ("max_score", "entropy", "key_mass")


# one for each path through a kernel, with few programs, since each compiles kernels of its own
PATHS = ("causal more queries", "sinks rows without keys", "dropout", "grouped heads", "scale negative", "scores of 100",
         "head dim 40", "one query", "no keys", "no queries", "batch invariant", "function of heads", "everything",
         "packed everything", "packed batch invariant", "packed function")
TABLE = [(named(name), torch.float32) for name in PATHS]
TABLE += [(named(name), torch.bfloat16) for name in ("grouped heads", "everything", "packed everything", "one query")]
TABLE += [(named(name), torch.float16) for name in ("scores of 100", "grouped heads")]

every_backend = pytest.mark.parametrize("backend", AVAILABLE)


def of_caches(backend):
    """What a backend computes over keys from a cache, or batch-invariant."""
    return ("max_score", "key_mass") if backend == "triton" else NAMES


def computed(call, backend, names=NAMES, dtype=None):
    """(out, lse, statistics) of a call, on copies of its floating inputs in `dtype`."""
    copies = {name: x.to(dtype or x.dtype) for name, x in call.differentiable.items()}
    qkv, options = [copies[name] for name in "qkv"], call.arguments(copies) | dict(return_lse=True, return_stats=names)
    if call.case.packed is not None:
        return tw.attention_varlen(*qkv, **options, backend=backend)
    return tw.attention(*qkv, **options, layout=call.case.layout, backend=backend)


def results(call, backend, names, dtype=None):
    found = computed(call, backend, names, dtype)[2]._asdict()
    return tolerance.Results({name: found[name] for name in names})


@every_backend
@pytest.mark.parametrize("case, dtype", TABLE, ids=lambda x: str(x).removeprefix("torch."))
def test_within_tolerance(case, dtype, backend):
    call = draw(case, dtype, DEVICE)
    if not call.supported(backend):
        with pytest.raises(NotImplementedError, match="cannot compute this"):
            computed(call, backend)
        return
    names = of_caches(backend) if call.options.get("batch_invariant") else NAMES
    found = tolerance.judge(call, results(call, backend, names), results(call, "reference", names, torch.float64),
                            results(call, "reference", names))
    assert [verdict.name for verdict in found] == list(names)
    assert all(verdict.ok for verdict in found), "\n".join(map(str, found))


@pytest.mark.skipif("tiled" not in AVAILABLE, reason="in the interpreter's process only Triton runs")
@pytest.mark.parametrize("name", PATHS)
def test_tiled_in_fp64(name):
    call = draw(named(name), torch.float64, DEVICE)
    if not call.supported("tiled"):
        return
    truth, found = (computed(call, backend)[2] for backend in ("reference", "tiled"))
    for x, expected in zip(found, truth, strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11)


@every_backend
@pytest.mark.parametrize("name", ["packed used dropout bias", "packed no sequences in use"])
def test_rows_of_no_sequence(name, backend):
    call = draw(named(name), torch.float32, DEVICE)
    found = computed(call, backend)[2]
    rows, keys = (~rows_in_use(call.case, side) for side in (0, 1))
    assert (found.max_score[:, rows] == -torch.inf).all()
    assert (found.entropy[:, rows] == 0).all()
    assert (found.key_mass[:, keys] == 0).all()


@every_backend
@pytest.mark.parametrize("names", [NAMES, ("entropy",), ("key_mass", "max_score")], ids=" ".join)
def test_nothing_else_changes(names, backend):
    """The same bits of out, lse and gradients; what nobody asked for is None."""
    call = draw(named("sinks"), torch.float32, DEVICE)
    leaves = {name: x.requires_grad_() for name, x in call.differentiable.items()}
    out, lse, found = computed(call, backend, names)
    plain = call.run(leaves, backend)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[1])
    for a, b in zip(*(torch.autograd.grad(x.square().sum() + y.sum(), list(leaves.values())) for x, y in ((out, lse), plain)),
                    strict=True):
        assert torch.equal(a, b)
    assert [name for name, x in found._asdict().items() if x is not None] == [name for name in NAMES if name in names]
    assert not any(x.requires_grad for x in found if x is not None)


def test_names_may_be_a_list():
    """Which has no hash, so that a call is not known by it."""
    q = torch.randn(1, 9, 2, 16, device=DEVICE)
    for _ in range(2):
        found = tw.attention(q, q, q, return_stats=["entropy"])[1]
        assert torch.equal(found.entropy, tw.attention(q, q, q, return_stats=("entropy",))[1].entropy)


@every_backend
def test_a_sink_is_no_key(backend):
    """It takes mass from keys, and changes neither the largest score nor how a row's mass is shared among keys."""
    call = draw(named("sinks"), torch.float32, DEVICE)
    alone = call.options.pop("sinks")
    options = dict(causal=True, return_lse=True, return_stats=NAMES, backend=backend)
    _, lse, bare = tw.attention(call.q, call.k, call.v, **options)
    _, with_sink, found = tw.attention(call.q, call.k, call.v, sinks=alone + 30, **options)
    torch.testing.assert_close(found.max_score, bare.max_score)
    torch.testing.assert_close(found.entropy, bare.entropy)
    torch.testing.assert_close(found.key_mass.sum(-1), torch.exp(lse - with_sink).sum(-1))
    torch.testing.assert_close(bare.key_mass.sum(-1), torch.full_like(bare.key_mass[..., 0], call.case.seqlen_q))


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "reference"])
@pytest.mark.parametrize("largest", [0.0, 3e4])
def test_entropy_of_known_distributions(largest, backend):
    """Of n equal scores log n, however large they are (standard attention, which goes by lse, errs by 1e-3 for the large ones);
    of one score far above the others 0."""
    n = 70
    k = torch.zeros(1, n, 1, 16, device=DEVICE)
    k[..., 0] = largest
    q = torch.ones(1, 2, 1, 16, device=DEVICE)
    found = tw.attention(q, k, k, scale=1.0, causal=True, return_stats=NAMES, backend=backend)[1]
    torch.testing.assert_close(found.entropy[0, 0].cpu(), torch.tensor([n - 1.0, n]).log(), rtol=1e-6, atol=0)
    assert (found.max_score == largest).all()
    k[:, 3, :, 0] += 200
    found = tw.attention(q, k, k, scale=1.0, causal=True, return_stats=NAMES, backend=backend)[1]
    assert found.entropy.abs().max() < 1e-6
    assert (found.max_score == largest + 200).all()
    assert (found.key_mass[0, 0] - 2 * torch.eye(n, device=DEVICE)[3]).abs().max() < 1e-6


# ---- caches ---------------------------------------------------------------------------------------------------------

LENGTHS = (70, 1, 33)


def cache_of(layout, dtype=torch.float32, kv_heads=2, dim=16, **options):
    """A cache of LENGTHS, NaN behind them, and the keys that it holds of each sequence."""
    shape = dict(kv_heads=kv_heads, head_dim=dim, dtype=dtype, device=DEVICE, **options)
    if layout == "pages":
        cache = tw.PagedKVCache(40, 8, max_sequences=3, **shape)
        which = [cache.new() for _ in LENGTHS]
    else:
        padding = torch.tensor([3, 0, 5], dtype=torch.int32, device=DEVICE)
        cache, which = tw.KVCache(3, 80, left_padding=padding, **shape), torch.arange(3, device=DEVICE)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    generator = torch.Generator().manual_seed(0)
    stored = torch.float32 if dtype.itemsize == 1 else dtype
    k, v = (torch.randn(sum(LENGTHS), kv_heads, dim, generator=generator).to(DEVICE, stored) for _ in range(2))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(DEVICE, torch.int32)
    v_new = None if options.get("v_in_k") else v[..., :cache.v.shape[-1]]
    cache.append(k, v_new, cu_seqlens=ends, check=True,
                 **{"sequences" if layout == "pages" else "cache_batch_idx": which})
    return cache, which, k.to(dtype).to(stored).split(LENGTHS)


@every_backend
@pytest.mark.parametrize("queries, splits", [(1, None), (1, 3), (5, None)], ids=["decode", "three shares", "prefill"])
@pytest.mark.parametrize("layout", ["left padding", "pages"])
@pytest.mark.parametrize("mask", [None, "function"])
def test_of_a_cache(queries, splits, layout, mask, backend):
    """The statistics of each sequence's last queries, as of attention to its keys alone."""
    cache, which, keys = cache_of(layout)
    q = torch.randn(3, queries, 4, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options = {None: dict(causal=True), "function": dict(mask=lambda b, h, i, j: (i >= j) & ((i - j) % 3 == h % 2))}[mask]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)
    given = options | dict(sinks=sinks, num_splits=splits if mask != "function" else None)
    given |= dict(return_stats=of_caches(backend), backend=backend)
    found = tw.attention_with_kv_cache(q, cache, cache_batch_idx=which, **given)[1]
    assert found.key_mass.shape[:2] == (3, 4)
    assert found.key_mass.shape[2] >= max(LENGTHS)
    for b, k in enumerate(keys):
        rows = torch.cat([q.new_zeros(max(0, len(k) - queries), 4, 16), q[b]])[None].double()   # functions count positions
        if len(k) < queries:
            continue
        whole = tw.attention(rows, k[None].double(), k[None].double(), **options, sinks=sinks.double(), return_stats=NAMES,
                             backend="reference")[1]
        torch.testing.assert_close(found.max_score[b], whole.max_score[0, :, -queries:].float(), rtol=1e-5, atol=1e-5)
        if found.entropy is not None:
            torch.testing.assert_close(found.entropy[b], whole.entropy[0, :, -queries:].float(), rtol=1e-5, atol=1e-5)
        before = tw.attention(rows[:, :-queries], k[None, :-queries].double(), k[None, :-queries].double(), **options,
                              sinks=sinks.double(), return_stats=NAMES, backend="reference")[1].key_mass
        mass = whole.key_mass[0].clone()
        mass[:, :len(k) - queries] -= before[0]
        torch.testing.assert_close(found.key_mass[b, :, :len(k)], mass.float(), rtol=1e-4, atol=1e-5)
        assert (found.key_mass[b, :, len(k):] == 0).all()


@every_backend
@pytest.mark.parametrize("layout", ["left padding", "pages"])
def test_of_packed_queries_and_keys_in_fp8(layout, backend):
    """Rows are packed, keys stay those of each sequence; the mass of all keys is the number of queries."""
    scale = torch.tensor([2.0, 0.5], device=DEVICE)
    cache, which, _ = cache_of(layout, torch.float8_e4m3fn, k_scale=scale, v_scale=scale)
    counts = torch.tensor([2, 0, 7])
    q = torch.randn(9, 4, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(DEVICE, torch.int32)
    given = dict(cache_batch_idx=which, cu_seqlens_q=ends, causal=True, return_stats=of_caches(backend))
    found = tw.attention_with_kv_cache(q, cache, **given, backend=backend)[1]
    expected = tw.attention_with_kv_cache(q.double().float(), cache, **given,
                                          backend="triton" if INTERPRETING else "reference")[1]
    assert found.max_score.shape == (4, 9)
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.key_mass.sum(-1), counts[:, None].expand(3, 4).float().to(DEVICE))


@every_backend
def test_of_values_inside_keys(backend):
    cache, which, keys = cache_of("pages", kv_heads=1, dim=48, head_dim_v=32, v_in_k=True)
    q = torch.randn(3, 1, 4, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = tw.attention_with_kv_cache(q, cache, cache_batch_idx=which, return_stats=of_caches(backend), backend=backend)[1]
    for b, k in enumerate(keys):
        p = torch.softmax(q[b, 0].double() @ k[:, 0].double().T * 48 ** -0.5, -1)
        torch.testing.assert_close(found.key_mass[b, :, :len(k)], p.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETING, reason="of the Triton backend")
def test_triton_refuses_the_entropy_over_a_cache():
    cache, which, _ = cache_of("pages")
    q = torch.randn(3, 1, 4, 16).to(DEVICE)
    with pytest.raises(NotImplementedError, match="entropy of rows over keys from a cache"):
        tw.attention_with_kv_cache(q, cache, cache_batch_idx=which, return_stats=NAMES, backend="triton")


# ---- how it is called -----------------------------------------------------------------------------------------------

@every_backend
def test_inside_compile_and_vmap(backend):
    q = torch.randn(2, 20, 2, 16, device=DEVICE, requires_grad=True)

    def loss(q):
        out, found = tw.attention(q, q, q, causal=True, return_stats=("key_mass", "max_score"), backend=backend)
        return out.square().sum(), found

    (expected, eager), (value, compiled) = loss(q), torch.compile(loss, fullgraph=True, backend="aot_eager")(q)
    torch.testing.assert_close(*(torch.autograd.grad(x, q)[0] for x in (value, expected)))
    assert compiled.entropy is None
    assert not compiled.key_mass.requires_grad
    for a, b in ((compiled.max_score, eager.max_score), (compiled.key_mass, eager.key_mass)):
        torch.testing.assert_close(a, b)
    mapped = torch.func.vmap(lambda x: loss(x[None])[1].key_mass)(q.detach())
    torch.testing.assert_close(mapped[:, 0], eager.key_mass)


@pytest.mark.parametrize("names, error, message", [
    (("entropy", "max"), ValueError, r"return_stats: expected names among \"max_score\".*, got 'max'"),
    ("entropy", TypeError, r"return_stats: expected a tuple of names among .*, got 'entropy'"),
    (True, TypeError, "return_stats: expected a tuple")])
def test_bad_names(names, error, message):
    q = torch.zeros(1, 4, 1, 16, device=DEVICE)
    with pytest.raises(error, match=message):
        tw.attention(q, q, q, return_stats=names)


def test_hopper_does_not_compute_them():
    call = draw(named("full"), torch.bfloat16)
    q = call.q.contiguous()
    problem, _ = tw.api.make(q, q, q, return_stats=("max_score",))
    assert backends.load("hopper").unsupported(problem) == "statistics of rows and keys"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_ships_them_wherever_it_ships_attention():
    from tilewise.backends.triton import aot, configs
    for arch in configs.ARCHITECTURES:
        for width in configs.WIDTHS:
            for head_dim in configs.HEAD_DIMS[:-1]:
                for features in ("plain", "rich"):
                    for variant in ("packed", "prefill pages"):
                        example = functools.partial(aot.example, width, head_dim, features)
                        if configs.missing(example(variant)[0], arch) is None:
                            assert configs.missing(example(f"statistics {variant}")[0], arch) is None
