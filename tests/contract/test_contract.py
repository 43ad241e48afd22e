"""The contract: every case on every backend, forward and backward, against fp64 by the tolerance rule.

The `triton` backend runs on a GPU, or on a CPU in a process started with TRITON_INTERPRET=1 (`make test` starts both).
"""
import pytest
import torch
from support.backends import AVAILABLE, DEVICE

import tilewise as tw
from tilewise.bench import tolerance
from tilewise.bench.cases import CASES, draw, named, rows_in_use

SHORT = ("full", "causal more keys", "causal more queries", "grouped heads", "head dim 40", "documents", "everything",
         "prefix lm bias dropout sinks", "window grouped softcap dropout", "bias with -inf", "values narrower", "no keys",
         "packed causal", "packed everything")
TABLE = [(case, torch.float32) for case in CASES]
TABLE += [(case, dtype) for case in CASES if case.name in SHORT for dtype in (torch.bfloat16, torch.float16)]
TABLE64 = [(case, torch.float64) for case in CASES if "batch invariant" not in case.name]


def assert_right(case, dtype, backend):
    call = draw(case, dtype, DEVICE)
    if not call.supported(backend):
        with pytest.raises(NotImplementedError, match="cannot compute this"):
            call.run(call.differentiable, backend)
        return
    wrong = [verdict for verdict in tolerance.check(call, backend) if not verdict.ok]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("case, dtype", TABLE, ids=lambda x: str(x).removeprefix("torch."))
def test_within_tolerance(case, dtype, backend, poisoned, small_tiles):
    assert_right(case, dtype, backend)


@pytest.mark.parametrize("case, dtype", TABLE64, ids=lambda x: str(x).removeprefix("torch."))
def test_tiled_in_fp64(case, dtype, poisoned, small_tiles):
    call = draw(case, dtype, DEVICE)
    truth, tiled = (tolerance.run(call, backend).tensors for backend in ("reference", "tiled"))
    for name, x in tiled.items():
        torch.testing.assert_close(x, truth[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"])
@pytest.mark.parametrize("name", ["causal", "grouped heads", "bias over batch", "documents", "everything",
                                  "table of any index", "packed everything", "packed table of any index"])
def test_bitwise_repeatable(name, backend, poisoned, small_tiles):
    call = draw(named(name), torch.float32, DEVICE)
    first, second = tolerance.run(call, backend).tensors, tolerance.run(call, backend).tensors
    for key in first:
        assert torch.equal(first[key].nan_to_num(), second[key].nan_to_num()), key


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"])
@pytest.mark.parametrize("name", ["causal bhsd", "grouped heads", "dropout", "bias of keys"])
def test_a_call_like_one_before(name, backend, poisoned, forgetful):
    """Other tensors that lie like the first ones: what was settled for those serves them."""
    case = next(c for c in CASES if c.name == name)
    for seed in range(2):
        wrong = [verdict for verdict in tolerance.check(draw(case, torch.float32, DEVICE, seed), backend) if not verdict.ok]
        assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("name", ["packed", "packed used dropout bias", "packed no sequences in use"])
def test_rows_of_no_sequence(name, backend, poisoned, small_tiles):
    call = draw(named(name), torch.float32, DEVICE)
    found = tolerance.run(call, backend).tensors
    rows, keys = (~rows_in_use(call.case, side) for side in (0, 1))
    assert (found["out"][rows] == 0).all()
    assert (found["lse"][:, rows] == -torch.inf).all()
    for name, outside in (("dq", rows), ("dk", keys), ("dv", keys)):
        assert (found[name][outside] == 0).all()


@pytest.mark.skipif("triton" not in AVAILABLE, reason="no GPU and not interpreting")
def test_triton_refuses_fp64():
    q = torch.zeros(1, 4, 1, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="fp64"):
        tw.attention(q, q, q, backend="triton")


@pytest.mark.skipif("triton" not in AVAILABLE or DEVICE != "cpu", reason="the interpreter's tiles can be chosen")
@pytest.mark.parametrize("tile", [(16, 32), (64, 32), (32, 64), (16, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("name", ["everything", "causal more queries", "documents", "prefix or window", "values narrower",
                                  "function of heads", "blocks per head", "table of distances", "packed everything",
                                  "packed function of heads"])
def test_every_tile_shape(name, tile, monkeypatch, poisoned, forgetful):
    from tilewise.backends.triton import configs
    monkeypatch.setattr(configs, "INTERPRETER", configs.Config(*tile, 4, 1))
    assert_right(named(name), torch.float32, "triton")


@pytest.mark.skipif("tiled" not in AVAILABLE, reason="in the interpreter's process only Triton runs")
@pytest.mark.parametrize("name", ["prefix lm", "key lengths", "documents", "boolean tensor", "function of documents",
                                  "everything", "function of sequences and heads", "table of t5",
                                  "prefix lm bias dropout sinks"])
def test_sequences_apart(name, monkeypatch, poisoned):
    """Long sequences whose masks differ are computed one by one; here short ones are."""
    from tilewise.backends import tiled
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 0)
    case = named(name)
    if name != "table of t5":
        assert tiled.apart(draw(case, torch.float32, DEVICE).described()[0])
    assert_right(case, torch.float32, "tiled")
