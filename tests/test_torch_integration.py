"""Tilewise among torch's own machinery: compilers, exporters, fake tensors, transforms, checkpointing, files."""
import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from support.backends import AVAILABLE, DEVICE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tilewise as tw
from tilewise.paged_cache import PageBook

pytestmark = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
B, H, H_KV, D, D_V = 2, 4, 2, 16, 12
NATIVE = [b for b in AVAILABLE if b != "reference"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def inputs(n=24, keys=None):
    keys = n if keys is None else keys
    return [normal(B, n, H, D), normal(B, keys, H_KV, D, seed=1), normal(B, keys, H_KV, D_V, seed=2)]


# ---- compiling and exporting ----------------------------------------------------------------------------------------

class Block(nn.Module):
    """A layer as users write it: projections around attention, with a padding mask made inside."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, (H + 2 * H_KV) * 8)
        self.bias = nn.Parameter(torch.zeros(H, 1, 1))
        self.out = nn.Linear(H * 8, 32)

    def forward(self, x, lengths):
        q, k, v = self.qkv(x).unflatten(-1, (-1, 8)).split([H, H_KV, H_KV], 2)
        out = tw.attention(q, k, v, causal=True, mask=tw.key_lengths(lengths), score_mod=tw.softcap(20.0), bias=self.bias)
        return self.out(out.flatten(-2))


def test_a_training_step_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    blocks = [Block().to(DEVICE)]
    blocks.append(copy.deepcopy(blocks[0]))
    models = [torch.compile(blocks[0], fullgraph=True, dynamic=True, backend="aot_eager"), blocks[1]]
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1) for block in blocks]
    for n in (24, 31, 57):
        x, lengths = normal(B, n, 32, seed=n), torch.tensor([5, n], device=DEVICE)
        with torch._dynamo.config.patch(error_on_recompile=n > 24):
            for model, optimizer in zip(models, optimizers, strict=True):
                model(x, lengths).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(*(block.parameters() for block in blocks), strict=True):
        torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def exported(strict=False):
    block, lengths = Block().to(DEVICE), torch.tensor([5, 24], device=DEVICE)
    shapes = {"x": {1: torch.export.Dim("n", min=2, max=4096)}, "lengths": None}
    return block, torch.export.export(block, (normal(B, 24, 32), lengths), dynamic_shapes=shapes, strict=strict)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    """One node for any length; saved, loaded and decomposed it computes the same."""
    torch._dynamo.reset()
    block, program = exported(strict)
    nodes = [n.target for n in program.graph.nodes if n.op == "call_function" and "tilewise" in str(n.target)]
    assert nodes == [torch.ops.tilewise.attention.default]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x, lengths = normal(B, 71, 32, seed=3), torch.tensor([71, 2], device=DEVICE)
    for again in (torch.export.load(file), program.run_decompositions()):
        torch.testing.assert_close(again.module()(x, lengths), block(x, lengths))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_ahead_of_time_inductor(tmp_path):
    block, program = exported()
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for n in (24, 71):
            x, lengths = normal(B, n, 32, seed=n), torch.tensor([n, 2], device=DEVICE)
            torch.testing.assert_close(loaded(x, lengths), block(x, lengths))


def test_make_fx():
    """Without torch.compile, tracing sees the operation too, in a gradient's trace as well."""
    q, k, v = inputs(9)

    def loss(q):
        return tw.attention(q.requires_grad_(), k, v, causal=True).sin().sum()

    def gradient(q):
        return torch.autograd.grad(loss(q), q)[0]

    for mode in ("real", "symbolic"):
        graph = make_fx(gradient, tracing_mode=mode, _allow_non_fake_inputs=True)(q)
        names = [str(n.target) for n in graph.graph.nodes if "tilewise" in str(n.target)]
        assert names == ["tilewise.attention.default", "tilewise.attention_backward.default"]
        torch.testing.assert_close(graph(2 * q), gradient(2 * q))


def test_opcheck_of_the_backward_and_of_statistics():
    assert {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tilewise::")} == {
        "tilewise::attention", "tilewise::attention_backward", "tilewise::attention_with_statistics"}  # first: test_ops.py
    from tilewise.problem import make
    q, k, v = inputs(9)
    table = normal(H, 17).requires_grad_()
    problem, x = make(q, k, v, bias=normal(H, 1, 9), sinks=normal(H), causal=True, dropout_p=0.1, rng=tw.Rng(1),
                      score_mod=lambda s, b, h, i, j: s + table[h, i - j + 8])
    x = x._replace(captured=[t.detach() for t in x.captured])
    out, lse = torch.ops.tilewise.attention(*x, *problem.settings, "auto")
    torch.library.opcheck(torch.ops.tilewise.attention_backward.default,
                          (normal(*out.shape), normal(*lse.shape), out, lse, True, True, [True], *x, *problem.settings, "auto"),
                          test_utils=("test_schema", "test_faketensor"))
    problem, x = make(q, k, v, causal=True, return_stats=("max_score", "key_mass"))
    torch.library.opcheck(torch.ops.tilewise.attention_with_statistics.default, (*x, *problem.settings, "auto"))


# ---- tensors without values -----------------------------------------------------------------------------------------

OPTIONS = {
    "plain": lambda device: {},
    "rich": lambda device: dict(causal=True, mask=tw.window(5, None) | tw.prefix(torch.tensor([3, 4], device=device)),
                                score_mod=[tw.softcap(3.0), tw.alibi(torch.ones(H, device=device))], dropout_p=0.1,
                                bias=torch.zeros(H, 1, 9, device=device), sinks=torch.zeros(H, device=device)),
    "function": lambda device: dict(mask=lambda b, h, i, j: (i - j) % 3 > 0),
    "documents": lambda device: dict(mask=tw.documents(torch.zeros(7, dtype=torch.int64, device=device),
                                                       torch.zeros(9, dtype=torch.int64, device=device))),
    "heads first": lambda device: dict(layout="bhsd"),
    "tree": lambda device: dict(mask=tw.tree(torch.arange(7, device=device) - 1)),
}


def results(options, device, dtype, backend="auto"):
    x = [torch.zeros(shape, device=device, dtype=dtype).requires_grad_()
         for shape in ((B, 7, H, D), (B, 9, H_KV, D), (B, 9, H_KV, D_V))]
    options = OPTIONS[options](device)
    if options.get("layout") == "bhsd":
        x = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in x]
    out, lse = tw.attention(*x, **options, return_lse=True, backend=backend)
    return out, lse, *torch.autograd.grad(out.sum() + lse.sum(), x)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("options", OPTIONS)
def test_tensors_without_values(options, kind):
    """Shapes, dtypes and memory order are those of real results."""
    for dtype in (torch.float32, torch.float16) if options == "plain" else (torch.float32,):
        backend = "auto" if options in ("plain", "heads first") else "tiled"  # whose gradients have an order of their own
        real = results(options, DEVICE, dtype, backend)
        if kind == "fake":
            with FakeTensorMode():
                found = results(options, DEVICE, dtype)
        else:
            found = results(options, "meta", dtype)
        for i, (a, b) in enumerate(zip(found, real, strict=True)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.stride() == b.stride() or (i >= 2 and backend == "tiled")
            assert a.device.type == ("meta" if kind == "meta" else DEVICE)


@pytest.mark.parametrize("device", ["meta", DEVICE])
def test_packed_sequences_without_values(device):
    with FakeTensorMode():
        x = [torch.empty(20, heads, D, device=device).requires_grad_() for heads in (H, H_KV, H_KV)]
        ends = torch.empty(4, dtype=torch.int32, device=device)
        out, lse = tw.attention_varlen(*x, ends, max_seqlen_q=9, causal=True, return_lse=True)
        out.sum().backward()
    assert (out.shape, lse.shape, x[1].grad.shape) == ((20, H, D), (H, 20), (20, H_KV, D))


# ---- dispatch modes and checkpointing -------------------------------------------------------------------------------

class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operation():
    """As it sees torch's own: by name, not the kernels' inner work."""
    q, k, v = inputs(9)
    q.requires_grad_()
    with Seen() as seen:
        out = tw.attention(q, k, v)
        ours = torch.autograd.grad(out.sum(), q)[0]
    assert [name for name in seen.names if "tilewise" in name] == ["tilewise.attention.default",
                                                                   "tilewise.attention_backward.default"]
    torch.testing.assert_close(ours, torch.autograd.grad(tw.attention(q, k, v).sum(), q)[0])


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_dropout_again(reentrant, backend):
    q, k, v = inputs()
    q.requires_grad_()

    def attend(q):
        torch.rand(3, device=DEVICE)                        # the generator is not where the call found it
        return tw.attention(q, k, v, causal=True, dropout_p=0.4, backend=backend)

    def gradient(function):
        torch.manual_seed(0)
        out = function(q)
        torch.manual_seed(1)
        return torch.autograd.grad(out.sin().sum(), q)[0] if not reentrant else _backward(out, q)

    expected = gradient(attend)
    assert torch.equal(gradient(lambda q: checkpoint(attend, q, use_reentrant=reentrant)), expected)
    forgetful = gradient(lambda q: checkpoint(attend, q, use_reentrant=reentrant, preserve_rng_state=False))
    assert not torch.equal(forgetful, expected)


def _backward(out, q):
    """Reentrant checkpoints know backward alone."""
    q.grad = None
    out.sin().sum().backward()
    return q.grad


def test_selective_checkpointing_keeps_attention():
    """A policy that saves the operation by its name: backward does not compute it again."""
    q, k, v = inputs(9)
    q.requires_grad_()
    attention = torch.ops.tilewise.attention.default

    def contexts():
        return create_selective_checkpoint_contexts(
            lambda _, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if op == attention else CheckpointPolicy.PREFER_RECOMPUTE)

    attend = lambda q: tw.attention(q.sin(), k, v, causal=True, dropout_p=0.3).sin().sum()  # noqa: E731
    torch.manual_seed(0)
    expected = torch.autograd.grad(attend(q), q)[0]
    torch.manual_seed(0)
    total = checkpoint(attend, q, use_reentrant=False, context_fn=contexts)
    with Seen() as seen:
        found = torch.autograd.grad(total, q)[0]
    torch.testing.assert_close(found, expected)
    assert "aten.sin.default" in seen.names
    assert str(attention) not in seen.names


# ---- torch.func -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", NATIVE)
def test_vmap(backend):
    """Over a further batch dimension wherever it stands, over sequences, over what masks capture, with shared keys."""
    q, k, v = inputs()
    lengths = torch.tensor([[3, 24], [7, 1], [24, 9]], device=DEVICE)
    several = torch.stack([q, q.sin(), q.cos()])

    def attend(q, k, v, lengths=None):
        mask = None if lengths is None else tw.key_lengths(lengths)
        return tw.attention(q, k, v, causal=True, mask=mask, score_mod=tw.softcap(3.0), backend=backend)

    vmap, close = torch.func.vmap, torch.testing.assert_close
    close(vmap(attend, (0, None, None, 0))(several, k, v, lengths),
          torch.stack([attend(x, k, v, n) for x, n in zip(several, lengths, strict=True)]))
    close(vmap(attend, (3, None, None), out_dims=1)(several.movedim(0, 3), k, v),
          torch.stack([attend(x, k, v) for x in several], 1))
    one_sequence = vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0])
    close(one_sequence(q, k, v), attend(q, k, v))
    of_key_heads = vmap(lambda q, k, v: attend(q, k[:, :, None], v[:, :, None]), (2, 2, 2), out_dims=2)
    close(of_key_heads(q.unflatten(2, (H_KV, -1)), k, v).flatten(2, 3), attend(q, k, v))
    close(vmap(vmap(lambda q: attend(q, k, v)))(several[None])[0], vmap(lambda q: attend(q, k, v))(several))


@pytest.mark.parametrize("backend", NATIVE)
def test_vjp_and_gradients_of_each_example(backend):
    q, k, v = inputs(12)
    bias, dout = normal(H, 12, 12), normal(B, 12, H, D_V, seed=5)

    def attend(q, k, v, bias, backend=backend):
        return tw.attention(q, k, v, causal=True, bias=bias, backend=backend)

    close = torch.testing.assert_close
    _, pull = torch.func.vjp(attend, q, k, v, bias)
    _, pull_reference = torch.func.vjp(lambda *x: attend(*x, backend="reference"), q, k, v, bias)
    for a, b in zip(pull(dout), pull_reference(dout), strict=True):
        close(a, b, rtol=1e-4, atol=1e-5)
    of_one = torch.func.grad(lambda bias, q, k, v: attend(q[None], k[None], v[None], bias).sin().sum())
    each = torch.func.vmap(of_one, (None, 0, 0, 0))(bias, q, k, v)
    assert each.shape == (B, *bias.shape)
    close(each.sum(0), torch.func.grad(lambda bias: attend(q, k, v, bias).sin().sum())(bias), rtol=1e-4, atol=1e-5)
    rows = torch.func.jacrev(lambda q: attend(q, k, v, bias)[0, :2, 0, 0])(q)
    close(rows[1], torch.func.grad(lambda q: attend(q, k, v, bias)[0, 1, 0, 0])(q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", NATIVE)
def test_gradient_of_a_captured_table_under_vmap(backend):
    q, k, v = inputs(12)
    tables = normal(3, H, 23)

    def loss(table, backend=backend):
        return tw.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, i - j + 11], backend=backend).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss))(tables)
    for a, table in zip(each, tables, strict=True):
        torch.testing.assert_close(a, torch.func.grad(lambda t: loss(t, "reference"))(table), rtol=1e-4, atol=1e-4)


# ---- copies and files -----------------------------------------------------------------------------------------------

def near(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx).abs() < 5


def of_ids():
    ids = torch.arange(16) // 5
    return lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]


MASKS = {
    "causal": tw.causal(), "window": tw.window(3, 1), "chunked": tw.chunked(4), "prefix": tw.prefix(torch.tensor([3, 4])),
    "documents": tw.documents(torch.arange(16) // 5), "tree": tw.tree(torch.arange(16) - 1),
    "function": tw.mask_mod(near), "closure": tw.mask_mod(of_ids()),
    "block": tw.block_mask(tw.causal() & near, 16, 16, block_size=4),
    "combined": (tw.causal() | tw.key_lengths(torch.tensor([3, 4]))) & ~tw.window(1, 1)}


def through_a_file(x, **options):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, **options)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        "torch.save": lambda x: through_a_file(x, weights_only=False)}


@pytest.mark.parametrize("way", WAYS)
def test_masks_and_score_functions_travel(way):
    """With all that they captured; functions as graphs, so that nobody needs to import them. Kernels are found again."""
    from tilewise.problem import make
    q = normal(2, 16, 2, 8).cpu()
    for mask in MASKS.values():
        again = WAYS[way](mask)
        assert (type(again), repr(again)) == (type(mask), repr(mask))
        assert torch.equal(again.dense(2, 2, 16, 16), mask.dense(2, 2, 16, 16))
        assert make(q, q, q, mask=again)[0].program == make(q, q, q, mask=mask)[0].program
    for mod in (tw.softcap(3.0), tw.alibi(torch.rand(2)), tw.score_mod(lambda s, b, h, i, j: s - (i - j))):
        found, expected = (tw.attention(q, q, q, score_mod=m, backend="tiled") for m in (WAYS[way](mod), mod))
        assert torch.equal(found, expected)
    assert WAYS[way](tw.Rng(3, 1)) == tw.Rng(3, 1)
    rotary = tw.Rotary.of(8, 16)
    assert torch.equal(WAYS[way](rotary).cos, rotary.cos)


@pytest.mark.parametrize("v_in_k", [False, True], ids=["values", "values in keys"])
@pytest.mark.parametrize("kind", ["slots", "pages"])
@pytest.mark.parametrize("way", [*WAYS, "weights_only"])
def test_caches_travel(way, kind, v_in_k):
    """A copy goes on by itself, and where values are a part of the keys, they still are."""
    options = dict(dtype=torch.float32, v_in_k=v_in_k, head_dim_v=6 if v_in_k else 8)
    cache = tw.KVCache(2, 20, 2, 8, **options) if kind == "slots" else tw.PagedKVCache(16, 4, 2, 8, max_sequences=3, **options)
    slots = {} if kind == "slots" else dict(cache_batch_idx=[cache.new(), cache.new()])

    def step(cache, n, seed):
        q, k = normal(2, n, 4, 8, seed=seed).cpu(), normal(2, n, 2, 8, seed=seed + 1).cpu()
        return tw.attention_with_kv_cache(q, cache, k, None if v_in_k else k, causal=True, backend="tiled", **slots)

    step(cache, 5, 0)
    if way == "weights_only":
        with torch.serialization.safe_globals([tw.KVCache, tw.PagedKVCache, PageBook]):
            again = through_a_file(cache, weights_only=True)
    else:
        again = WAYS[way](cache)
    expected = step(cache, 1, 2)
    assert again.lengths.tolist()[:2] == [5, 5]
    assert torch.equal(step(again, 1, 2), expected)
    assert (again.v.data_ptr() == again.k.data_ptr()) == v_in_k


def test_dropout_is_drawn_inside_compiled_code():
    """From the default generator, without a graph break: what eager draws."""
    q = torch.randn(1, 20, 2, 8)
    attend = lambda q: tw.attention(q, q, q, causal=True, dropout_p=0.5)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = []
    for function in (attend, compiled):
        torch.manual_seed(3)
        found.append((function(q), function(q)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(*found[1])
