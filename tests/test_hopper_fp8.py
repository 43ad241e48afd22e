"""The Hopper forward of fp8 inputs in the simulator: right, under several schedules, and wrong where its parts are."""
import pytest
import torch
from support.backends import INTERPRETING

pytest.importorskip("triton", reason="needs triton", exc_type=ImportError)
if INTERPRETING:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)

from support.hopper.product import install

import tilewise as tw
from tilewise.backends.hopper import launch
from tilewise.bench import fp8
from tilewise.bench.cases import CASES, Case, named
from tilewise.bench.hopper.correctness import LONGER
from tilewise.fp8 import FP8

NAMED = ("causal bhsd", "key lengths", "scale negative", "scale zero", "sinks rows without keys", "table of keys", "one query",
         "packed used", "packed no sequences in use", "packed alibi per sequence", "values wider")
SHORT = [case for case in CASES if case.name in NAMED]
LONG = [case for case in LONGER if "dropout" not in case.name and "repeatable" not in case.name and case.head_dim % 16 == 0]
CAUSAL = Case("causal", batch=2, seqlen_q=130, seqlen_k=200, heads=2, kv_heads=2, head_dim=64,
              options=lambda m: dict(causal=True))


@pytest.fixture
def simulated(monkeypatch):
    return install(monkeypatch)


def wrong(call):
    return [str(verdict) for verdict in fp8.check(call, "hopper") if not verdict.ok]


@pytest.mark.parametrize("case", [*LONG, *SHORT], ids=str)
def test_within_tolerance(case, simulated, poisoned):
    simulated.seed = len(case.name)
    assert wrong(fp8.drawn(case, seed=simulated.seed)) == []
    assert simulated.launched == ["turn_values", "forward"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["long softcap", "packed long causal"])
def test_schedules(name, seed, simulated, poisoned):
    simulated.seed = seed
    assert wrong(fp8.drawn(next(case for case in LONG if case.name == name), seed=seed)) == []


def test_the_same_bits_under_all_schedules(simulated):
    call, found = fp8.drawn(CAUSAL), []
    for simulated.seed in range(4):
        found.append(fp8.run(call, "hopper"))
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(again, found[0], strict=True))


def test_few_queries_take_the_same_kernel(simulated):
    call = fp8.drawn(named("one query"))
    fp8.run(call, "hopper")
    assert simulated.launched[-1] == "forward"


def test_probabilities_use_the_range_of_e4m3(simulated):
    """Of 2000 keys one is e^8 times as likely as each other: without the factor 256 the others would be nearly all lost."""
    keys = 2000
    q, k, v = (torch.zeros(1, n, 1, 64) for n in (1, keys, keys))
    q[..., 0], k[:, 0, :, 0], v[:, 1:] = 8, 8, 1
    out = tw.attention(*(x.to(FP8) for x in (q, k, v)), backend="hopper")
    rest = (keys - 1) * torch.tensor(-8.0).exp()
    assert (out - rest / (1 + rest)).abs().max() < 0.02


def test_padding_may_hold_nan(simulated, poisoned):
    """Keys that a mask hides from all queries do not reach the output."""
    call, lengths = fp8.drawn(CAUSAL), torch.tensor([70, 130])
    padding = (torch.arange(200) >= lengths[:, None])[:, :, None, None]
    found = []
    for filling in (torch.nan, 0.0):
        k, v = (torch.where(padding, filling, x.float()).to(FP8) for x in (call.k, call.v))
        found.append(tw.attention(call.q, k, v, mask=tw.key_lengths(lengths.int()), scale=1e-5, backend="hopper"))
    assert torch.equal(*found)


def test_visible_nan_shows(simulated):
    call = fp8.drawn(CAUSAL)
    v = call.v.clone()
    v[0, 150, 0] = torch.nan
    out = tw.attention(call.q, call.k, v, scale=1e-5, causal=True, backend="hopper")
    assert out[0, 80:, 0].isnan().all()                 # query i sees keys up to i + 70
    assert out[1].isfinite().all()
    assert out[0, :, 1].isfinite().all()


def planted_order(monkeypatch):
    """Keys in their own order."""
    def turned(problem, x, c, start):
        new = torch.zeros(launch.turned_shape(problem, c.BLOCK_N)).to(FP8)
        new[..., :problem.seqlen_k] = x.v.mT
        return new

    monkeypatch.setattr(launch, "turned", turned)


def planted_scale(monkeypatch):
    """Each head with the scales of the one before it."""
    right = launch.scales
    monkeypatch.setattr(launch, "scales", lambda problem, x: {name: s.roll(1, 1) for name, s in right(problem, x).items()})


@pytest.mark.parametrize("plant", [planted_order, planted_scale], ids=lambda f: f.__name__)
def test_what_is_planted_is_found(plant, simulated, monkeypatch):
    plant(monkeypatch)
    assert wrong(fp8.drawn(CAUSAL))
