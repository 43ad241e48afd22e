"""Forward mode and second derivatives in kernels: every feature against fp64, by the tolerance rule (`bench/tolerance.py`).

For each case, in one direction of all inputs: the tangents of out and lse, and the derivative of all gradients.
"""
import pytest
import torch
from support.backends import AVAILABLE
from support.tangents import assert_right

import tilewise as tw
from tilewise import backends
from tilewise.backends.cpu import compiler
from tilewise.bench.cases import Case, named

NATIVE = [name for name in AVAILABLE if hasattr(backends.load(name), "backward_tangent")
          and (name != "cpu" or compiler.compiler())]
NAMES = ("full ragged", "causal more keys", "causal bhsd", "prefix or window", "boolean tensor", "function of heads",
         "blocks per head", "grouped heads", "values narrower", "no keys", "no queries", "empty batch shared bias",
         "scores of 100", "bias over batch", "bias of keys", "bias of queries", "bias with -inf", "score function",
         "table of pairs", "everything", "sinks rows without keys", "packed window", "packed function of heads",
         "packed bias shared", "packed everything", "packed no sequences in use")
SHORT = ("grouped heads", "prefix lm bias dropout sinks", "packed everything")
TABLE = [(name, torch.float32) for name in NAMES] + [(name, torch.bfloat16) for name in SHORT] + [(SHORT[1], torch.float16)]
# kernels for CPUs are built for each mask and dtype, in seconds: not for these, whose ways others go too
APART = [(name, torch.float32) for name in (
    "prefix or window", "boolean tensor", "blocks per head", "packed window", "packed bias shared")]
APART += [("packed everything", torch.bfloat16)]
RUNS = [(*run, backend) for backend in NATIVE for run in TABLE if backend != "cpu" or run not in APART]


@pytest.mark.parametrize("name, dtype, backend", RUNS, ids=lambda x: str(x).removeprefix("torch."))
def test_within_tolerance(name, dtype, backend, poisoned):
    assert_right(named(name), dtype, backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x).removeprefix("torch."))
def test_heads_whose_channels_are_taken_in_parts(dtype, backend, poisoned):
    wide = Case("wide heads", 1, 33, 40, heads=2, kv_heads=1, head_dim=136, head_dim_v=144)
    assert_right(wide, dtype, backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("fixed", [("q", "bias", "sinks"), ("k", "v")], ids=" ".join)
def test_what_does_not_move_has_no_tangent(fixed, backend, poisoned):
    assert_right(named("prefix lm bias dropout sinks"), torch.float32, backend, fixed=fixed)


@pytest.mark.parametrize("backend", NATIVE)
def test_autograd_through_kernels(backend):
    """Hessian-vector products, forward over reverse and reverse over reverse, of inputs that broadcast in memory."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 33, heads, 16, generator=g) for heads in (2, 1, 1))

    def loss(q, backend):
        return tw.attention(q, k, v, causal=True, score_mod=tw.softcap(3.0), backend=backend).sum(1).square().sum()

    def products(backend):
        gradient = torch.func.grad(lambda q: loss(q, backend))
        _, forward = torch.func.jvp(gradient, (q,), (q.cos(),))
        return forward, torch.func.vjp(gradient, q)[1](q.cos())[0]

    (a, b), (expected, _) = products(backend), products("reference")
    torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b, expected, rtol=1e-4, atol=1e-4)
