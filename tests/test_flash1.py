"""FlashAttention as first published: Algorithms 1, 2, 4 and 5 in torch, and in Triton with its interpreter or a GPU."""

import pytest
import torch
from support.backends import DEVICE, GPU, INTERPRETING

import tilewise as tw
from tilewise.baselines import flash1
from tilewise.baselines.flash1 import algorithms, blocks
from tilewise.bench import tolerance
from tilewise.bench.cases import CASES, draw, named

BACKENDS = ["triton"] if INTERPRETING else ["torch", "triton"] if GPU else ["torch"]
SIZES = {"torch": (16, 24), "triton": (16, 32)}
SUPPORTED = {"causal", "mask", "dropout_p", "rng", "scale"}
HALVES = ("full ragged", "causal more queries", "dropout", "head dim 40")
INTERPRETED = ("full ragged", "causal more queries", "key lengths", "three intervals", "dropout", "scores of 100",
               "values narrower", "head dim 40", "no keys no sink", "no queries", "empty batch",
               "function of sequences and heads", "blocks", "blocks butterfly")
# one visible key: the scores' gradients, P (dP - D), are 0, and with D = rowsum(dO O) come out as the rounding of dP
CANCELLING = "causal window"


def supported(case):
    call = draw(case, torch.float32)
    return case.packed is None and case.heads == case.kv_heads and set(call.options) <= SUPPORTED


TABLE = [(case, torch.float32) for case in CASES if supported(case) and case.name != CANCELLING and (
    not INTERPRETING or case.name in INTERPRETED)]
TABLE += [(case, dtype) for case, _ in TABLE if case.name in HALVES for dtype in (torch.bfloat16, torch.float16)]


def options_of(call):
    """The arguments of `flash1.attention`, which has no `causal`."""
    options = dict(call.options, layout=call.case.layout)
    if options.pop("causal", False):
        options["mask"] = tw.causal() & options["mask"] if "mask" in options else tw.causal()
    return options


def results(call, compute, dtype=None):
    """out, lse and gradients; lse has no gradient, as m and l have none."""
    copies = {name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for name, x in call.differentiable.items()}
    out, lse = compute(copies)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.device, out.dtype)
    found = torch.autograd.grad(out, list(copies.values()), dout)
    gradients = {f"d{name}": x for name, x in zip(copies, found, strict=True)}
    return tolerance.Results(dict(out=out.detach(), lse=lse.detach()) | gradients)


def as_first_published(call, backend, **sizes):
    def compute(copies):
        out, l, m = flash1.attention(*copies.values(), **options_of(call), return_l_m=True, backend=backend, **sizes)
        return out, m + torch.log(l)
    return compute


def by_reference(call):
    return lambda copies: call.run(copies, "reference")


def wrong(call, found):
    truth, standard = results(call, by_reference(call), torch.float64), results(call, by_reference(call))
    return [verdict for verdict in tolerance.judge(call, found, truth, standard) if not verdict.ok]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case, dtype", TABLE, ids=lambda x: str(x).removeprefix("torch."))
def test_within_tolerance(case, dtype, backend, poisoned):
    call = draw(case, dtype, DEVICE)
    assert not wrong(call, results(call, as_first_published(call, backend, block_sizes=SIZES[backend])))


@pytest.mark.parametrize("sizes", [dict(block_sizes=(16, 128)), dict(block_sizes=(64, 32)), dict(sram=8192), {}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_block_shape(backend, sizes, poisoned):
    call = draw(named("prefix or window") if backend == "torch" else named("causal more queries"), torch.float32, DEVICE)
    assert not wrong(call, results(call, as_first_published(call, backend, **sizes)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_in_the_paper_is_refused(backend):
    for case in CASES:
        if not supported(case):
            call = draw(case, torch.float32, DEVICE)
            with pytest.raises((TypeError, ValueError, NotImplementedError)):
                flash1.attention(call.q, call.k, call.v, **options_of(call), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_a_mask_hides_are_not_read(backend):
    """Algorithm 5, line 9: NaN in a skipped block stays there."""
    layout = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool, device=DEVICE)
    mask = tw.block_mask(layout, block_size=(16, 32))
    q, k, v = (torch.randn(1, n, 2, 16, device=DEVICE) for n in (48, 128, 128))
    poison = torch.arange(128, device=DEVICE) // 32 == 1
    spoiled = [torch.where(poison[:, None, None], torch.nan, x).requires_grad_() for x in (k, v)]
    out = flash1.attention(q, *spoiled, mask=mask, block_sizes=(16, 32), backend=backend)
    torch.testing.assert_close(out, flash1.attention(q, k, v, mask=mask, block_sizes=(16, 32), backend=backend), rtol=0, atol=0)
    for gradient in torch.autograd.grad(out.sum(), spoiled):
        assert gradient.isfinite().all()
        assert (gradient[:, poison] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_statistics(backend):
    q, k, v = torch.randn(3, 2, 40, 2, 16, device=DEVICE).unbind()
    out, l, m = flash1.attention(q, k, v, return_l_m=True, backend=backend)
    assert not l.requires_grad
    s = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    torch.testing.assert_close(m, s.amax(-1))
    torch.testing.assert_close(l, torch.exp(s - m[..., None]).sum(-1))
    other = flash1.attention(*(x.transpose(1, 2) for x in (q, k, v)), layout="bhsd", backend=backend)
    assert torch.equal(other.transpose(1, 2), out)


@pytest.mark.skipif(INTERPRETING, reason="of the algorithms in torch")
@pytest.mark.parametrize("options", [{}, dict(mask=tw.causal() & tw.window(20, None)), dict(dropout_p=0.3, rng=tw.Rng(5))],
                         ids=str)
def test_theorem_1(options):
    """After block j, O is exact attention over the first j blocks of keys, and m + log l its log-sum-exp."""
    q, k, v = (torch.randn(2, n, 2, 16, dtype=torch.float64) for n in (30, 50, 50))
    Bc, found = 8, 0
    for j, (O, l, m) in enumerate(flash1.after_each_block(q, k, v, block_sizes=(7, Bc), **options)):
        first = tw.prefix(torch.full((2,), min(j * Bc, 50), dtype=torch.int32))
        mask = first & options["mask"] if "mask" in options else first
        out, lse = tw.attention(q, k, v, **(options | dict(mask=mask)), return_lse=True, backend="reference")
        torch.testing.assert_close(O.transpose(1, 2), out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(m + torch.log(l), lse, rtol=1e-12, atol=1e-12)
        found += 1
    assert found == 8                                       # 0, then ceil(50 / 8) blocks


@pytest.mark.skipif(INTERPRETING, reason="of the algorithms in torch")
@pytest.mark.parametrize("sparse", [False, True])
def test_blocks_are_read_as_often_as_the_paper_says(sparse, monkeypatch):
    """K and V once; Q, O, l, m at every step that is not masked away, and in the backward dO and dQ too."""
    layout = torch.rand(4, 3) < 0.6
    steps = int(layout.sum()) if sparse else 12
    reads, writes, read, write = [], [], algorithms.read, algorithms.write
    monkeypatch.setattr(algorithms, "read", lambda X, rows: reads.append(X) or read(X, rows))
    monkeypatch.setattr(algorithms, "write", lambda X, rows, X_i: writes.append(X) or write(X, rows, X_i))
    q, k, v = (torch.randn(1, n, 1, 8, requires_grad=True) for n in (64, 48, 48))
    out = flash1.attention(q, k, v, mask=tw.block_mask(layout, block_size=16) if sparse else None, block_sizes=(16, 16))
    assert (len(reads), len(writes)) == (2 * 3 + 4 * steps, 3 * steps)
    reads.clear(), writes.clear()
    out.sum().backward()
    assert (len(reads), len(writes)) == (2 * 3 + 6 * steps, steps + 2 * 3)


@pytest.mark.skipif(INTERPRETING, reason="of the algorithms in torch")
@pytest.mark.parametrize("name", ["three intervals", "blocks butterfly", "key lengths"])
def test_in_fp64_all_blocks_give_the_same(name):
    call = draw(named(name), torch.float64, DEVICE)
    truth = results(call, by_reference(call)).tensors
    for sizes in ((1, 200), (200, 5), (7, 24)):
        for key, x in results(call, as_first_published(call, "torch", block_sizes=sizes)).tensors.items():
            torch.testing.assert_close(x, truth[key], rtol=1e-11, atol=1e-11)


def test_block_sizes_of_the_paper():
    """192 KB of an A100 in 16 bits; the CUDA kernels' 16 x 256."""
    assert blocks.of_memory(192 * 1024 // 2, 64) == (64, 384)
    assert blocks.of_memory(192 * 1024 // 2, 128) == (128, 192)
    assert blocks.of_kernels(blocks.of_memory(192 * 1024 // 2, 64)) == (64, 256)
    assert (flash1.published(64), flash1.published(65)) == ((16, 256), (16, 128))


@pytest.mark.parametrize("wrong, error, message", [
    (dict(block_sizes=(16, 0)), ValueError, r"block_sizes: expected \(queries, keys\), two integers >= 1, got \(16, 0\)"),
    (dict(block_sizes=16), ValueError, "block_sizes: .* got 16"),
    (dict(block_sizes=(16, 32), sram=99), ValueError, "sram: expected None with block_sizes"),
    (dict(sram=0), ValueError, "sram: expected None or a number of elements >= 1, got 0"),
    (dict(backend="cuda"), ValueError, "backend: expected one of torch, triton, got 'cuda'"),
    (dict(block_sizes=(16, 48), backend="triton"), ValueError, "block_sizes: expected powers of two"),
    (dict(dtype=torch.float64, backend="triton"), NotImplementedError, "fp64 inputs"),
    (dict(dim=257, backend="triton"), NotImplementedError, "head dims over 256"),
    (dict(kv_heads=1), NotImplementedError, "1 key heads for 2 query heads"),
])
def test_wrong_arguments(wrong, error, message):
    if wrong.get("backend") == "triton" and "triton" not in BACKENDS:
        pytest.skip("no GPU and not interpreting")
    dtype, dim, kv_heads = wrong.pop("dtype", torch.float32), wrong.pop("dim", 16), wrong.pop("kv_heads", 2)
    q, k = (torch.zeros(1, 4, heads, dim, dtype=dtype, device=DEVICE) for heads in (2, kv_heads))
    with pytest.raises(error, match=message):
        flash1.attention(q, k, k, **wrong)


@pytest.mark.skipif(INTERPRETING, reason="Triton cannot compile while it interprets")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_compile_without_spills(arch):
    pytest.importorskip("triton")
    from tilewise.baselines.flash1 import aot
    from tilewise.inspect import build, examine
    found = []
    for case in aot.cases(arch, torch.bfloat16, 64, mask=tw.causal()):
        report = examine(build(case), case)
        assert report.spills == 0, case.name
        assert report.shared_memory <= report.shared_memory_limit
        assert report.tensor_instructions
        found.append(case.direction)
    assert found == ["forward", "backward"]
