"""Derivatives of every order and mode on the `tiled` backend, in fp64."""
import pytest
import torch

import tilewise as tw


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch):
    from tilewise.backends.tiled import walk as tiled
    monkeypatch.setattr(tiled, "LONGEST_TILE", 4)
    monkeypatch.setattr(tiled, "SHORTEST_TILE", 2)


def inputs(*, bias=False, sinks=False, table=False):
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 5, 2, 3), (1, 6, 1, 3), (1, 6, 1, 2), *([(2, 5, 6)] if bias else []), *([(2,)] if sinks else []),
              *([(2, 10)] if table else [])]
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)


def function(names=(), backend="tiled", **options):
    def attend(q, k, v, *rest):
        named = dict(zip(names, rest, strict=True))
        if "table" in named:
            named["score_mod"] = of_distance(named.pop("table"))
        return tw.attention(q, k, v, **named, **options, return_lse=True, backend=backend)
    return attend


def of_distance(table):
    """Uses the table in two ways: by distance, and by head and query."""
    return lambda s, b, h, q, k: s * torch.sigmoid(table[h, q - k + 5]) + table[h, q] ** 2


PLAIN = ((), {})
RICH = (("bias", "sinks"), dict(causal=True, mask=tw.window(4, None), score_mod=[tw.softcap(3.0), tw.alibi(torch.rand(2))],
                                dropout_p=0.2, rng=tw.Rng(1)))


TABLE = (("table",), dict(mask=lambda b, h, q, k: (q + k) % 3 > 0, dropout_p=0.2, rng=tw.Rng(1)))


@pytest.mark.parametrize("names, options", [PLAIN, RICH, TABLE], ids=["plain", "rich", "table"])
def test_first_and_second_order(names, options):
    attend, x = function(names, **options), inputs(bias="bias" in names, sinks="sinks" in names, table="table" in names)
    assert torch.autograd.gradcheck(attend, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("names, options", [PLAIN, RICH, TABLE], ids=["plain", "rich", "table"])
def test_third_order_equals_the_reference(names, options):
    x = inputs(bias="bias" in names, sinks="sinks" in names, table="table" in names)

    def third(backend):
        total = sum(y.sin().sum() for y in function(names, backend, **options)(*x))
        for _ in range(2):
            total = sum(g.sin().sum() for g in torch.autograd.grad(total, x, create_graph=True))
        return torch.autograd.grad(total, x)

    for a, b in zip(third("tiled"), third("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_func_transforms():
    q, k, v = (x.detach() for x in inputs())

    def loss(q, backend="tiled"):
        return tw.attention(q, k, v, causal=True, backend=backend).sin().sum()

    reference = lambda q: loss(q, "reference")  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(q), torch.func.grad(reference)(q))
    torch.testing.assert_close(torch.func.hessian(loss)(q), torch.func.hessian(reference)(q))
    several = torch.stack([q, 2 * q])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(several), torch.stack([torch.func.grad(reference)(x)
                                                                                            for x in several]))
    torch.testing.assert_close(torch.func.jvp(loss, (q,), (q,)), torch.func.jvp(reference, (q,), (q,)))


def test_rows_without_keys_have_zero_derivatives_at_every_order():
    q, k, v = inputs()
    out, lse = tw.attention(q, k, v, mask=~tw.full(), return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    first = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), (q, k, v), allow_unused=True)
    for g in (*first, *second):
        assert g is None or (g == 0).all()
