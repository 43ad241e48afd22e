"""Benchmarks: times are paired, what is wrong is not timed, and nothing that a stage or a test does ends the rest."""
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.halved import Halved

import tilewise as tw
from tilewise.bench import peers, run, table, timing, workers
from tilewise.bench.gate import Gate
from tilewise.bench.timing import Timing

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TINY = run.Shape(1, 64, 4, 2, 16, True, "float32")


@pytest.fixture
def gpu():
    """scripts/gpu as a module."""
    loader = importlib.machinery.SourceFileLoader("scripts_gpu", str(ROOT / "scripts" / "gpu"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = writes
    return module


def test_calls_take_turns_and_no_one_always_goes_first():
    order = []
    calls = {name: lambda turn, name=name: order.append((turn, name)) for name in "abc"}
    found = timing.compare(calls, CPU, seconds=5, most=3)
    assert order[:6] == [(0, name) for name in "aabbcc"]
    assert order[6:] == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b")]
    assert all(len(one.rounds) == 3 for one in found.values())


def test_a_call_longer_than_the_budget_is_timed_once():
    calls = []
    found = timing.compare({"slow": lambda turn: (calls.append(turn), time.sleep(0.05)), "fast": lambda turn: None}, CPU,
                           seconds=0.009, most=3)
    assert calls == [0]
    assert len(found["slow"].rounds) == 1
    assert found["slow"].median >= 0.05
    assert len(found["fast"].rounds) == 3


def test_medians_quartiles_and_paired_ratios():
    a, b = Timing([1.0, 10.0, 2.0, 3.0, 4.0], [0.5] * 5), Timing([2.0, 20.0, 4.0, 6.0, 4.0], [0.5] * 5)
    assert a.median == 3.0
    assert a.quartiles == (2.0, 4.0)
    assert timing.times_faster(a, b) == 2.0
    assert timing.times_faster(a, Timing([9.0], [9.0])) == 3.0
    assert Timing([7.0], [7.0]).quartiles == (7.0, 7.0)
    assert timing.minus(b, a) == Timing([1.0, 10.0, 2.0, 3.0, 1e-9], [1e-9] * 5)
    assert timing.minus(Timing([9.0], [1.0]), a) == Timing([6.0], [0.5])


@pytest.mark.parametrize("shape", [TINY, run.Shape(2, 40, 2, 2, 8, False, "float32")])
def test_every_peer_computes_attention_or_says_why_not(shape):
    q, k, v, dout = shape.draw(CPU, 0)
    gate = Gate(q, k, v, dout, shape.causal)
    for peer in peers.discover(CPU):
        if peer.attend is None:
            assert peer.reason
        else:
            assert all(verdict.ok for verdict in gate.verdicts(peer.attend)), peer.name


def test_who_is_wrong_or_raises_is_reported_and_not_timed():
    calls = []

    def shifted(q, k, v, causal):
        calls.append("shifted")
        return tw.attention(q, k, v, causal=causal) + 1e-3

    def raising(q, k, v, causal):
        raise RuntimeError("no such kernel\nmore words")

    field = [peers.ours("tiled"), peers.Contender("shifted", shifted), peers.Contender("raising", raising),
             peers.Contender("absent", None, "not installed")]
    row = run.measure(TINY, field, CPU)
    states = {name: entry["state"] for name, entry in row["contenders"].items()}
    assert states == {"tiled": "timed", "shifted": "wrong", "raising": "refused", "absent": "absent"}
    assert "out: error 1.0e-03" in row["contenders"]["shifted"]["reason"]
    assert row["contenders"]["raising"]["reason"] == "RuntimeError: no such kernel"
    assert calls == ["shifted"]
    assert row["contenders"]["tiled"]["forward"]["rounds"] >= 3
    text = "\n".join(table.lines([row]))
    assert "shifted: wrong: out: error" in text
    assert "absent: absent: not installed" in text
    assert "wrong" in text.splitlines()[1]


def test_wrong_gradients_alone_are_seen():
    q, k, v, dout = TINY.draw(CPU, 0)
    gate = Gate(q, k, v, dout, True)
    verdicts = gate.verdicts(lambda q, k, v, causal: tw.attention(q, Halved.apply(k), v, causal=causal))
    assert [verdict.name for verdict in verdicts if not verdict.ok] == ["dk"]


def test_flops_are_the_fields():
    assert run.Shape(2, 8, 3, 3, 4, False, "float32").flops() == 4 * 2 * 3 * 8 * 8 * 4
    assert run.Shape(2, 8, 3, 3, 4, True, "float32").flops() == 2 * 2 * 3 * 8 * 8 * 4


def test_the_papers_protocol():
    found = run.shapes(torch.device("cuda"))
    assert {(s.batch * s.seqlen, s.heads * s.head_dim, s.dtype) for s in found} == {(16384, 2048, "bfloat16")}
    assert {(s.head_dim, s.seqlen, s.causal) for s in found} == {
        (d, n, c) for d in (64, 128, 256) for n in (512, 1024, 2048, 4096, 8192, 16384) for c in (True, False)}


def test_benchmark_writes_what_it_has_and_outlives_a_failing_shape(tmp_path, monkeypatch):
    real = run.measure
    q = torch.zeros(1, 8, 1, 8)
    served = tw.explain(q, q, q).backend

    def measure(shape, field, device):
        if not shape.causal:
            raise MemoryError("too large")
        return real(shape, [c for c in field if c.name in (served, "standard")], device)

    monkeypatch.setattr(run, "measure", measure)
    which = [TINY, run.Shape(1, 64, 4, 2, 16, False, "float32")]
    result = run.benchmark(which, CPU, seconds=60, out=tmp_path / "sub" / "result.json")
    stored = json.loads((tmp_path / "sub" / "result.json").read_text())
    assert stored["lines"] == result["lines"]
    assert stored["date"]
    assert stored["machine"]["torch"].startswith(torch.__version__)
    assert {"GPU", "triton"} <= stored["machine"].keys()
    first, second = stored["rows"]
    assert {"forward", "backward", "forward+backward"} <= first["contenders"][served].keys()
    assert set(first["times_faster"]["backward"]) == {served, "standard"}
    assert second["error"] == "MemoryError: too large"
    assert "MemoryError" in "\n".join(table.lines(stored["rows"]))
    assert run.benchmark(which, CPU, seconds=-1)["not_reached"][0]["seqlen"] == 64


def test_work_is_divided_without_loss():
    items = list(range(7))
    assert sorted(x for i in range(3) for x in workers.part(items, f"{i}/3")) == items
    assert workers.part(items, None) == items


def test_tuning_skips_what_fails_or_differs_and_prints_a_row(monkeypatch):
    pytest.importorskip("triton")
    from types import SimpleNamespace

    from tilewise.bench import tuning

    out, lse = torch.zeros(4), torch.zeros(4)
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="forward"))
    one = tuning.Launch(kernel, SimpleNamespace(head_dim=64), len, {"OUT": out, "LSE": lse})
    default, fast, wrong, failing = (tuning.Config(m, 64, 4, 2) for m in (16, 32, 64, 128))

    def fake_run(kernel, problem, programs, values):
        config = tuning.launch.choose("forward", problem, "sm_90")
        if config == failing:
            raise RuntimeError("out of resource: shared memory")
        time.sleep(0.002 if config == fast else 0.008)
        values["OUT"].fill_(2.0 if config == wrong else 1.0)
        values["LSE"].fill_(1.0)

    monkeypatch.setattr(tuning.launch, "run", fake_run)
    monkeypatch.setattr(tuning, "SECONDS", 0.05)
    row = tuning.tune(one, [default, fast, wrong, failing], CPU)
    assert row["seconds"].keys() == {str(tuple(default)), str(tuple(fast))}
    assert "times what is allowed" in row["failed"][str(tuple(wrong))]
    assert "shared memory" in row["failed"][str(tuple(failing))]
    assert out.tolist() == lse.tolist() == [1.0] * 4
    row |= {"head_dim": 64, "causal": True, "seqlen": 4096, "shipped": str(tuple(default))}
    assert tuning.rows([row])[0].startswith(f"('forward', 64): Config{tuple(fast)},  # ")
    assert tuning.parsed("ptxas error") is None


def test_benchmarks_need_only_torch_triton_and_numpy():
    code = ("import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'hypothesis', 'matplotlib']));"
            "import importlib; [importlib.import_module(f'tilewise.bench.{name}') for name in sys.argv[1:]]")
    names = ["run", "smoke", "memory", "workers", "cases", "tolerance"]
    names += ["tuning"] if importlib.util.find_spec("triton") else []
    subprocess.run([sys.executable, "-c", code, *names], check=True)


FAKE_STAGE = """
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
json.dump({"lines": ["said " + sys.argv[1]]}, open(out, "w"))
print("printed", flush=True)
{"crash": os.abort, "hang": lambda: time.sleep(60), "fail": lambda: sys.exit("words of a failure"), "pass": int}[sys.argv[1]]()
"""


def test_stages_outlive_crashes_and_hangs_and_store_each_result(gpu, tmp_path, monkeypatch):
    script = tmp_path / "stage.py"
    script.write_text(FAKE_STAGE)
    stored, write_text = [], Path.write_text

    def spy(path, text):
        stored.append(list(json.loads(text)))
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", spy)
    stages = tuple(gpu.Stage(what, (sys.executable, str(script), what), 3 if what == "hang" else 20, 2, timed=False)
                   for what in ("crash", "hang", "fail", "pass"))
    gpu.run_all((*stages, gpu.Stage("missing", ("/no/such/program",), 5, 2)), tmp_path / "out", 60)
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    states = {name: entry["state"] for name, entry in results.items()}
    assert states["crash"] == "exit -6"
    assert states["hang"].startswith("ended after")
    assert states["fail"] == "exit 1"
    assert states["pass"] == "ok"
    assert states["missing"].startswith("not started")
    assert stored == [list(states)[:n] for n in range(1, 6)]
    assert "words of a failure" in results["fail"]["tail"]
    lines = gpu.table(stages, results)
    assert [line for line in lines if line.startswith("said")] == ["said crash", "said hang", "said fail", "said pass"]


def test_no_stage_begins_without_time_and_the_table_stays_short(gpu, tmp_path):
    results = gpu.run_all(gpu.STAGES, tmp_path, 0)
    assert {entry["state"] for entry in results.values()} == {"no time left"}
    full = {"state": "ok", "seconds": 1, "result": {"lines": ["x" * 500] * 99}, "tail": ""}
    lines = gpu.table(gpu.STAGES, {stage.name: full for stage in gpu.STAGES})
    assert len(lines) <= gpu.LINES
    assert max(map(len, lines)) <= 180


FAKE_TESTS = """
import os, pytest, time
def test_passes(): pass
def test_fails(): assert 1 + 1 == 3, "arithmetic"
def test_crashes(): os.abort()
def test_hangs(): time.sleep(60)
def test_loses_the_gpu(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.skip
def test_is_skipped(): pass
@pytest.mark.parametrize("n", range(4))
def test_goes_on(n): pass
"""


def test_contract_outlives_crashing_and_hanging_tests(tmp_path):
    (tmp_path / "test_fake.py").write_text(FAKE_TESTS)
    out = tmp_path / "contract.json"
    done = subprocess.run([sys.executable, ROOT / "scripts" / "contract", "--jobs", "2", "--patience", "5", "--seconds", "50",
                           "--out", out, tmp_path / "test_fake.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    result = json.loads(out.read_text())
    assert done.returncode == 1, done.stderr
    assert result["counts"] == {"passed": 5, "failed": 2, "crashed": 2, "skipped": 1}
    reasons = {name.rpartition("_")[2]: reason for name, reason in result["failures"].items()}
    assert "arithmetic" in reasons["fails"]
    assert reasons["crashes"] == "ended its process (exit -6)"
    assert reasons["hangs"].startswith("hung for")
    assert "illegal memory access" in reasons["gpu"]
    assert result["not_run"] == []


def test_cli_bench(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from tilewise.cli import app

    monkeypatch.setattr(run, "shapes", lambda device, quick: [TINY])
    monkeypatch.setitem(run.SECONDS, "cpu", 0.1)
    done = CliRunner().invoke(app, ["bench", "--quick", "--device", "cpu", "--out", str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    assert "d16     64 causal  fwd" in done.output
    assert json.loads((tmp_path / "b.json").read_text())["rows"]
    assert CliRunner().invoke(app, ["bench", "--device", "abacus"]).exit_code == 2
