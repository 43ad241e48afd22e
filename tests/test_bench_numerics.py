"""The numerics study: truth is the reference's, bad implementations show, and the docs' tables are those of the results."""
import json
from pathlib import Path

import pytest
import torch
from support.backends import AVAILABLE

import tilewise as tw
from tilewise.bench import record, suite
from tilewise.bench.numerics import causes, errors, inputs, methods, study
from tilewise.bench.numerics.inputs import KINDS, QUICK, Setting, draw, settings
from tilewise.bench.numerics.methods import Method
from tilewise.bench.suite import Wanted

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[1]
SQUARE, LATE = Setting("normal", "bfloat16", 80, 80, 2, 16), Setting("normal", "bfloat16", 24, 80, 1, 16, causal=True)

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")]


@pytest.mark.parametrize("setting", [SQUARE, LATE], ids=str)
def test_truth_is_the_reference_in_fp64(monkeypatch, setting):
    monkeypatch.setattr(errors, "CHUNK_BYTES", 8 * 80 * 7)      # a few rows at a time
    x = draw(setting, CPU)
    found = errors.truth(x, setting.causal)
    q, k, v = (t.double().requires_grad_() for t in x[:3])
    out, lse = tw.attention(q, k, v, causal=setting.causal, return_lse=True, backend="reference")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), x.dout.double())
    for name, t in {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}.items():
        torch.testing.assert_close(found[name], t, atol=1e-12, rtol=1e-12)


def test_kinds_of_inputs():
    x = {kind: draw(Setting(kind, "float32", 512, 512, 2, 64), CPU) for kind in KINDS}
    normal = x["normal"]
    assert normal.q.std().item() == pytest.approx(1, abs=0.02)
    changed = x["outliers"].q != normal.q
    assert 0.0005 < changed.float().mean() < 0.002
    assert (x["outliers"].q - normal.q)[changed].std().item() == pytest.approx(10, rel=0.4)
    constant = x["near-constant keys"].k
    assert constant.std(1).max() < 0.02 < 0.5 < constant.std(3).min()
    p = [torch.softmax(torch.einsum("bqhd,bkhd->bhqk", of.q, of.k) / 8, -1).amax(-1).mean().item()
         for of in (x[f"scores x {factor}"] for factor in (4, 16, 64))]
    assert p[0] < p[1] < p[2]
    assert p[2] > 0.9


def rounded(q, k, v):
    """Scores that pass through bf16 on their way, which rounds them."""
    s = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    s = s + (s.detach().bfloat16().float() - s.detach())
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(s, -1), v.float()).to(q.dtype), torch.logsumexp(s, -1)


def no_gradient_of_delta(q, k, v):
    """dS without the part that the softmax's denominator gives."""
    s = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(s, -1)
    return torch.einsum("bhqk,bkhd->bqhd", torch.exp(s - lse.detach()[..., None]), v.float()).to(q.dtype), lse


@pytest.mark.parametrize("planted, tensor", [(rounded, "lse"), (rounded, "out"), (no_gradient_of_delta, "dq")])
def test_a_bad_implementation_has_larger_errors(planted, tensor):
    setting = Setting("scores x 16", "float32", 80, 80, 2, 16)
    found = study.judged(setting, [*methods.methods(setting, CPU), Method("planted", planted)], CPU)
    bad = found.pop("planted")
    assert bad["state"] == "wrong"
    assert f"{tensor}: error" in bad["reason"]
    ours = [name for name in ("cpu", "tiled") if found[name]["state"] == "right"]
    assert "tiled" in ours
    for name in ours:
        assert bad["rms"][tensor][0] > 20 * found[name]["rms"][tensor][0]
        assert bad["errors"][tensor][0] > 20 * found[name]["errors"][tensor][0]


def test_end_to_end(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "settings", lambda device, sizes: {"inputs": [SQUARE], "lengths": [LATE]})
    result = suite.run("numerics", Wanted(CPU), out=tmp_path / "numerics.json")
    assert result["complete"]
    assert [row["case"] for row in result["rows"]] == [
        f"{words} forward+backward" for words in (SQUARE, LATE, f"one rounding, {SQUARE}")]
    for row in result["rows"][:2]:
        states = {name: entry["state"] for name, entry in row["contenders"].items()}
        assert {states["tiled"], states["sdpa math"], states["standard"]} == {"right"}
        assert states["hopper"] == states["flash_attn"] == "absent"
        for entry in row["contenders"].values():
            if entry["state"] == "right":
                assert entry["errors"].keys() == entry["rms"].keys() >= {"out", "dq", "dk", "dv"}
                assert all(0 < entry["rms"][name][0] <= entry["errors"][name][0] for name in entry["rms"])
    assert json.loads((tmp_path / "numerics.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert max(map(len, result["lines"])) <= 128
    assert any(line.startswith("hopper: absent") for line in result["lines"])


def test_failures_are_kept_apart():
    def broken(q, k, v):
        raise RuntimeError("no such kernel")

    found = study.judged(SQUARE, [Method("broken", broken), Method("missing", None, "not here"),
                                  *methods.methods(SQUARE, CPU)[-1:]], CPU)
    assert found["broken"] == {"state": "refused", "reason": "RuntimeError: no such kernel"}
    assert found["missing"] == {"state": "absent", "reason": "not here"}


def test_settings():
    of_gpu, of_cpu = settings(torch.device("cuda"), inputs.FULL), settings(CPU, QUICK)
    assert {s.precision for s in of_gpu["precision"]} == {"high", "medium"}
    assert max(s.seqlen_k for s in of_gpu["lengths"]) == 131072
    assert "precision" not in of_cpu
    for of in (of_gpu, of_cpu):
        names = [str(s) for part in of.values() for s in part]
        assert len(names) == len(set(names))
        assert len(of["inputs"]) == 3 * len(KINDS)
    before = torch.get_float32_matmul_precision()
    with study.products("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


def test_what_one_rounding_costs():
    """Rounding scores ruins a softmax that is one-hot; rounding delta or dS ruins dq where terms cancel."""
    def relative(kind, cause, tensor):
        setting = Setting(kind, "bfloat16", 80, 80, 2, 16)
        error, truth = study.of_causes(setting, CPU)["forward+backward"]["contenders"][cause]["rms"][tensor]
        return error / truth

    for kind in KINDS:
        assert relative(kind, "results alone", "out") < 2**-8
        assert relative(kind, "results alone", "dq") < 2**-8
    assert relative("scores x 64", causes.SCORES, "out") > 5 * relative("scores x 64", causes.PROBABILITIES, "out")
    for cause in (causes.OUT, causes.GRADIENTS):
        assert relative("near-constant keys", cause, "dq") > 10 * relative("near-constant keys", "results alone", "dq")


def test_the_results_in_the_repository():
    """Ours are right in all that was measured."""
    rows = record.load(ROOT / "results" / "numerics_cpu.json")["rows"]
    assert {row["part"] for row in rows} == {"inputs", "causes", "lengths", "interpreter"}
    ours = [row["contenders"][name]["state"] for row in rows for name in ("cpu", "tiled", "triton (interpreter)")
            if name in row["contenders"] and row["contenders"][name]["state"] != "absent"]
    assert set(ours) == {"right"}
    assert len(ours) > 100
