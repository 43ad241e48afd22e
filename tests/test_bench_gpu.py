"""The command for a machine with a GPU: a stage that crashes, hangs or fails does not cost the others; tuning."""
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tilewise.bench import __main__ as command
from tilewise.bench.suite import BENCHMARKS, Wanted

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu():
    """scripts/gpu as a module."""
    loader = importlib.machinery.SourceFileLoader("scripts_gpu", str(ROOT / "scripts" / "gpu"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = writes
    return module


def test_every_stage_calls_what_exists_with_options_that_it_takes(gpu, monkeypatch):
    stages = {stage for suite in gpu.SUITES.values() for stage in suite}
    assert len(stages) > 10
    for stage in stages:
        flag, module = stage.command[2:4]
        if flag != "-m":
            assert Path(stage.command[2]).exists()
        elif module == "tilewise.bench":
            arguments = [*stage.command[4:], "--out", "x", "--seconds", "5"]
            assert command.parser().parse_args(arguments).benchmark in BENCHMARKS
        else:
            assert importlib.util.find_spec(module)


def test_the_command(monkeypatch, capsys):
    asked = {}

    def run(name, wanted, **options):
        asked.update(options, name=name, wanted=wanted)
        return {"lines": ["a table"]}

    monkeypatch.setattr(command, "run", run)
    command.main(["attention", "--device", "cpu", "--quick", "--lengths", "64,128", "--also", "tiled", "--seconds", "9"])
    assert capsys.readouterr().out == "a table\n"
    assert asked["wanted"] == Wanted(CPU, True, (), (64, 128), ("tiled",))
    assert 0 < asked["seconds"] <= 9
    with pytest.raises(SystemExit):
        command.main(["decode", "--lengths", "64"])


def test_a_slice_compiles_its_share_and_outlives_failures(monkeypatch, capsys):
    ran = []

    def calls(wanted):
        return [lambda: ran.append(0), lambda: ran.append(1), lambda: 1 / 0, lambda: ran.append(3)]

    monkeypatch.setattr("tilewise.bench.decode.compilations", calls)
    for slice_ in ("0/2", "1/2"):
        command.main(["decode", "--device", "cpu", "--slice", slice_])
    assert sorted(ran) == [0, 1, 3]
    assert "ZeroDivisionError" in capsys.readouterr().out


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
    setting = {"head_dim": 64, "mask": "causal", "seqlen": 4096}
    row = tuning.tune(one, [default, fast, wrong, failing], "D 64", setting, CPU)
    states = {name: entry["state"] for name, entry in row["contenders"].items()}
    assert states == dict(zip(map(str, map(tuple, (default, fast, wrong, failing))), ("timed", "timed", "wrong", "refused"),
                              strict=True))
    assert "results: error" in row["contenders"][str(tuple(wrong))]["reason"]
    assert "shared memory" in row["contenders"][str(tuple(failing))]["reason"]
    assert out.tolist() == lse.tolist() == [1.0] * 4
    assert tuning.lines([row])[0].startswith(f"('forward', 64): Config{tuple(fast)},  # ")
    assert tuning.parsed("ptxas error") is None


def test_benchmarks_need_only_torch_triton_and_numpy():
    code = ("import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'hypothesis', 'matplotlib']));"
            "import importlib; [importlib.import_module(f'tilewise.bench.{name}') for name in sys.argv[1:]]")
    names = ["__main__", "smoke", *BENCHMARKS]
    names += ["tuning", "hopper.tuning", "hopper.decoding"] if importlib.util.find_spec("triton") else []
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
    full = {"state": "ok", "seconds": 1, "lines": ["x" * 500] * 99, "tail": ""}
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
