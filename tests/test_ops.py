"""Where attention meets autograd, torch.compile and autocast."""
import pytest
import torch
import torch._dynamo.testing
from support.backends import AVAILABLE, DEVICE

import tilewise as tw
import tilewise.ops  # registers the custom op
from tilewise.problem import make

CPU_ONLY = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")


def inputs(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (2, n, 4, 16), (2, n, 2, 16), (2, n, 2, 16), (4, n, n), (4,)
    return tuple(torch.randn(s, generator=g).to(DEVICE).requires_grad_() for s in shapes)


def loss(q, k, v, bias, sinks, lengths):
    out, lse = tw.attention(q, k, v, causal=True, mask=tw.window(20, None) | tw.prefix(lengths), score_mod=tw.softcap(3.0),
                            bias=bias, sinks=sinks, return_lse=True)
    return out.sum() + lse.sum()


@CPU_ONLY
@pytest.mark.parametrize("options", [
    dict(causal=True),
    dict(mask=tw.window(3, 1) & tw.key_lengths(torch.tensor([4, 9], device=DEVICE)), dropout_p=0.1, rng=tw.Rng(1)),
], ids=["causal", "rich"])
def test_opcheck(options):
    q, k, v, bias, sinks = inputs(9)
    problem, x = make(q, k, v, bias=bias, sinks=sinks, **options)
    leaves = [t.detach().requires_grad_() for t in x[:5]]
    x = x._replace(**dict(zip(x._fields, leaves, strict=False)))
    torch.library.opcheck(torch.ops.tilewise.attention.default, (*x, *problem.settings, "auto"))


@CPU_ONLY
def test_compile_whole_graph_without_recompiling_for_a_length():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compiled_once = None
    for n in (24, 31, 57):
        x, lengths = inputs(n), torch.tensor([3, 5], device=DEVICE)
        ours = torch.autograd.grad(compiled(*x, lengths), x)
        expected = torch.autograd.grad(loss(*x, lengths), x)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once


@CPU_ONLY
def test_functions_and_tables_compile_once():
    """Masks and score functions of functions are made outside; a table's gradient passes through the custom op."""
    table = torch.randn(4, 127, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    ids = (torch.arange(64) // 9).to(DEVICE)
    mask = tw.mask_mod(lambda b, h, q, k: (ids[q] == ids[k]) | (k < 3))
    mods = [tw.score_mod(lambda s, b, h, q, k: s + table[h, q - k + 63]), tw.softcap(4.0)]

    def attend(q, k, v):
        return tw.attention(q, k, v, mask=mask, score_mod=mods).square().sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    compiled_once = None
    for n in (24, 31, 57):
        x = inputs(n)[:3]
        for a, b in zip(*(torch.autograd.grad(f(*x), (*x, table)) for f in (compiled, attend)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once


@CPU_ONLY
def test_a_function_inside_compile_says_what_to_do():
    q, k, v = inputs()[:3]
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: tw.attention(q, k, v, mask=lambda b, h, i, j: i >= j), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"inside torch.compile a function cannot be captured"):
        compiled(q)


@CPU_ONLY
def test_func_transforms_reach_tables():
    q, k, v = (x.detach() for x in inputs(12)[:3])
    table = torch.randn(3, 4, 23, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def loss(table, backend="tiled"):
        return tw.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, i - j + 11], backend=backend).square().sum()

    one = torch.func.grad(loss)(table[0])
    torch.testing.assert_close(one, torch.func.grad(lambda t: loss(t, "reference"))(table[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(table)[0], one)
    _, tangent = torch.func.jvp(loss, (table[0],), (table[1],))
    torch.testing.assert_close(tangent, (one * table[1]).sum(), rtol=1e-4, atol=1e-4)


@CPU_ONLY
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_memory_order_follows_the_layout(layout):
    q, k, v, *_ = inputs()
    out = tw.attention(q, k, v, layout="bshd")
    assert out.is_contiguous()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    assert tw.attention(q, k, v, layout="bhsd").is_contiguous()


@CPU_ONLY
def test_autocast():
    q, k, v, *_ = inputs()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, lse = tw.attention(q, k, v, return_lse=True)
        doubles = tw.attention(q.double(), k.double(), v.double())
    assert (out.dtype, lse.dtype, doubles.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    assert torch.equal(out, tw.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


@CPU_ONLY
def test_activation_checkpointing_repeats_dropout():
    from torch.utils.checkpoint import checkpoint
    q, k, v, *_ = inputs()
    attend = lambda q: tw.attention(q, k, v, dropout_p=0.3)  # noqa: E731
    torch.manual_seed(0)
    expected = torch.autograd.grad(attend(q).square().sum(), q)[0]
    torch.manual_seed(0)
    assert torch.equal(torch.autograd.grad(checkpoint(attend, q, use_reentrant=False).square().sum(), q)[0], expected)


@pytest.mark.skipif("triton" not in AVAILABLE, reason="no GPU and not interpreting")
class TestNative:
    def test_third_derivatives_say_what_to_do(self):
        q, k, v = (x.detach() for x in inputs(9)[:3])
        gradient = torch.func.grad(lambda q: tw.attention(q, k, v, backend="triton").square().sum())
        with pytest.raises(NotImplementedError, match='use backend="tiled" for third derivatives'):
            torch.func.jvp(torch.func.grad(lambda q: gradient(q).square().sum()), (q,), (q,))

    def test_func_grad_and_vmap(self):
        q, k, v, *_ = (x.detach() for x in inputs())
        attend = lambda q, backend="triton": tw.attention(q, k, v, causal=True, backend=backend).sin().sum()  # noqa: E731
        expected = torch.func.grad(lambda q: attend(q, "reference"))(q)
        torch.testing.assert_close(torch.func.grad(attend)(q), expected)
        several = torch.func.vmap(torch.func.grad(attend))(torch.stack([q, q]))
        torch.testing.assert_close(several, torch.stack([expected, expected]))

    def test_gradient_of_a_sum_is_not_contiguous(self):
        q, k, v, *_ = inputs()
        ours, expected = (torch.autograd.grad(tw.attention(q, k, v, backend=b).sum(), (q, k, v))
                          for b in ("triton", "reference"))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_rows_of_a_batch_invariant_call_do_not_depend_on_the_others(self):
        q, k, v, *_ = (x.detach() for x in inputs(50))
        whole = tw.attention(q, k, v, causal=True, batch_invariant=True, backend="triton")
        last = tw.attention(q[1:, -3:], k[1:], v[1:], causal=True, batch_invariant=True, backend="triton")
        assert torch.equal(whole[1:, -3:], last)


@CPU_ONLY
def test_batch_invariance_is_promised_or_refused():
    q, k, v, *_ = inputs()
    if DEVICE == "cpu":
        with pytest.raises(NotImplementedError, match=r"'tiled' cannot compute this: .*batch_invariant"):
            tw.attention(q, k, v, batch_invariant=True, backend="tiled")
        with pytest.raises(NotImplementedError, match=r"no backend can .*triton: .*cpu: fp64.*tiled: .*batch_invariant"):
            tw.attention(q.double(), k.double(), v.double(), batch_invariant=True)


@CPU_ONLY
def test_compile_does_not_compile_again_for_a_window_made_outside():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = lambda q, mask: tw.attention(q, q, q, mask=mask)  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    q = torch.randn(1, 20, 1, 8, device=DEVICE)
    counts = []
    for left in range(2, 6):
        mask = tw.window(left, 1)
        torch.testing.assert_close(compiled(q, mask), attend(q, mask))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1]


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"])
def test_changing_a_captured_tensor_before_backward_is_noticed(backend):
    q, k, v, *_ = inputs()
    lengths = torch.tensor([20, 24], device=DEVICE)
    out = tw.attention(q, k, v, mask=tw.key_lengths(lengths), backend=backend)
    lengths.fill_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"])
def test_vmap_over_a_mask(backend):
    q, k, v, *_ = (x.detach() for x in inputs())
    visible = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.7
    attend = lambda m: tw.attention(q, k, v, mask=m, backend=backend)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(attend)(visible), torch.stack([attend(m) for m in visible]))


@CPU_ONLY
def test_a_cache_under_compile_is_one_break_in_the_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    g = torch.Generator().manual_seed(0)
    caches = [tw.KVCache(2, 20, 2, 16, dtype=torch.float32, device=DEVICE) for _ in range(2)]
    rotary = tw.Rotary.of(16, 20, device=DEVICE)

    def step(q, k, v, cache):
        return tw.attention_with_kv_cache(q * 2, cache, k, v, causal=True, rotary=rotary) * 2

    compiled = torch.compile(step, backend="aot_eager")
    for n in (5, 1, 1):
        q, k, v = (torch.randn(2, n, heads, 16, generator=g).to(DEVICE) for heads in (4, 2, 2))
        torch.testing.assert_close(compiled(q, k, v, caches[0]), step(q, k, v, caches[1]))
        assert torch.equal(caches[0].lengths, caches[1].lengths)
    (reason,) = torch._dynamo.utils.counters["graph_break"]
    assert "it writes to a cache" in reason
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="it writes to a cache"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(q, k, v, caches[0])
