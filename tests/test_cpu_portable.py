"""Kernels of the `cpu` backend compiled for CPUs with shorter vectors than this one has: 8 numbers in each, or 4."""
import platform

import pytest
import torch
from support.backends import AVAILABLE
from support.tangents import assert_right

import tilewise as tw
from tilewise.backends import cpu
from tilewise.backends.cpu import compiler
from tilewise.bench import tolerance
from tilewise.bench.cases import CASES, Case, draw, named

pytestmark = [pytest.mark.usefixtures("one_thread", "poisoned"), pytest.mark.skipif(
    "cpu" not in AVAILABLE or not cpu.compiler.compiler(), reason="needs a C++ compiler")]

FP8 = torch.float8_e4m3fn
HALVES = torch.float16, torch.bfloat16
NAMES = ("full ragged", "head dim 40", "head dim 1", "dropout", "bias transposed", "sinks strided", "grouped heads",
         "documents wide ids", "score function", "table of distances", "table of t5", "packed everything")
TABLE = [(case, torch.float32) for case in CASES if case.name in NAMES]
TABLE += [(case, dtype) for case in CASES if case.name == "grouped heads" for dtype in HALVES]
FEW = Case("few queries", seqlen_q=3, seqlen_k=150, heads=4, kv_heads=2, head_dim=40, head_dim_v=21)
TABLE += [(FEW, dtype) for dtype in (torch.float32, *HALVES)]


@pytest.fixture(autouse=True, params=["x86-64-v3", "x86-64"])
def narrow(request, monkeypatch):
    """Compiles for an older CPU, with few optimisations: that takes a third of the time."""
    if platform.machine() != "x86_64":
        pytest.skip("the CPU is not an x86-64 one")
    if request.param == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("the CPU has no AVX2")
    other = {"-march=native": f"-march={request.param}", "-O3": "-O1"}
    monkeypatch.setattr(compiler, "FLAGS", tuple(other.get(flag, flag) for flag in compiler.FLAGS))
    compiler.library.cache_clear()
    yield
    compiler.library.cache_clear()


@pytest.mark.parametrize("case, dtype", TABLE, ids=lambda x: str(x).removeprefix("torch."))
def test_within_tolerance(case, dtype):
    wrong = [verdict for verdict in tolerance.check(draw(case, dtype), "cpu") if not verdict.ok]
    assert not wrong, "\n".join(map(str, wrong))


def test_derivatives_within_tolerance():
    assert_right(named("grouped heads"), torch.float32, "cpu")


def every_number(dtype):
    """All bit patterns of a dtype, [sequences, 1 key, 1 head, 256]."""
    count, of_bits = (256, torch.uint8) if dtype == FP8 else (65536, torch.uint16)
    return torch.arange(count, dtype=torch.int32).to(of_bits).view(dtype).view(-1, 1, 1, 256)


@pytest.mark.parametrize("queries", [1, 17], ids=["few queries", "many queries"])
@pytest.mark.parametrize("dtype", [FP8, *HALVES], ids=lambda x: str(x).removeprefix("torch."))
def test_every_number_is_read_as_it_is_and_written_rounded_to_nearest_even(dtype, queries):
    """One key has all weight, or two have half of it each: then sums are exact, and half of them halfway between numbers."""
    x, of_q = every_number(dtype), torch.float32 if dtype == FP8 else dtype
    bits = x.view(torch.uint8 if dtype == FP8 else torch.int16)
    for v in (x, *[torch.cat([bits, other], 1).view(dtype) for other in (bits.roll(1, 3), bits.flip(0, 3))]):
        k, lengths = torch.zeros(*v.shape[:3], 8).to(dtype), torch.full((len(v),), v.shape[1], dtype=torch.int32)
        q = torch.zeros(len(v), queries, 1, 8, dtype=of_q)
        out = tw.attention_with_kv_cache(q, tw.KVCache.wrap(k, v, lengths), backend="cpu")
        expected = v.float().mean(1, keepdim=True).to(of_q).expand_as(out)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
