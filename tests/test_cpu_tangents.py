"""Forward mode and second derivatives on the `cpu` backend: threads, passes, shares of the keys, strides, what is refused.

Every mask here is causal: each other one would be compiled for seconds.
"""
import pytest
import torch
from support import algebra
from support.backends import AVAILABLE
from support.tangents import along, assert_right

import tilewise as tw
from tilewise.backends import Needs, Tangents, cpu
from tilewise.backends.cpu import sizes
from tilewise.bench.cases import Case, draw
from tilewise.problem import make

pytestmark = [pytest.mark.usefixtures("threads"), pytest.mark.skipif(
    "cpu" not in AVAILABLE or not cpu.compiler.compiler(), reason="needs a C++ compiler")]

LONG = dict(seqlen_q=70, seqlen_k=600, heads=2, kv_heads=1)
CAUSAL = dict(causal=True)
DROPOUT = dict(dropout_p=0.2, rng=tw.Rng(1))
THREADED = (
    Case("few heads", **LONG | dict(batch=1), options=lambda m: CAUSAL),
    Case("bias over batch", **LONG, options=lambda m: CAUSAL | dict(bias=m.normal(2, 70, 600))),
    Case("bias over heads", **LONG | dict(heads=4, kv_heads=2), options=lambda m: CAUSAL | dict(bias=m.normal(2, 1, 70, 600))),
    Case("bias of queries", **LONG, options=lambda m: CAUSAL | DROPOUT | dict(bias=m.normal(2, 2, 70, 1))),
)


@pytest.mark.parametrize("case", THREADED, ids=str)
@pytest.mark.parametrize("count, copies", [(1, 2), (3, 2), (3, 0)], ids=["one thread", "three", "three in several passes"])
def test_right_and_repeatable_with_threads(count, copies, case, threads, monkeypatch, poisoned):
    monkeypatch.setattr(sizes, "DQ_COPIES", copies)
    threads(count)
    problem = draw(case, torch.float32).described()[0]
    assert sizes.backward(problem, False, False, moving=True)["parts"] > (count > 1)
    assert sizes.tangent(problem)["splits"] > (count > 1 and case is THREADED[0])
    assert_right(case, torch.float32, "cpu")
    first, second = (along(draw(case, torch.float32), cpu, torch.float32).tensors for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [2, 17, 48, 49, 64, 65, 97, 193])
def test_lengths_around_the_borders_of_blocks(n, dtype, poisoned):
    shape = dict(batch=1, heads=3, kv_heads=1, head_dim=24, head_dim_v=40, options=lambda m: CAUSAL)
    assert_right(Case("square", seqlen_q=n, seqlen_k=n, **shape), dtype, "cpu")
    assert_right(Case("wide", seqlen_q=n, seqlen_k=130, **shape), dtype, "cpu")
    assert_right(Case("tall", seqlen_q=130, seqlen_k=n, **shape), dtype, "cpu")


def test_one_key():
    """Its probability is 1 whatever moves, up to the rounding of lse, which standard attention has not."""
    call = draw(Case("one key", 1, 1, 1, options=lambda m: CAUSAL), torch.float32)
    found, truth = along(call, cpu, torch.float32).tensors, along(call, algebra, torch.float64).tensors
    for name, x in found.items():
        torch.testing.assert_close(x, truth[name].to(x.dtype), rtol=0, atol=1e-5)
    assert (truth["dv"] == 0).all()


def test_wide_heads(poisoned):
    shape = dict(batch=1, seqlen_q=70, seqlen_k=130, options=lambda m: CAUSAL)
    assert_right(Case("wide", head_dim=512, head_dim_v=1, **shape), torch.float32, "cpu")
    assert_right(Case("wide values", head_dim=1, head_dim_v=512, **shape), torch.float32, "cpu")


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_directions_of_any_strides():
    """As autograd hands them over: expanded, transposed, every second row."""
    q, k, v, bias = drawn((2, 3, 40, 16), (2, 1, 50, 16), (2, 1, 50, 24), (1, 3, 40, 50))
    problem, x = make(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, bias=bias)
    u_q, u_k, u_v, u_bias, (dout,) = *drawn((2, 3, 16, 40), (2, 1, 100, 16), (1, 1, 1, 1), (1, 3, 50, 40)), drawn((1, 1, 1, 24))
    u = Tangents(u_q.mT, u_k[:, :, ::2], u_v.expand(2, 1, 50, 24), u_bias.mT)
    results = []
    for direction, g in ((u, dout.expand(2, 3, 40, 24)),
                         (Tangents(*(None if t is None else t.contiguous() for t in u)), dout.repeat(2, 3, 40, 1))):
        out, lse = cpu.forward(problem, x)
        moved = cpu.tangent(problem, x, direction, out, lse)
        found = cpu.backward_tangent(problem, x, direction, out, lse, *moved, g, lse.mT.contiguous().mT, Needs(True, False))
        results.append([*moved, *found[:4]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_rows_without_keys_have_zero_derivatives():
    q, k, v = (t.requires_grad_() for t in drawn((1, 9, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)))
    attend = lambda *x: tw.attention(*x, causal=True, return_lse=True, backend="cpu")  # noqa: E731
    _, (of_out, of_lse) = torch.func.jvp(attend, (q, k, v), (q.cos(), k.cos(), v.cos()))
    assert (of_out[:, :5] == 0).all()
    assert (of_lse[..., :5] == 0).all()
    assert (of_lse[..., 5:] != 0).all()
    (first,) = torch.autograd.grad(attend(q, k, v)[0].sin().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    assert (second[:, :5] == 0).all()
    assert second.isfinite().all()


def test_rows_of_a_batch_invariant_call_depend_on_nothing_beside_them(threads):
    q, k, v = drawn((3, 300, 4, 16), (3, 300, 2, 16), (3, 300, 2, 16))
    attend = lambda *x: tw.attention(*x, causal=True, batch_invariant=True, return_lse=True, backend="cpu")  # noqa: E731
    _, (out, lse) = torch.func.jvp(attend, (q, k, v), (q.cos(), k.cos(), v.cos()))
    threads(3)
    own = [t[1:2] for t in (q, k, v)]
    own[0] = own[0][:, -7:]
    _, (of_out, of_lse) = torch.func.jvp(attend, tuple(own), tuple(t.cos() for t in own))
    assert torch.equal(of_out, out[1:2, -7:])
    assert torch.equal(of_lse, lse[1:2, :, -7:])


def test_a_cache_is_refused():
    q, k, v = drawn((1, 2, 2, 8), (5, 2, 8), (5, 2, 8))
    cache = tw.KVCache(1, 8, 2, 8, dtype=torch.float32)
    cache.append(k[None], v[None])
    with pytest.raises(NotImplementedError, match=r"cannot compute.*keys from a cache"):
        torch.func.jvp(lambda q: tw.attention_with_kv_cache(q, cache, backend="cpu"), (q,), (q,))


def test_products_that_a_direction_has_not_are_not_computed():
    """A direction of q alone gives the bits of one in which k and v move by 0."""
    q, k, v, u_q = drawn((1, 2, 70, 16), (1, 2, 200, 16), (1, 2, 200, 16), (1, 2, 70, 16))
    problem, x = make(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
    out, lse = cpu.forward(problem, x)
    alone, whole = Tangents(u_q, None, None), Tangents(u_q, torch.zeros_like(k), torch.zeros_like(v))
    for a, b in zip(cpu.tangent(problem, x, alone, out, lse), cpu.tangent(problem, x, whole, out, lse), strict=True):
        assert torch.equal(a, b)
