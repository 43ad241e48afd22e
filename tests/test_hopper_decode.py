"""Decoding on the `hopper` backend, in the simulator: caches of all kinds, each way to miss a key or to read one too many."""
import pytest
import torch
from support.backends import INTERPRETING

pytest.importorskip("triton", reason="needs triton", exc_type=ImportError)
if INTERPRETING:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)

from support.hopper.product import install

from tilewise.bench.hopper.cached import CASES, draw

BF16, FP16 = torch.bfloat16, torch.float16
SCHEDULED = [case for case in CASES if case.name in ("several tiles", "head dim 128", "packed shares", "pages of 16", "fp8, shares")]


@pytest.fixture
def simulated(monkeypatch):
    return install(monkeypatch)


def case(name):
    return next(case for case in CASES if case.name == name)


# ---- what is computed --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case, dtype", [*((case, BF16) for case in CASES), *((case, FP16) for case in CASES[::5])], ids=str)
def test_cases(case, dtype, simulated, poisoned):
    call = draw(case, dtype)
    assert call.faults("hopper") == ""
    merged = call.options.get("num_splits", 1) > 1
    assert simulated.launched == ["decode"] + ["merge"] * merged


@pytest.mark.parametrize("case", SCHEDULED, ids=str)
@pytest.mark.parametrize("seed", range(1, 4))
def test_schedules(case, seed, simulated, poisoned):
    simulated.seed = seed
    assert draw(case, BF16, seed=seed).faults("hopper") == ""
