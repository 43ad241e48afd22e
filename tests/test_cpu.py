"""The `cpu` backend's own seams: threads and processes, few queries and many, borders of blocks, tables of any strides."""
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.backends import AVAILABLE

import tilewise as tw
from tilewise.backends import cpu
from tilewise.backends.cpu import sizes
from tilewise.bench import tolerance
from tilewise.bench.cases import Call, Case, bucketed, draw
from tilewise.problem import make

pytestmark = [pytest.mark.usefixtures("threads"), pytest.mark.skipif(
    "cpu" not in AVAILABLE or not cpu.compiler.compiler(), reason="needs a C++ compiler")]

FP8 = torch.float8_e4m3fn
CAUSAL = dict(causal=True)


def assert_right(case):
    wrong = [verdict for verdict in tolerance.check(draw(case, torch.float32), "cpu") if not verdict.ok]
    assert not wrong, "\n".join(map(str, wrong))


def assert_same_bits(found, expected):
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def run(case):
    return tolerance.run(draw(case, torch.float32), "cpu").tensors


# ---- threads and processes -----------------------------------------------------------------------------------------------

LONG = dict(seqlen_q=70, seqlen_k=600, heads=2, kv_heads=1)               # backward, several jobs have keys of one key head
THREADED = (
    Case("few heads", **LONG | dict(batch=1), options=lambda m: CAUSAL),
    Case("bias over batch", **LONG, options=lambda m: CAUSAL | dict(bias=m.normal(2, 70, 600))),
    Case("bias over heads", **LONG | dict(heads=4, kv_heads=2), options=lambda m: CAUSAL | dict(bias=m.normal(2, 1, 70, 600))),
    Case("bias of queries", **LONG, options=lambda m: CAUSAL | dict(bias=m.normal(2, 2, 70, 1))),
    Case("table of any index", **LONG, options=lambda m: dict(
        table=m.normal(70, 5), score_mod=bucketed(m.integers(0, 4, 600), True))),
    Case("table of distances", **LONG, options=lambda m: dict(
        table=m.normal(2, 669), score_mod=lambda t: lambda s, b, h, q, k: s + t[h, q - k + 599], causal=True)),
)


def test_forward_has_the_same_bits_with_any_number_of_threads(threads):
    call = draw(Case("blocks of several heads", seqlen_q=130, seqlen_k=250, heads=6, kv_heads=2, options=lambda m: CAUSAL),
                torch.float32)
    found = []
    for count in (1, 2, 3):
        threads(count)
        assert cpu.splits(call.described()[0]) == 1
        found.append(dict(zip(("out", "lse"), call.run(call.differentiable, "cpu"), strict=True)))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("case", THREADED, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_right_and_repeatable_with_threads(count, case, threads):
    threads(count)
    assert sizes.backward(draw(case, torch.float32).described()[0], False, False)["parts"] > (count > 1)
    assert_right(case)
    assert_same_bits(run(case), run(case))


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_gradients_are_right_where_queries_come_in_several_passes(case, threads, monkeypatch):
    monkeypatch.setattr(sizes, "DQ_COPIES", 0)
    threads(3)
    assert_right(case)


def test_memory_hardly_grows_with_threads(monkeypatch):
    """As of dQ, of which every job has its own."""
    q, k = torch.empty(1, 8192, 32, 128, device="meta"), torch.empty(1, 8192, 8, 128, device="meta")
    problem = make(q, k, k)[0]
    gradients = 4 * (q.numel() + 2 * k.numel())
    monkeypatch.setattr(sizes.threads, "count", lambda: 64)
    assert sizes.workspace(problem)[1] < 2.5 * gradients


def test_calls_from_several_python_threads_do_not_disturb_each_other(threads):
    threads(2)
    expected = [run(case) for case in THREADED]
    with ThreadPoolExecutor(3) as pool:
        for found, whole in zip(pool.map(run, 2 * THREADED), 2 * expected, strict=True):
            assert_same_bits(found, whole)


FORK = """
import multiprocessing, sys, torch, tilewise as tw
torch.set_num_threads(2)
q = torch.randn(2, 200, 4, 16)
torch.randn(2000, 1000).exp()                          # starts the threads, which a child does not have
if sys.argv[1] == "used before":
    tw.attention(q, q, q, backend="cpu")
context = multiprocessing.get_context("fork")
mine, other = context.Pipe()
child = context.Process(target=lambda: other.send(tw.attention(q, q, q, backend="cpu").tolist()), daemon=True)
child.start()
assert mine.poll(15), "the child hangs"
torch.testing.assert_close(torch.tensor(mine.recv()), tw.attention(q, q, q, backend="reference"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not forked")
@pytest.mark.parametrize("when", ["used before", "first used by the child"])
def test_a_forked_child_computes_without_the_threads_of_its_parent(when):
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, when], check=True, timeout=60)


def test_a_process_whose_threads_the_environment_limits():
    code = "from tilewise.bench import cases, tolerance\nimport torch\n" \
           "assert all(v.ok for v in tolerance.check(cases.draw(cases.CASES[0], torch.float32), 'cpu'))"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


# ---- few queries, which read keys where they lie ---------------------------------------------------------------------------

LENGTHS = 70, 1, 300


def assert_cache_right(dtype, stored, *, queries=1, heads=4, kv_heads=2, dim=40, dim_v=None, paged=False, splits=None,
                       options=lambda own: {}):
    """Attention with a cache of three sequences, all else NaN, against fp64; options: of the sequences `own`."""
    generator = torch.Generator().manual_seed(0)
    scales = {name: torch.tensor([0.5, 2.0, 0.25])[:kv_heads] for name in ("k_scale", "v_scale") if stored == FP8}
    shape = dict(kv_heads=kv_heads, head_dim=dim, head_dim_v=dim_v, dtype=stored, **scales)
    if paged:
        cache = tw.PagedKVCache(38, 10, max_sequences=3, **shape)          # it ends with the last key, as the other one does
        where = dict(sequences=[cache.new() for _ in LENGTHS])
    else:
        cache, where = tw.KVCache(3, 300, **shape), {}
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    q, k, v = (torch.randn(n, h, d, generator=generator).to(dtype) for n, h, d in (
        (3 * queries, heads, dim), (sum(LENGTHS), kv_heads, dim), (sum(LENGTHS), kv_heads, dim_v or dim)))
    cache.append(k, v, cu_seqlens=torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32), **where)
    q = q.view(3, queries, heads, dim)
    out, lse = tw.attention_with_kv_cache(q, cache, cache_batch_idx=where.get("sequences"), return_lse=True, backend="cpu",
                                          num_splits=splits, **options(slice(None)))
    for b, (k_b, v_b) in enumerate(zip(k.split(LENGTHS), v.split(LENGTHS), strict=True)):
        for x, scale in zip((k_b, v_b), scales.values(), strict=False):
            x.copy_((x.float() / scale[:, None]).to(FP8).float() * scale[:, None])       # as it is stored
        call = Call(Case("cache"), q[b:b + 1], k_b[None], v_b[None], options(slice(b, b + 1)))
        truth, standard = (call.run({name: x.to(to) for name, x in call.differentiable.items()}, "reference")
                           for to in (torch.float64, dtype))
        verdicts = tolerance.judge(call, *(tolerance.Results(dict(zip(("out", "lse"), x, strict=True)))
                                           for x in ((out[b:b + 1], lse[b:b + 1]), truth, standard)))
        assert all(verdict.ok for verdict in verdicts), (b, verdicts)


STORED = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
          (torch.float32, FP8), (torch.bfloat16, FP8)]


@pytest.mark.parametrize("dtype, stored", STORED, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("dim", [1, 40, 128, 512])
def test_few_queries(dim, dtype, stored):
    for queries, heads, kv_heads in ((1, 2, 2), (1, 8, 2), (3, 5, 1), (16, 1, 1), (17, 1, 1), (1, 34, 2)):  # from 17 on many
        assert_cache_right(dtype, stored, queries=queries, heads=heads, kv_heads=kv_heads, dim=dim, paged=queries == 3)
    assert_cache_right(dtype, stored, dim=dim, dim_v=21)


@pytest.fixture
def flushing():
    """fp32 numbers below the smallest normal one become 0."""
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype, numbers", [(torch.float16, torch.int16), (FP8, torch.uint8)])
def test_every_stored_number_is_read_exactly(dtype, numbers, queries, flushing):
    """Also those that are normal in fp32 but not in their own dtype."""
    bits = torch.iinfo(numbers)
    stored = torch.arange(bits.min, bits.max + 1).to(numbers).view(dtype).view(-1, 1, 1, 256)
    values, lengths = stored.to(torch.float16), torch.ones(len(stored), dtype=torch.int32)
    q = torch.zeros_like(values).expand(-1, queries, -1, -1)
    found = tw.attention_with_kv_cache(q, tw.KVCache.wrap(torch.zeros_like(stored), stored, lengths), backend="cpu")
    torch.testing.assert_close(found, values.expand(-1, queries, -1, -1), rtol=0, atol=0, equal_nan=True)


WHOLE, FIRST, LAST = map(torch.tensor, (LENGTHS, [1, 0, 70], [66, 1, 200]))


@pytest.mark.parametrize("left, first, last", [(3, 0 * FIRST, LAST), (30, FIRST, WHOLE), (0, FIRST, 0 * LAST)],
                         ids=["window and lengths", "window and first keys", "nothing"])
def test_few_queries_whose_mask_hides_whole_panels(left, first, last):
    def options(own):
        mask = (tw.window(left, None) | tw.prefix(first[own])) & tw.key_lengths(last[own])
        return dict(causal=True, mask=mask, sinks=torch.tensor([1.0, -2, 0, 3]))

    for queries, splits in itertools.product((1, 4, 20), (None, 3)):
        assert_cache_right(torch.float32, torch.float32, queries=queries, splits=splits, options=options)


@pytest.mark.parametrize("splits", [1, 2, 3, 64, 256])
def test_shares_of_the_keys_as_many_as_asked_for(splits, threads):
    threads(3)
    for queries in (1, 20):
        assert_cache_right(torch.float32, torch.float32, queries=queries, splits=splits)


# ---- batch_invariant -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, gap", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
                         ids=["causal", "causal bf16", "first keys and window"])
def test_rows_of_a_batch_invariant_call_depend_on_nothing_beside_them(dtype, gap, threads):
    def attend(q, k, v):
        mask = tw.window(90, None) | tw.prefix(torch.full((len(q),), 5)) if gap else None
        options = dict(causal=True, mask=mask, batch_invariant=True, backend="cpu")
        return tw.attention(q, k, v, **options) if v is not None else tw.attention_with_kv_cache(q, k, **options)

    for heads, kv_heads in ((2, 2), (6, 2)):
        q, k, v = draw(Case("rows", 2, 450, 450, heads, kv_heads, head_dim=24), dtype).differentiable.values()
        whole = attend(q, k, v)
        assert torch.equal(attend(q[1:], k[1:], v[1:]), whole[1:])
        for end, count in itertools.product((6, 64, 65, 231, 385, 450), (1, 3, 50)):     # token by token, and some at once
            first = max(0, end - count)
            assert torch.equal(attend(q[:, first:end], k[:, :end], v[:, :end]), whole[:, first:end]), (first, end)
        cache = tw.KVCache(2, 460, kv_heads, 24, dtype=dtype)
        cache.append(k, v)
        threads(3)
        assert torch.equal(attend(q[:, -2:], cache, None), whole[:, -2:])


# ---- borders, and tables of any strides ------------------------------------------------------------------------------------

BORDERS = [*range(1, 18), 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 200]
GROUPS = len(BORDERS) * [(1, 1), (3, 1), (10, 2), (50, 1)]             # the last: more heads than a block has rows


@pytest.mark.parametrize("n, heads", [*zip(BORDERS, GROUPS, strict=False)], ids=str)
def test_lengths_around_the_borders_of_blocks(n, heads):
    shape = dict(batch=1, seqlen_q=n, heads=heads[0], kv_heads=heads[1], head_dim=24, head_dim_v=40)
    assert_right(Case("square", **shape, seqlen_k=n, options=lambda m: CAUSAL))
    assert_right(Case("wide", **shape, seqlen_k=130))
    assert_right(Case("tall", **shape | dict(seqlen_q=130), seqlen_k=n, options=lambda m: CAUSAL))


def test_gradients_that_sum_over_many_rows_keep_their_precision():
    assert_right(Case("many rows", 1, 512, 512, heads=32, kv_heads=1, head_dim=64, options=lambda m: CAUSAL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("dim", [17, 64, 129])
def test_one_key_has_all_weight_whatever_q_and_k(dim, dtype):
    """Also where other keys are there, whose probabilities round to 0."""
    for queries, keys in ((1, 1), (40, 1), (20, 70)):
        q, k, v = draw(Case("one key", seqlen_q=queries, seqlen_k=keys, head_dim=dim), dtype).differentiable.values()
        k = k * 0
        k[:, 0] = 400
        q = q.abs() + 1
        out = tw.attention(q.requires_grad_(), k.requires_grad_(), v, backend="cpu")
        assert torch.equal(out, v[:, :1].repeat_interleave(q.shape[2] // v.shape[2], 2).expand_as(out))
        dq, dk = torch.autograd.grad(out, (q, k), torch.randn_like(out))
        assert dq.count_nonzero() == dk.count_nonzero() == 0


@pytest.mark.parametrize("n", [1, 17, 63, 64, 65, 127, 128, 129])
def test_lengths_around_the_borders_of_listed_blocks(n):
    assert_right(Case("function", seqlen_q=n, seqlen_k=130, heads=4, kv_heads=2,
                      options=lambda m: dict(mask=lambda b, h, q, k: (q - k).abs() % 5 != h)))


def test_whole_divisions_of_any_numbers():
    """Quotients and remainders as of Python's integers, up to the largest of 32 bits: masks hide nothing."""
    ends = [sign * x for x in (1, 2, 3, 7, 46341, 2**30, 2**31 - 3, 2**31 - 2) for sign in (-1, 1)]
    pairs = [(a, b) for a in (0, *ends) for b in ends]
    results = [(a, b, a // b, a % b) for a, b in pairs]
    a, b, quotient, rest = (torch.tensor(x, dtype=torch.int32) for x in zip(*results, strict=True))
    q, k, v = draw(Case("divisions", 1, 20, len(pairs), 2, 2, head_dim=8), torch.float32).differentiable.values()
    for mask in (lambda n, h, i, j: a[j] // b[j] == quotient[j], lambda n, h, i, j: a[j] % b[j] == rest[j]):
        assert torch.equal(tw.attention(q, k, v, mask=mask, backend="cpu"), tw.attention(q, k, v, backend="cpu"))


def read_by(of_keys, view):
    """Score functions that read a view of the table."""
    return dict(score_mod=lambda t: bucketed(torch.arange(70) * 3 % 5, of_keys)(view(t)))


TABLES = {
    "any index, strided": lambda m: dict(table=m.normal(140, 10), **read_by(True, lambda t: t[::2, ::2])),
    "any index, transposed": lambda m: dict(table=m.normal(5, 70), **read_by(True, lambda t: t.T)),
    "any index, expanded": lambda m: dict(table=m.normal(1, 5), **read_by(True, lambda t: t.expand(70, 5))),
    "any index, overlapping": lambda m: dict(table=m.normal(74), **read_by(True, lambda t: t.unfold(0, 5, 1))),
    "any index, a leaf expanded": lambda m: dict(table=m.normal(1, 5).expand(70, 5), **read_by(True, lambda t: t)),
    "queries, strided": lambda m: dict(table=m.normal(15), **read_by(False, lambda t: t[::3])),
    "queries, expanded": lambda m: dict(table=m.normal(1), **read_by(False, lambda t: t.expand(5))),
    "distances, expanded": lambda m: dict(
        table=m.normal(1, 139), score_mod=lambda t: lambda s, b, h, q, k: s + t.expand(2, 139)[h, q - k + 69], causal=True),
}


@pytest.mark.parametrize("name", TABLES)
def test_gradients_of_tables_of_any_strides(name):
    assert_right(Case(name, options=TABLES[name]))
