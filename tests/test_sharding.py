"""Attention on DTensors: every device computes its part of what one device would, without a word to the others.

Nothing is sent, so one process plays all devices in turn, in a process group that cannot send.
"""
import pytest
import torch
import torch.distributed as dist
from support.backends import AVAILABLE
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import tilewise as tw
from tilewise.compat import sdpa

pytestmark = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
B, H, H_KV, N, D = 3, 4, 2, 9, 8
LENGTHS = torch.tensor([3, 9, 5])
BATCH, SEQUENCE, HEADS = Shard(0), Shard(1), Shard(2)      # of [B, N, H, D]


@pytest.fixture(params=[0, 1, 2, 3])
def rank(request):
    dist.init_process_group("fake", rank=request.param, world_size=4, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def inputs(kv_heads=H_KV):
    g = torch.Generator().manual_seed(0)
    shapes = (B, N, H, D), (B, N, kv_heads, D), (B, N, kv_heads, D), (B, H, N, N), (H,), (B, H)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def attend(q, k, v, bias, sinks, slopes, **options):
    return tw.attention(q, k, v, causal=True, mask=tw.key_lengths(LENGTHS), score_mod=[tw.softcap(3.0), tw.alibi(slopes)],
                        bias=bias, sinks=sinks, return_lse=True, **options)


def mesh_of(rank, *shape):
    """Named by the rank: DTensor remembers what it did on an equal mesh, when this process was another rank."""
    return init_device_mesh("cpu", shape, mesh_dim_names=[f"{i} of {rank}" for i in range(len(shape))])


def part(x, mesh, placements):
    """This rank's part of a tensor that every rank has, without sending anything."""
    for dim, p in enumerate(placements):
        if isinstance(p, Shard):
            chunks, mine = x.chunk(mesh.size(dim), p.dim), mesh.get_coordinate()[dim]
            x = chunks[mine] if mine < len(chunks) else x.narrow(p.dim, 0, 0)
    return x


def distributed(x, mesh, placements):
    local = part(x, mesh, placements).clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=x.shape, stride=x.stride()).requires_grad_()


MESHES = {"batch": ((4,), (BATCH,)), "heads": ((2, 2), (Replicate(), HEADS)), "both": ((2, 2), (BATCH, HEADS))}


@pytest.mark.parametrize("name", MESHES)
def test_each_device_computes_its_part(name, rank):
    shape, placements = MESHES[name]
    mesh = mesh_of(rank, *shape)
    tensors = [x.requires_grad_() for x in inputs()]
    options = dict(dropout_p=0.3, rng=tw.Rng(1)) if name == "batch" else {}
    expected = attend(*tensors, **options)
    expected_gradients = torch.autograd.grad(expected[0].sin().sum() + expected[1].sum(), tensors)

    of_bias = [{BATCH: Shard(0), HEADS: Shard(1)}.get(p, p) for p in placements]
    everywhere = [Replicate()] * len(placements)
    placed = [placements] * 3 + [of_bias, everywhere, everywhere]
    mine = [distributed(x.detach(), mesh, p) for x, p in zip(tensors, placed, strict=True)]
    with CommDebugMode() as sent:
        out, lse = attend(*mine, **options)
        gradients = torch.autograd.grad(out.to_local().sin().sum() + lse.to_local().sum(), mine)
    assert sent.get_total_counts() == 0
    for x, e, of_x in ((out, expected[0], placements), (lse, expected[1], of_bias)):
        assert (x.shape, x.stride(), list(x.placements)) == (e.shape, e.stride(), list(of_x))
        torch.testing.assert_close(x.to_local(), part(e, mesh, of_x))
    for g, e, p in zip(gradients[:4], expected_gradients, placed, strict=False):
        assert list(g.placements) == list(p)
        torch.testing.assert_close(g.to_local(), part(e, mesh, p))
    for i, axes in ((4, (None, 0)), (5, (0, 1))):                       # sinks and slopes: shares of a sum
        assert list(gradients[i].placements) == [p if p == Replicate() else Partial() for p in placements]
        own = [{BATCH: axes[0], HEADS: axes[1]}.get(p) for p in placements]
        if None not in own or name == "heads":                          # nobody else's sequences reach these entries
            held = [Replicate() if axis is None else Shard(axis) for axis in own]
            torch.testing.assert_close(part(gradients[i].to_local(), mesh, held), part(expected_gradients[i], mesh, held))


@pytest.mark.parametrize("rank", [1], indirect=True)
def test_one_key_head_for_heads_on_several_devices(rank):
    mesh = mesh_of(rank, 4)
    q, k, v, *_ = inputs(kv_heads=1)
    shared = [distributed(x, mesh, [Replicate()]) for x in (k, v)]
    out = tw.attention(distributed(q, mesh, [HEADS]), *shared, causal=True)
    torch.testing.assert_close(out.to_local(), part(tw.attention(q, k, v, causal=True), mesh, [HEADS]))
    assert all(list(g.placements) == [Partial()] for g in torch.autograd.grad(out.to_local().sum(), shared))


@pytest.mark.parametrize("rank", [2], indirect=True)
def test_through_torch(rank):
    """Compiled, and as torch's own function."""
    torch._dynamo.reset()
    mesh = mesh_of(rank, 2, 2)
    q, k, v = (distributed(x, mesh, [BATCH, HEADS]) for x in inputs()[:3])
    compiled = torch.compile(lambda q, k, v: tw.attention(q, k, v, causal=True), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, expected = (f(q, k, v) for f in (compiled, lambda q, k, v: tw.attention(q, k, v, causal=True)))
    assert ours.placements == expected.placements
    torch.testing.assert_close(ours.to_local(), expected.to_local())
    with sdpa():
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True,
                                                               enable_gqa=True)
    torch.testing.assert_close(out.to_local().transpose(1, 2), expected.to_local())


@pytest.mark.parametrize("rank", [0], indirect=True)
def test_refusals(rank):
    mesh = mesh_of(rank, 2, 2)
    q, k, v, bias, _, slopes = inputs()

    def refused(error, message, placements=(BATCH, HEADS), of_q=None, **options):
        qkv = [distributed(x, mesh, of_q or placements) if i == 0 else distributed(x, mesh, placements)
               for i, x in enumerate((q, k, v))]
        with pytest.raises(error, match=message):
            tw.attention(*qkv, **options)

    whole = [Replicate(), Replicate()]
    refused(ValueError, "q: expected .* batch or heads, or replicated, got one sharded over the sequence", (BATCH, SEQUENCE))
    refused(ValueError, "q: expected .* got one sharded over head_dim", (Shard(3), Replicate()))
    refused(ValueError, "k: expected placements .* or replicated", (Replicate(), BATCH), of_q=(BATCH, HEADS))
    refused(ValueError, "k: expected a number of heads that the 4 devices share evenly, got 2", (HEADS, HEADS))
    refused(TypeError, "bias: expected a DTensor like q, which adds up", bias=bias.clone().requires_grad_())
    refused(NotImplementedError, "dropout_p: expected 0 with heads on several devices", dropout_p=0.1)
    refused(NotImplementedError, "use h only to index tensors where heads", mask=lambda b, h, i, j: i - j < 3 * h)
    refused(NotImplementedError, "use b only to index tensors where the batch", mask=lambda b, h, i, j: i - j < 3 * b)
    with pytest.raises(TypeError, match="k: expected a DTensor like the others"):
        tw.attention(distributed(q, mesh, whole), k, v)
    replicated = [distributed(x, mesh, whole) for x in (q, k, v)]       # where nothing is split everything is allowed
    out = tw.attention(*replicated, mask=lambda b, h, i, j: i - j < 3 * h, bias=bias, score_mod=tw.alibi(slopes))
    torch.testing.assert_close(out.to_local(), tw.attention(q, k, v, mask=lambda b, h, i, j: i - j < 3 * h, bias=bias,
                                                            score_mod=tw.alibi(slopes)))
