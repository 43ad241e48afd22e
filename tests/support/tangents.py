"""A backend's derivatives in one direction of all inputs, and whether they are right by the tolerance rule."""
import torch

from support import algebra
from tilewise import backends
from tilewise.backends import Needs, Tangents
from tilewise.bench import tolerance
from tilewise.bench.cases import draw
from tilewise.problem import describe

PRODUCTS = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")


def along(call, module, dtype, fixed=()):
    """The tangents of out, lse and the gradients of a call, its floating inputs in a dtype, in a random direction in which the
    fixed ones do not move."""
    problem, x = call.described()
    x = x._replace(**{name: t.to(dtype) for name, t in zip(x._fields[:5], x[:5], strict=True) if t is not None})
    problem, g = describe(x, problem.settings), torch.Generator().manual_seed(2)

    def like(t):
        return None if t is None else torch.randn(t.shape, generator=g).bfloat16().to(t.device, t.dtype)

    u = Tangents(*map(like, x[:5]))._replace(**dict.fromkeys(fixed))
    out, lse = module.forward(problem, x)
    dout, dlse = like(out), like(lse)
    tangents = module.tangent(problem, x, u, out, lse)
    problem, x = problem.curved(x)
    needs = Needs(x.bias is not None, x.sinks is not None)
    found = module.backward_tangent(problem, x, u, out, lse, *tangents, dout, dlse, needs)
    return tolerance.Results({name: t for name, t in zip(PRODUCTS, (*tangents, *found), strict=False) if t is not None})


def assert_right(case, dtype, backend, **options):
    call = draw(case, dtype)
    truth, standard = (along(call, algebra, t, **options) for t in (torch.float64, dtype))
    found = along(call, backends.load(backend), dtype, **options)
    wrong = [verdict for verdict in tolerance.judge(call, found, truth, standard) if not verdict.ok]
    assert not wrong, "\n".join(map(str, wrong))
