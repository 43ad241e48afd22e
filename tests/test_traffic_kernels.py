"""The library's Triton kernels, counted in the interpreter, do what the closed forms say: bytes of each tensor, products,
exponentials. Run with TRITON_INTERPRET=1."""

# ruff: noqa: E402 - without Triton in interpreter mode the rest cannot be imported
import math
import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 for the whole process", allow_module_level=True)

import torch
import triton.language as tl

import tilewise as tw
from tilewise.api import _of_cache, _of_packed
from tilewise.backends.triton import workspace
from tilewise.costs import STATISTIC, Blocks, Sizes, dense_walk, flash2_backward, flash2_forward
from tilewise.packing import cu_seqlens
from tilewise.problem import make
from tilewise.traffic.counter import counting
from tilewise.traffic.counts import sweep
from tilewise.traffic.kernels import counted, predicted
from tilewise.traffic.slopes import fits


def inputs(seqlen_q=70, seqlen_k=None, heads=2, kv_heads=None, head_dim=32, head_dim_v=None, batch=1, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    kv = (batch, seqlen_k or seqlen_q, kv_heads or heads)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in
            ((batch, seqlen_q, heads, head_dim), (*kv, head_dim), (*kv, head_dim_v or head_dim))]


def agree(problem, x, tiles, backward, splits=1):
    """Held to each other launch by launch; gives what was counted."""
    count, form = counted(problem, x, Blocks(*tiles), backward), predicted(problem, x, Blocks(*tiles), backward, splits)
    for c, f in zip(count, form, strict=True):
        assert (c.name, c.read, c.written, c.products) == (f.name, f.read, f.written, f.products)
        assert f.exponentials in (None, c.exponentials)
        assert f.arithmetic in (None, c.arithmetic)
    return count


BLOCKS = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
PER_HEAD = torch.stack([BLOCKS, BLOCKS.T])[None]
NOISE = torch.Generator().manual_seed(1)

# (tile of queries, of keys), sizes, options of `tw.attention`
DENSE = {
    "aligned": ((32, 32), dict(seqlen_q=64), {}),
    "odd lengths": ((32, 32), dict(seqlen_q=77, seqlen_k=41), {}),
    "one tile": ((64, 64), dict(seqlen_q=40), {}),
    "one query": ((16, 32), dict(seqlen_q=1, seqlen_k=70), {}),
    "queries behind keys": ((32, 16), dict(seqlen_q=33, seqlen_k=90), dict(causal=True)),
    "queries before keys": ((32, 16), dict(seqlen_q=90, seqlen_k=33), dict(causal=True)),
    "batch, causal": ((16, 32), dict(seqlen_q=50, batch=2), dict(causal=True)),
    "long tiles": ((16, 64), dict(seqlen_q=100), dict(causal=True)),
    "GQA": ((32, 32), dict(seqlen_q=70, heads=4, kv_heads=2), {}),
    "MQA, causal": ((32, 32), dict(seqlen_q=70, heads=3, kv_heads=1), dict(causal=True)),
    "few queries, folded": ((32, 32), dict(seqlen_q=5, seqlen_k=80, heads=6, kv_heads=2), dict(causal=True)),
    "wide values": ((32, 32), dict(seqlen_q=60, head_dim=16, head_dim_v=40), {}),
    "narrow values": ((32, 32), dict(seqlen_q=60, head_dim=48, head_dim_v=16), dict(causal=True)),
    "two passes": ((32, 32), dict(seqlen_q=40, head_dim=130), {}),
    "window": ((16, 16), dict(seqlen_q=100, heads=1), dict(mask=tw.window(20, 5))),
    "causal window": ((32, 32), dict(seqlen_q=110, heads=1), dict(mask=tw.window(40, 0))),
    "chunked": ((32, 32), dict(seqlen_q=90, heads=1), dict(mask=tw.chunked(37))),
    "two bands": ((16, 16), dict(seqlen_q=90, heads=1), dict(mask=tw.causal() & ~tw.window(20, 0))),
    "prompt and window": ((16, 16), dict(seqlen_q=90, heads=1), dict(mask=~tw.window(30, 30))),
    "fp32": ((32, 32), dict(seqlen_q=50, dtype=torch.float32, heads=1), {}),
    "bf16": ((32, 32), dict(seqlen_q=50, dtype=torch.bfloat16, heads=1), dict(causal=True)),
    "blocks": ((32, 32), dict(seqlen_q=96), dict(mask=tw.block_mask(BLOCKS, block_size=32))),
    "blocks not of the tiles": ((32, 32), dict(seqlen_q=100), dict(mask=tw.block_mask(BLOCKS, block_size=34))),
    "blocks per head": ((32, 32), dict(seqlen_q=96, batch=2), dict(mask=tw.block_mask(PER_HEAD, block_size=32))),
    "blocks, GQA": ((16, 32), dict(seqlen_q=96, heads=4, kv_heads=2), dict(mask=tw.block_mask(BLOCKS, block_size=32))),
    "causal blocks": ((32, 32), dict(seqlen_q=96), dict(mask=tw.causal() & tw.block_mask(BLOCKS, block_size=32))),
    "dropout": ((32, 32), dict(seqlen_q=40), dict(dropout_p=0.2, rng=tw.Rng(1))),
    "bias": ((32, 32), dict(seqlen_q=50), dict(bias=torch.randn(1, 2, 50, 50, generator=NOISE).half())),
    "sinks": ((32, 32), dict(seqlen_q=50, heads=2), dict(sinks=torch.randn(2, generator=NOISE))),
    "sinks, folded": ((32, 32), dict(seqlen_q=5, heads=4, kv_heads=2), dict(sinks=torch.randn(4, generator=NOISE))),
    "score function": ((32, 32), dict(seqlen_q=50), dict(score_mod=tw.softcap(20.0))),
}


@pytest.mark.parametrize("name", DENSE)
def test_forward_and_backward(name):
    tiles, sizes, options = DENSE[name]
    problem, x = make(*inputs(**sizes), **options)
    agree(problem, x, tiles, backward=True)


SPLIT = {
    "dense": (3, dict(seqlen_q=4, seqlen_k=200), {}),
    "causal, GQA": (4, dict(seqlen_q=4, seqlen_k=300, heads=4, kv_heads=2), dict(causal=True)),
    "window: shares without keys": (4, dict(seqlen_q=8, seqlen_k=300, heads=4, kv_heads=1), dict(mask=tw.window(100, 0))),
    "more shares than tiles": (5, dict(seqlen_q=3, seqlen_k=100), {}),
    "two bands": (3, dict(seqlen_q=5, seqlen_k=200), dict(mask=~tw.window(60, 0))),
    "sinks": (2, dict(seqlen_q=4, seqlen_k=150, heads=4, kv_heads=2), dict(sinks=torch.randn(4, generator=NOISE))),
}


@pytest.mark.parametrize("name", SPLIT)
def test_splits_and_their_merge(name):
    splits, sizes, options = SPLIT[name]
    problem, x = make(*inputs(**sizes), **options, num_splits=splits)
    first, merge = agree(problem, x, (16, 32), backward=False, splits=splits)
    assert first.name == "forward"
    assert merge.name == "merge"


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(mask=tw.window(11, 0))], ids=["dense", "causal", "window"])
def test_packed(options):
    lengths = torch.tensor([41, 0, 5, 33])
    q, k, v = (x[0] for x in inputs(79, heads=4, kv_heads=2))
    ends = cu_seqlens(lengths)
    problem, x = _of_packed(q, k, v, ends, ends, **options)
    count = agree(problem, x, (16, 32), backward=True)
    assert count[0].read["work"] > 0


@pytest.mark.parametrize("paged", [False, True])
def test_cache(paged):
    lengths = torch.tensor([70, 33])
    k, v = (torch.randn(int(lengths.sum()), 2, 32, generator=NOISE).half() for _ in range(2))
    if paged:
        cache = tw.PagedKVCache(8, 16, 2, 32, max_sequences=2, dtype=torch.float16)
        rows = [cache.new(), cache.new()]
        cache.append(k, v, sequences=rows, cu_seqlens=cu_seqlens(lengths))
    else:
        cache, rows = tw.KVCache(2, 80, 2, 32, dtype=torch.float16), None
        cache.append(k, v, cu_seqlens=cu_seqlens(lengths))
    q = torch.randn(2, 1, 4, 32, generator=NOISE).half()
    problem, x = _of_cache(q, cache, None, cache_batch_idx=rows, num_splits=2, causal=True)
    first, _ = agree(problem, x, (16, 32), backward=False, splits=2)
    assert ("pages" in first.read) == paged


def test_dense_walk_is_the_formula_of_sizes_alone():
    problem, x = make(*inputs(77, 41, heads=4, kv_heads=2))
    s, tiles = Sizes(1, 4, 2, 77, 41, 32, 32), Blocks(32, 16)
    count = counted(problem, x, tiles, backward=True)
    assert count[0].bytes == flash2_forward(s, dense_walk(s, tiles)).total
    assert sum(kernel.bytes for kernel in count[1:]) == flash2_backward(s, tiles).total


def test_one_tile_reads_and_writes_everything_once():
    problem, x = make(*inputs(32, heads=1))
    once = 32 * 32 * 2
    forward, delta, keys, queries = counted(problem, x, Blocks(32, 32), backward=True)
    assert forward.read == {"q": once, "k": once, "v": once}
    assert forward.written == {"out": once, "lse": 128}
    assert delta.read == {"out": once, "do": once}
    assert keys.written == {"dk": once, "dv": once}
    assert queries.written == {"dq": once}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_flops_have_closed_forms(dtype):
    problem, x = make(*inputs(64, heads=1, dtype=dtype), causal=True)
    for kernel in predicted(problem, x, Blocks(32, 32), backward=True):
        assert kernel.exponentials is not None
        assert kernel.arithmetic is not None


@triton.jit
def scattered(X, Y, SUM, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0)
    tl.store(Y + at, tl.exp(x) + 1.0, mask=at % 2 == 0)
    tl.atomic_add(SUM + at // BLOCK, x, mask=at < n)


def test_any_kernel_can_be_counted():
    x, y, total = torch.randn(64), torch.zeros(64), torch.zeros(2)
    with counting() as launches:
        scattered[(2,)](x, y, total, 50, BLOCK=32)
        scattered[(2,)](x, x, total, 50, BLOCK=32)                          # one tensor as two arguments
    first, second = launches
    assert first.read == {"X": 50 * 4, "SUM": 50 * 4}
    assert first.written == {"Y": 32 * 4, "SUM": 50 * 4}
    assert (first.kernel, first.exponentials, first.arithmetic, first.products) == ("scattered", 64, 64, 0)
    assert (second.read, second.written) == (first.read, first.written)
    with counting() as later:
        pass
    assert later == []
    scattered[(2,)](x, y, total, 50, BLOCK=32)
    assert len(launches) == 2                                               # nothing stays patched
    assert math.isfinite(float(y[0]))


def test_what_has_no_closed_form_says_so():
    lengths = torch.tensor([20])
    problem, x = make(*inputs(40), mask=tw.key_lengths(lengths))
    with pytest.raises(NotImplementedError, match="captured tensors: counted, not in closed form"):
        predicted(problem, x, Blocks(32, 32))
    assert counted(problem, x, Blocks(32, 32))[0].read["t0"] > 0


def test_memory_beside_inputs_and_gradients_is_lse_and_delta():
    problem, _ = make(*inputs(64, heads=3))
    assert workspace(problem)[1] == 2 * 3 * 64 * STATISTIC


def test_exponents_of_what_is_counted():
    """N, d and M of the tensors that pass again and again: Theorem 2's and 5's N² d² / M."""
    counts = sweep([(64, 16, 16), (128, 16, 16), (128, 16, 32), (64, 32, 16), (128, 32, 32)], backward=True)
    streamed = [fit for fit in fits(counts) if fit.part.endswith("streamed")]
    assert [fit.part for fit in streamed] == ["forward, streamed", "backward, streamed"]
    for fit in streamed:
        assert fit.off < 0.02, fit
