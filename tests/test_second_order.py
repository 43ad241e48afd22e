"""Native backends' derivatives: every composition of second order from a backend's four operations, in fp64."""
import pytest
import torch
from support.backends import AVAILABLE
from test_derivatives import PLAIN, RICH, function, inputs
from torch.autograd import forward_ad, functional

import tilewise as tw
from tilewise import backends
from tilewise.backends.cpu import compiler
from tilewise.derivatives import Call
from tilewise.problem import make


@pytest.fixture(autouse=True)
def algebra(monkeypatch):
    monkeypatch.setitem(backends.MODULES, "algebra", "support.algebra")


BUILT_ONCE = dict(causal=True, score_mod=tw.softcap(3.0), dropout_p=0.2, rng=tw.Rng(1))      # as in test_tangent_kernels
CASES = pytest.mark.parametrize("names, options", [PLAIN, RICH], ids=["plain", "rich"])


def arguments(names):
    return inputs(bias="bias" in names, sinks="sinks" in names)


@CASES
def test_every_composition_by_differences(names, options):
    attend, x = function(names, "algebra", **options), arguments(names)
    assert torch.autograd.gradcheck(attend, x, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, x, check_fwd_over_rev=True, fast_mode=True)


def losses(names, options, backend, dtype=torch.float64):
    """A loss that is not linear in out and lse, of the tensors given; and those."""
    attend = function(names, backend, **options)

    def loss(*x):
        out, lse = attend(*x)
        return out.sin().sum() + lse.cos().sum()
    return loss, [x.detach().to(dtype) for x in arguments(names)]


TRANSFORMS = {
    "grad": lambda f, x, u: torch.func.grad(f, argnums=tuple(range(len(x))))(*x),
    "vjp": lambda f, x, u: torch.func.vjp(f, *x)[1](x[0].new_tensor(2.0)),
    "jvp": lambda f, x, u: torch.func.jvp(f, x, u),
    "jacfwd": lambda f, x, u: torch.func.jacfwd(f)(*x),
    "jacrev": lambda f, x, u: torch.func.jacrev(f)(*x),
    "hessian": lambda f, x, u: torch.func.hessian(lambda v: f(*x[:2], v, *x[3:]))(x[2]),
    "forward over reverse": lambda f, x, u: torch.func.jvp(torch.func.grad(f, argnums=tuple(range(len(x)))), x, u),
    "reverse over forward": lambda f, x, u: torch.func.grad(lambda *x: torch.func.jvp(f, x, u)[1], tuple(range(len(x))))(*x),
    "reverse over reverse": lambda f, x, u: torch.func.vjp(torch.func.grad(f, tuple(range(len(x)))), *x)[1](tuple(u)),
    "jacrev of jacrev": lambda f, x, u: torch.func.jacrev(torch.func.jacrev(lambda v: f(*x[:2], v, *x[3:])))(x[2]),
    "vmap of a product": lambda f, x, u: torch.func.vmap(
        lambda t: torch.func.jvp(torch.func.grad(lambda q: f(q, *x[1:])), (x[0],), (t,))[1])(torch.stack([u[0], x[0]])),
    "functional.hvp": lambda f, x, u: functional.hvp(f, tuple(x), tuple(u)),
    "functional.vhp": lambda f, x, u: functional.vhp(f, tuple(x), tuple(u)),
    "functional.jvp": lambda f, x, u: functional.jvp(f, tuple(x), tuple(u)),
    "functional.hessian": lambda f, x, u: functional.hessian(lambda v: f(*x[:2], v, *x[3:]), x[2]),
    "dual numbers": lambda f, x, u: dual(f, x, u),
    "gradient penalty": lambda f, x, u: penalty(f, x),
}


def dual(f, x, u):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, x, u)))


def penalty(f, x):
    x = [t.clone().requires_grad_() for t in x]
    first = torch.autograd.grad(f(*x), x, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), x)


@CASES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_equal_those_of_the_reference(transform, names, options):
    found = [transformed(transform, names, options, backend) for backend in ("algebra", "reference")]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif("cpu" not in AVAILABLE or not compiler.compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("names, options", [PLAIN, (RICH[0], BUILT_ONCE)], ids=["plain", "rich"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_by_kernels(transform, names, options):
    """In fp32; error against fp64 at most a few times that of standard attention in fp32."""
    truth = leaves(transformed(transform, names, options, "reference"))
    found, standard = (leaves(transformed(transform, names, options, backend, torch.float32))
                       for backend in ("cpu", "reference"))
    for x, plain, true in zip(found, standard, truth, strict=True):
        eps = torch.finfo(torch.float32).eps * max(1.0, true.abs().max().item())
        assert (x - true).abs().max() <= 4 * (plain - true).abs().max() + 16 * eps


def transformed(transform, names, options, backend, dtype=torch.float64):
    loss, x = losses(names, options, backend, dtype)
    generator = torch.Generator().manual_seed(1)
    u = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in x]
    return TRANSFORMS[transform](loss, tuple(x), tuple(u))


def leaves(found):
    return torch.utils._pytree.tree_leaves(found)


def test_only_what_is_asked_for():
    """Second derivatives by q alone, where bias and sinks are learned too."""
    names, options = RICH
    x, found = arguments(names), []
    for backend in ("algebra", "reference"):
        out, _ = function(names, backend, **options)(*x)
        (first,) = torch.autograd.grad(out.sin().sum(), x[0], create_graph=True)
        found += torch.autograd.grad(first.square().sum(), x[0])
    torch.testing.assert_close(*found)


def of_table(q, k, v, table):
    return tw.attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s) * table[h, i], backend="algebra")


def test_tables_of_learned_numbers():
    """First derivatives by a table, second ones by q, k and v beside it; not by the table."""
    q, k, v, table = inputs(table=True)
    (first,) = torch.autograd.grad(of_table(q, k, v, table).sin().sum(), q, create_graph=True)
    (found,) = torch.autograd.grad(first.square().sum(), q, retain_graph=True)
    out = tw.attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s) * table[h, i], backend="reference")
    (expected,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), q)[0])
    with pytest.raises(NotImplementedError, match=r'use backend="tiled" for.*captured tensors'):
        torch.autograd.grad(first.square().sum(), table)
    with pytest.raises(NotImplementedError, match=r'use backend="tiled" for.*captured tensors'):
        torch.func.jvp(lambda t: of_table(q.detach(), k.detach(), v.detach(), t), (table.detach(),), (table.detach(),))
    (of_both,) = torch.autograd.grad(of_table(q, k, v, table).sin().sum(), table, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'use backend="tiled" for.*captured tensors'):
        torch.autograd.grad(of_both.sum(), q)


def test_what_is_missing_says_so():
    q, k, v = (x.detach() for x in inputs())
    loss = lambda q: tw.attention(q, k, v, backend="algebra").sin().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match='use backend="tiled" for third derivatives'):
        torch.func.grad(lambda q: torch.func.grad(lambda q: torch.func.grad(loss)(q).sin().sum())(q).sum())(q)
    with pytest.raises(NotImplementedError, match='use backend="tiled" for third derivatives'):
        torch.func.jvp(lambda q: torch.func.grad(lambda q: torch.func.grad(loss)(q).sin().sum())(q), (q,), (q,))
    with pytest.raises(NotImplementedError, match='use backend="tiled" for third derivatives and forward mode of forward mode'):
        torch.func.jvp(lambda q: torch.func.jvp(loss, (q,), (q,))[1], (q,), (q,))


def test_backends_may_refuse(monkeypatch):
    from support import algebra
    q, k, v = (x.detach() for x in inputs())
    attend = lambda q: tw.attention(q, k, v, backend="algebra")  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(algebra, "supports_tangents", lambda problem: "head dims over 2")
        with pytest.raises(NotImplementedError, match=r'cannot compute.*head dims over 2.*use backend="tiled"'):
            torch.func.jvp(attend, (q,), (q,))
    monkeypatch.delattr(algebra, "tangent")
    with pytest.raises(NotImplementedError, match='first derivatives in reverse mode only: use backend="tiled"'):
        torch.func.jvp(attend, (q,), (q,))


def test_hopper_names_a_backend_that_has_them():
    """Its problems are those of a GPU; what it has not is known without one."""
    problem, _ = make(*torch.zeros(3, 1, 1, 1, 1))
    with pytest.raises(NotImplementedError, match='has first derivatives in reverse mode only: use backend="tiled"'):
        Call(backends.load("hopper"), problem, ((), ())).primitive("tangent")


def test_one_pass_for_each_operation(monkeypatch):
    """A second derivative is one tangent and one derivative of the backward pass; autograd asks for nothing beside."""
    from support import algebra
    called = []
    for name in ("forward", "backward", "tangent", "backward_tangent"):
        own = getattr(algebra, name)
        monkeypatch.setattr(algebra, name, lambda *arguments, name=name, own=own: (called.append(name), own(*arguments))[1])
    x = inputs()
    first = torch.autograd.grad(tw.attention(*x, backend="algebra").square().sum(), x, create_graph=True)
    assert called == ["forward", "backward"]
    torch.autograd.grad(first, x, [t.cos() for t in x])
    assert called[2:] == ["tangent", "backward_tangent", "backward"]     # of square(), whose own derivative is not 0
    first = torch.autograd.grad(tw.attention(*x, backend="algebra").sum(), x, create_graph=True)
    torch.autograd.grad(first, x, [t.cos() for t in x])
    assert called[7:] == ["tangent", "backward_tangent"]
