"""Code written for torch's scaled_dot_product_attention is computed by Tilewise under a switch, and means the same."""
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from support.backends import AVAILABLE
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.utils.checkpoint import checkpoint

import tilewise as tw
from tilewise.bench.tolerance import Results, judge
from tilewise.compat import scaled_dot_product as module
from tilewise.compat import scaled_dot_product_attention, sdpa

pytestmark = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
TORCH = F.scaled_dot_product_attention
L, S, E = 33, 47, 16


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call that reached Tilewise."""
    found = []
    attention = module.attention
    monkeypatch.setattr(module, "attention", lambda *args, **options: found.append(options) or attention(*args, **options))
    return found


@contextmanager
def everywhere():
    sdpa.enable()
    try:
        yield
    finally:
        sdpa.disable()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def visible(*shape):
    """A boolean mask in which some rows see nothing."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 3:4, :] = False
    return mask


def hidden(*shape):
    return torch.where(visible(*shape), normal(*shape, seed=2), -torch.inf)


CASES = {
    "plain": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E), {}),
    "causal": ((2, 4, L, E), (2, 4, L, E), (2, 4, L, E), dict(is_causal=True)),
    "causal, fewer queries": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E), dict(is_causal=True)),
    "causal, more queries": ((2, 4, S, E), (2, 4, L, E), (2, 4, L, E), dict(is_causal=True)),
    "other value dim and scale": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, 24), dict(scale=0.3)),
    "grouped": ((2, 6, L, E), (2, 2, S, E), (2, 2, S, E), dict(enable_gqa=True)),
    "grouped differently": ((2, 6, L, E), (2, 3, S, E), (2, 2, S, E), dict(enable_gqa=True)),
    "one key head": ((2, 6, L, E), (2, 1, S, E), (2, 1, S, E), {}),
    "two dimensions": ((L, E), (S, E), (S, E), dict(attn_mask=visible(L, S))),
    "three dimensions": ((4, L, E), (4, S, E), (4, S, E), dict(attn_mask=hidden(4, 1, S))),
    "three dimensions, grouped": ((4, L, E), (2, S, E), (2, S, E), dict(enable_gqa=True, is_causal=True)),
    "five dimensions": ((2, 3, 4, L, E), (2, 3, 4, S, E), (2, 3, 4, S, E), dict(attn_mask=hidden(2, 1, 4, L, S))),
    "five dimensions, shared mask": ((2, 3, 4, L, E), (2, 3, 4, S, E), (2, 3, 4, S, E), dict(attn_mask=visible(1, 1, 4, L, S))),
    "shared keys": ((2, 4, L, E), (1, 4, S, E), (4, S, E), {}),
    "boolean": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E), dict(attn_mask=visible(2, 1, L, S))),
    "padding": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E), dict(attn_mask=torch.arange(S) < torch.tensor([[[[5]]], [[[S]]]]))),
    "floating": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E), dict(attn_mask=hidden(2, 4, L, S))),
    "floating, shared": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E), dict(attn_mask=hidden(L, S))),
    "upper left": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E), dict(attn_mask=causal_upper_left(L, S))),
    "lower right": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E), dict(attn_mask=causal_lower_right(L, S))),
    "no keys": ((2, 4, L, E), (2, 4, 0, E), (2, 4, 0, E), {}),
    "no queries": ((2, 4, 0, E), (2, 4, S, E), (2, 4, S, E), {}),
    "no batch": ((0, 4, L, E), (0, 4, S, E), (0, 4, S, E), {}),
}


def run(function, shapes, options, dtype):
    """out and the gradients of everything differentiable, by name."""
    leaves = {name: normal(*shape, seed=i, dtype=dtype).requires_grad_()
              for i, (name, shape) in enumerate(zip("qkv", shapes, strict=True))}
    mask = options.get("attn_mask")
    if type(mask) is torch.Tensor and mask.is_floating_point():
        leaves["bias"] = mask.to(dtype).requires_grad_()
        options = options | dict(attn_mask=leaves["bias"])
    out = function(leaves["q"], leaves["k"], leaves["v"], **options)
    gradients = torch.autograd.grad((out * normal(*out.shape, seed=9, dtype=dtype)).sum(), list(leaves.values()))
    return Results({"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}})


@pytest.mark.parametrize("name", CASES)
def test_like_torch(name, calls):
    """In fp64 the same; in fp32 as near to the truth as torch's own arithmetic, by the rule of the contract suite."""
    *shapes, options = CASES[name]
    with sdpa_kernel(SDPBackend.MATH):
        truth, standard = (run(TORCH, shapes, options, dtype) for dtype in (torch.float64, torch.float32))
    native = "auto" if name in ("plain", "causal", "causal, fewer queries", "grouped", "boolean", "floating") else "tiled"
    with sdpa(native):  # building a kernel for each would take a minute
        exact, ours = (run(F.scaled_dot_product_attention, shapes, options, dtype) for dtype in (torch.float64, torch.float32))
    assert len(calls) == 2
    for key, x in exact.tensors.items():
        torch.testing.assert_close(x, truth.tensors[key], rtol=1e-10, atol=1e-12)
    call = SimpleNamespace(q=torch.empty(shapes[0]), options=dict(bias=options.get("attn_mask")),
                           scores=torch.Size(shapes[0][:-1]).numel() * shapes[1][-2])
    assert all(verdict.ok for verdict in judge(call, ours, truth, standard))


def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    q, k, v = (normal(1, 2, n, E).requires_grad_() for n in (L, S, S))
    for mask in (visible(L, S), hidden(L, S)):
        with sdpa():
            out = F.scaled_dot_product_attention(q, k, v, mask)
        assert (out[:, :, 3] == 0).all()
        assert (torch.autograd.grad(out.sum(), q)[0][:, :, 3] == 0).all()


@pytest.mark.parametrize("ragged_k", [False, True], ids=["itself", "other keys"])
@pytest.mark.parametrize("options", [{}, dict(is_causal=True)], ids=["plain", "causal"])
def test_nested(options, ragged_k):
    lengths = [7, 1, 12]
    keys = [5, 9, 12] if ragged_k else lengths

    def nested(counts, heads, seed):
        return torch.nested.nested_tensor([normal(n, heads, E, seed=seed + i) for i, n in enumerate(counts)],
                                          layout=torch.jagged, requires_grad=True)
    q, k = nested(lengths, 4, 0), nested(keys, 2, 10)
    v = torch.nested.nested_tensor_from_jagged(k.values().detach() * 2, k.offsets()).requires_grad_()
    with sdpa():
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True, **options)
    ours = torch.autograd.grad(out.values().sum(), (q, k, v))
    parts = [[x.detach().transpose(0, 1).requires_grad_() for x in sequence]
             for sequence in zip(q.unbind(), k.unbind(), v.unbind(), strict=True)]
    for i, (a, b, c) in enumerate(parts):
        expected = TORCH(a, b, c, enable_gqa=True, **options)
        torch.testing.assert_close(out[i], expected)
        for g, e in zip(ours, torch.autograd.grad(expected.sum(), (a, b, c)), strict=True):
            torch.testing.assert_close(g[i], e.transpose(0, 1))
    if not ragged_k:
        one_head = torch.nested.nested_tensor_from_jagged(q.values()[:, 0], q.offsets())
        with sdpa():
            out = F.scaled_dot_product_attention(one_head, one_head, one_head)
        torch.testing.assert_close(out[0], TORCH(*[q.values()[:7, 0]] * 3))


def test_dropout_is_that_of_tilewise():
    q = normal(2, L, 4, E).transpose(1, 2)
    torch.manual_seed(0)
    with sdpa():
        out = F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)
    torch.manual_seed(0)
    assert torch.equal(out, tw.attention(q, q, q, dropout_p=0.3, layout="bhsd"))
    assert not torch.equal(out, TORCH(q, q, q))


def test_memory_follows_the_query():
    for q in (normal(2, 4, L, E), normal(2, L, 4, E).transpose(1, 2)):
        out = scaled_dot_product_attention(q, q, q)
        assert out.stride() == q.stride()
        torch.testing.assert_close(scaled_dot_product_attention(q, q.mT.contiguous().mT, q), out)


def test_autocast():
    q, mask = normal(2, 4, L, E, dtype=torch.float32), normal(L, L, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for of_mask in (mask, mask.bfloat16()):
            out = scaled_dot_product_attention(q, q, q, of_mask)
            torch.testing.assert_close(out, TORCH(q, q, q, of_mask), rtol=2e-2, atol=2e-2)


Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8)
REFUSED = [
    ((Q[0, 0, 0], K, K), {}, ValueError, r"query: expected a tensor \[..., sequence, head_dim\], got \[8\]"),
    ((Q, K[:, :2], K[:, :2]), {}, ValueError, "unless enable_gqa=True, got 2 and 2"),
    ((Q, K[:, :3], K[:, :3]), dict(enable_gqa=True), ValueError, "key: expected a number of heads that divides query's 4"),
    ((Q, K.expand(3, 2, 4, 5, 8)[:, :, :, :, :4], K), {}, ValueError, "k: expected q's head_dim 8, got 4"),
    ((Q, torch.zeros(3, 4, 5, 8), K), {}, ValueError, "query, key, value: expected leading dimensions that broadcast"),
    ((Q, K, K[..., :4]), dict(attn_mask=torch.ones(3, 5) > 0, is_causal=True), ValueError, "expected None with is_causal"),
    ((Q, K, K), dict(attn_mask=torch.ones(3, 4)), ValueError, r"broadcasts to \[2, 4, 3, 5\], got \[3, 4\]"),
    ((Q, K, K), dict(attn_mask=torch.ones(5)), ValueError, r"broadcasts to \[2, 4, 3, 5\], got \[5\]"),
    ((Q, K, K), dict(attn_mask=torch.ones(1, 1, 1, 3, 5)), ValueError, "attn_mask: expected a shape that broadcasts"),
    ((Q, K, K), dict(attn_mask=torch.ones(3, 5).double()), TypeError, "attn_mask: expected .* query's dtype torch.float32"),
    ((Q, K, K), dict(attn_mask=torch.ones(3, 5).int()), TypeError, "attn_mask: expected a tensor, boolean"),
    ((Q, K, K.double()), {}, TypeError, "v: expected q's dtype"),
    ((Q, K, K), dict(dropout_p=1.5), ValueError, "dropout_p: expected"),
    ((Q, K, K), dict(is_causal=1), TypeError, "is_causal: expected True or False, got 1"),
]


@pytest.mark.parametrize("args, options, error, message", REFUSED)
def test_refusals(args, options, error, message):
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
        TORCH(*args, **options)
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*args, **options)


def test_a_causal_bias_of_other_lengths():
    with pytest.raises(ValueError, match="causal bias for 3 queries and 5 keys, got one for 4 and 5"):
        scaled_dot_product_attention(Q, K, K, causal_upper_left(4, 5))


def test_refusals_of_nested():
    q = torch.nested.nested_tensor([torch.zeros(3, 2, 8), torch.zeros(4, 2, 8)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ValueError, match="attn_mask: expected None with nested tensors"):
        scaled_dot_product_attention(q, q, q, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"key: expected a nested tensor .* got a tensor that is not nested"):
        scaled_dot_product_attention(q, Q, Q)


# ---- the switch -----------------------------------------------------------------------------------------------------

def test_inside_only(calls):
    q = normal(1, 2, L, E)
    with sdpa("tiled"):
        with sdpa("reference"):
            F.scaled_dot_product_attention(q, q, q)
        imported_before(query=q, key=q, value=q)
    assert [c["backend"] for c in calls] == ["reference", "tiled"]
    F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(ZeroDivisionError), sdpa():
        raise ZeroDivisionError
    imported_before(q, q, q)
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"backend: expected one of auto, .* got 'flash'"):
        sdpa("flash")


def test_of_this_thread_or_of_all(calls):
    q = normal(1, 2, L, E)

    def elsewhere():
        for function in (F.scaled_dot_product_attention, imported_before):
            thread = threading.Thread(target=function, args=(q, q, q))
            thread.start()
            thread.join()

    with sdpa():
        elsewhere()
    assert len(calls) == 0
    sdpa.enable("reference")
    try:
        sdpa.enable("tiled")
        elsewhere()
    finally:
        sdpa.disable()
    assert [c["backend"] for c in calls] == ["tiled", "tiled"]
    assert imported_before is TORCH is F.scaled_dot_product_attention
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    decoder = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    attend, encode, decode = nn.MultiheadAttention(32, 4, batch_first=True), nn.TransformerEncoder(encoder, 2), decoder
    x, padding = torch.randn(2, 12, 32), torch.arange(12) >= torch.tensor([[9], [12]])
    later = nn.Transformer.generate_square_subsequent_mask(12)
    return {
        "attention": (attend, lambda: attend(x, x, x, key_padding_mask=padding, need_weights=False)[0], 1),
        "encoder": (encode, lambda: encode(x, src_key_padding_mask=padding), 2),
        "decoder": (decode, lambda: decode(x, x, tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=padding), 2)}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["attention", "encoder", "decoder"])
def test_modules(name, training, models, calls):
    """Also in eval mode without gradients, where torch would compute whole layers in one operation."""
    module, forward, times = models[name]
    module.train(training)
    shown = torch.arange(12) < torch.tensor([[9], [12]])  # outputs at padding differ between torch's own paths
    for switch in (sdpa, everywhere):
        with torch.set_grad_enabled(training):
            before, expected = len(calls), forward()
            assert len(calls) == before
            with switch():
                found = forward()
            assert len(calls) == before + times
        torch.testing.assert_close(found[shown], expected[shown], rtol=1e-4, atol=1e-5)
        if training:
            of_torch, ours = (torch.autograd.grad(y[shown].sum(), list(module.parameters())) for y in (expected, found))
            for a, b in zip(ours, of_torch, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("switch", [sdpa, everywhere])
def test_checkpoints_are_computed_again_alike(switch, reentrant, calls):
    q = normal(1, 2, L, E).requires_grad_()
    (expected,) = torch.autograd.grad(causal(q).sum(), q)
    ways = [lambda y: y.backward(), torch.autograd.backward, *([] if reentrant else [lambda y: torch.autograd.grad(y, q)])]
    for times, way in enumerate(ways):
        q.grad = None
        with switch():
            found = way(checkpoint(causal, q, use_reentrant=reentrant).sum())
        torch.testing.assert_close(q.grad if found is None else found[0], expected)
        assert len(calls) == 2 * times + 2


def test_modules_can_still_be_scripted(models):
    module, _, _ = models["encoder"]
    x = torch.randn(2, 5, 32)
    module.eval()
    torch.testing.assert_close(torch.jit.script(module.layers[0])(x), module.layers[0](x))


# ---- torch.compile --------------------------------------------------------------------------------------------------

class Graphs:
    """A compiler that counts, for each graph, the calls of our operation, and of anything of torch that attends."""

    def __init__(self):
        torch._dynamo.reset()
        self.ours, self.theirs = [], []

    def __call__(self, graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        self.ours.append(targets.count("tilewise.attention"))
        self.theirs.append(sum(any(word in t for word in ("scaled_dot", "multi_head", "multihead", "encoder_layer"))
                               for t in targets))
        return graph


def causal(q):
    return F.scaled_dot_product_attention(q * 2, q, q, is_causal=True)


def through_an_import(q):
    return imported_before(q * 2, q, q, is_causal=True)


@pytest.mark.parametrize("function", [causal, through_an_import])
@pytest.mark.parametrize("switch", [sdpa, everywhere])
def test_compiled_inside_and_outside(function, switch):
    """What was compiled outside is compiled anew inside, and the other way round."""
    graphs = Graphs()
    compiled = torch.compile(function, fullgraph=True, backend=graphs)
    q = normal(1, 2, L, E)
    expected = function(q)
    for _ in range(2):
        torch.testing.assert_close(compiled(q), expected)
        with switch():
            torch.testing.assert_close(compiled(q), expected)
    assert (graphs.ours, graphs.theirs) == ([0, 1], [1, 0])


def test_switched_on_inside_of_compiled_code(models):
    module, forward, times = models["encoder"]
    module.eval()

    def attend(q):
        with sdpa():
            return causal(q), forward()

    graphs = Graphs()
    q = normal(1, 2, L, E)
    with torch.no_grad():
        found, _ = torch.compile(attend, fullgraph=True, backend=graphs)(q)
    torch.testing.assert_close(found, TORCH(q * 2, q, q, is_causal=True))
    assert (graphs.ours, graphs.theirs) == ([1 + times], [0])


def test_lengths_do_not_compile_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(q, k, mask):
        return (F.scaled_dot_product_attention(q, k, k, mask) + F.scaled_dot_product_attention(q, k, k, is_causal=True)).sum()

    compiled, counts = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter), []
    for n in (12, 20, 31):
        q, k, mask = normal(2, 2, n, E).requires_grad_(), normal(2, 2, n + 5, E), hidden(n, n + 5).requires_grad_()
        with sdpa():
            ours = torch.autograd.grad(compiled(q, k, mask), (q, mask))
        for a, b in zip(ours, torch.autograd.grad(attend(q, k, mask), (q, mask)), strict=True):
            torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:-1]


@pytest.mark.parametrize("switch", [sdpa, everywhere])
def test_compiled_modules(switch, models):
    module, forward, times = models["encoder"]
    module.train()
    graphs = Graphs()
    with switch():
        torch.testing.assert_close(torch.compile(forward, fullgraph=True, backend=graphs)(), forward())
    assert (graphs.ours, graphs.theirs) == ([times], [0])
    module.eval()
    with torch.no_grad(), switch():
        graphs = Graphs()
        compiled = torch.compile(forward, fullgraph=True, backend=graphs)
        torch.testing.assert_close(compiled(), forward())
    assert (graphs.ours, graphs.theirs) == ([times], [0])
