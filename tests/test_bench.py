"""Benchmarks: times are paired, what is wrong is not timed, a result names what it is and can be continued."""
import json
import time
from dataclasses import asdict, replace

import pytest
import torch
from support.halved import Halved
from typer.testing import CliRunner

import tilewise as tw
from tilewise.bench import attention, peers, record, suite, table, timing, workers
from tilewise.bench.contest import BACKWARD, BOTH, FORWARD, PASSES, Entrant, race
from tilewise.bench.gate import Gate
from tilewise.bench.shapes import Shape, of_the_paper
from tilewise.bench.suite import Trial, Wanted
from tilewise.bench.timing import Timing
from tilewise.cli import app

CPU = torch.device("cpu")
TINY = Shape(1, 64, 4, 2, 16, True, "float32")
HERE = Wanted(CPU, quick=True)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- times -------------------------------------------------------------------------------------------------------------

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
    assert timing.times_faster(a, b) == {"median": 2.0, "quartiles": (2.0, 2.0)}
    assert timing.times_faster(a, Timing([9.0], [9.0]))["median"] == 3.0
    assert Timing([7.0], [7.0]).quartiles == (7.0, 7.0)
    assert timing.minus(b, a) == Timing([1.0, 10.0, 2.0, 3.0, 1e-9], [1e-9] * 5)
    assert timing.minus(Timing([9.0], [1.0]), a) == Timing([6.0], [0.5])


# ---- contests ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [TINY, Shape(2, 40, 2, 2, 8, False, "float32")], ids=str)
def test_every_peer_computes_attention_or_says_why_not(shape):
    gate, found = Gate(*shape.draw(CPU, 0), shape.causal), {peer.name: peer for peer in peers.discover(CPU)}
    assert {"sdpa flash", "flex", "flash_attn", "flash_attn 3", "flash_attn 4", "xformers", "standard"} <= set(found)
    for peer in found.values():
        if peer.attend is None:
            assert peer.reason
        elif peer.name != "flex":       # which compiles for half a minute
            attend = attention.given_bhsd(peer.attend) if peer.wants_bhsd else peer.attend
            assert all(verdict.ok for verdict in gate.verdicts(attend)), peer.name


def test_a_library_that_does_not_load_says_why(monkeypatch):
    gpu = torch.device("cuda")
    assert peers.function_of("no_such_library.part", "f", gpu) == (None, "it is not installed")
    monkeypatch.setattr("importlib.import_module", lambda name: 1 / 0)
    assert peers.function_of("json", "f", gpu)[1].startswith("ZeroDivisionError")
    assert peers.function_of("json", "f", CPU) == (None, peers.CUDA_ONLY)


def test_who_is_wrong_or_raises_is_reported_and_not_timed():
    calls = []

    def shifted(q, k, v, causal):
        calls.append("shifted")
        return tw.attention(q, k, v, causal=causal) + 1e-3

    def raising(q, k, v, causal):
        raise RuntimeError("no such kernel\nmore words")

    field = [peers.ours("tiled")._replace(name="tilewise"), peers.standard(), peers.Contender("shifted", shifted),
             peers.Contender("raising", raising), peers.Contender("absent", None, "not installed"),
             peers.standard()._replace(name="forward only", no_gradients="it has none")]
    found = attention.measure(TINY, field, CPU, seconds=0.05)
    for mode in PASSES:
        states = {name: entry["state"] for name, entry in found[mode]["contenders"].items()}
        assert states == {"tilewise": "timed", "standard": "timed", "shifted": "wrong", "raising": "refused",
                          "absent": "absent", "forward only": "timed" if mode == FORWARD else "refused"}
        assert "standard" in found[mode]["times_faster"]
        assert "shifted" not in found[mode]["times_faster"]
    entries = found[BOTH]["contenders"]
    assert "out: error 1.0e-03" in entries["shifted"]["reason"]
    assert entries["raising"]["reason"] == "RuntimeError: no such kernel"
    assert entries["forward only"]["reason"] == "it has none"
    assert calls == ["shifted"]
    assert entries["tilewise"]["rounds"] >= 3
    assert entries["tilewise"]["tflops"] == pytest.approx(3.5 * TINY.flops() / entries["tilewise"]["seconds"] / 1e12)
    text = "\n".join(table.lines(Trial("part", "a case", {}, PASSES, lambda: found).rows(found)))
    assert "shifted: wrong: out: error" in text
    assert "absent: absent: not installed" in text


def test_wrong_gradients_alone_are_seen():
    gate = Gate(*TINY.draw(CPU, 0), True)
    verdicts = gate.verdicts(lambda q, k, v, causal: tw.attention(q, Halved.apply(k), v, causal=causal))
    assert [verdict.name for verdict in verdicts if not verdict.ok] == ["dk"]


def test_yardsticks_are_scaled_to_our_work():
    def sleeping(seconds):
        return {FORWARD: lambda turn: time.sleep(seconds)}

    entrants = [Entrant("tilewise", sleeping(0.01), list), Entrant("copy", sleeping(0.01), factor=10.0)]
    (found,) = race(entrants, CPU, (FORWARD,), seconds=0.1).values()
    assert found["contenders"]["copy"]["yardstick"]
    assert "yardstick" not in found["contenders"]["tilewise"]
    assert found["contenders"]["copy"]["seconds"] >= 0.1
    assert 3 < found["times_faster"]["copy"]["median"] < 30


def test_flops_are_the_fields():
    assert Shape(2, 8, 3, 3, 4, False, "float32").flops() == 4 * 2 * 3 * 8 * 8 * 4
    assert Shape(2, 8, 3, 3, 4, True, "float32").flops() == 2 * 2 * 3 * 8 * 8 * 4


def test_the_papers_protocol():
    found = of_the_paper(torch.device("cuda"))
    assert {(s.batch * s.seqlen, s.heads * s.head_dim, s.dtype) for s in found} == {(16384, 2048, "bfloat16")}
    assert {(s.head_dim, s.seqlen, s.causal) for s in found} == {
        (d, n, c) for d in (64, 128, 256) for n in (512, 1024, 2048, 4096, 8192, 16384) for c in (True, False)}


# ---- results -----------------------------------------------------------------------------------------------------------

def trial(name, calls, modes=(FORWARD,), fails=False):
    def measure():
        calls.append(name)
        if fails:
            raise MemoryError("too large")
        entry = {"state": "timed", "reason": "", "seconds": 1.0, "quartiles": [1.0, 1.0]}
        return {mode: {"contenders": {"tilewise": entry}, "times_faster": {}} for mode in modes}
    return Trial("part", name, {"seqlen": 3}, modes, measure)


@pytest.fixture
def trials(monkeypatch):
    """Replaces a benchmark's cases: trials(which, ...); gives the names of those that have been measured."""
    def replaced(*which):
        monkeypatch.setattr(suite, "trials", lambda name, wanted: list(which))
    return replaced


def test_a_result_says_what_it_is_and_outlives_a_failing_case(trials, tmp_path):
    calls, steps, out = [], [], tmp_path / "sub" / "result.json"
    trials(trial("a", calls, (FORWARD, BACKWARD)), trial("b", calls, fails=True))
    result = suite.run("attention", HERE, out=out, progress=lambda *step: steps.append(step))
    assert record.load(out) == json.loads(json.dumps(result))
    assert [row["case"] for row in result["rows"]] == ["a forward", "a backward", "b forward"]
    assert result["rows"][1]["setting"] == {"seqlen": 3, "mode": "backward"}
    assert result["rows"][2]["contenders"] == {"tilewise": {"state": "refused", "reason": "MemoryError: too large"}}
    assert (result["benchmark"], result["device"], result["quick"], result["complete"]) == ("attention", "cpu", True, True)
    assert {"GPU", "CPU", "triton", "torch"} <= result["machine"].keys()
    assert result["environment"]["threads"] == str(torch.get_num_threads())
    assert suite.TOO_SMALL in result["lines"]
    assert steps[0] == ("part", 0, 2, "a")
    assert steps[-1] == ("part", 2, 2, "")


def test_bars_stand_beside_what_they_are_promised_for(trials):
    entry = {"state": "timed", "reason": "", "seconds": 1.0, "quartiles": [1.0, 1.0]}

    def measure():
        return {FORWARD: {"contenders": {"tilewise": {**entry}, "sdpa": {**entry}},
                          "times_faster": {"sdpa": {"median": 1.0, "quartiles": [1.0, 1.0]}}}}

    bars = {(FORWARD, "sdpa"): 1.5, (FORWARD, "tilewise"): 3.0, (FORWARD, "absent"): 2.0}
    trials(Trial("part", "a", {}, (FORWARD,), measure, bars))
    full, quick = (suite.run("attention", replace(HERE, quick=quick))["rows"][0] for quick in (False, True))
    assert full["times_faster"]["sdpa"]["bar"] == 1.5
    assert full["contenders"]["tilewise"]["bar"] == 3.0
    assert "bar" not in quick["times_faster"]["sdpa"]
    assert "bar" not in quick["contenders"]["tilewise"]


def test_nothing_begins_without_time_and_resuming_measures_only_what_is_missing(trials, tmp_path):
    calls, out = [], tmp_path / "result.json"
    every = [trial("a", calls), trial("failed", calls, fails=True), trial("b", calls)]
    trials(*every[:2])
    suite.run("attention", HERE, out=out)
    trials(*every)
    result = suite.run("attention", HERE, out=out, seconds=-1.0, resume=True)
    assert not result["complete"]
    assert result["lines"][-1] == "2 rows are not measured yet"
    every[1] = trial("failed", calls)
    trials(*every)
    result = suite.run("attention", HERE, out=out, resume=True)
    assert calls == ["a", "failed", "failed", "b"]
    assert result["complete"]
    assert [row["case"] for row in result["rows"]] == ["a forward", "failed forward", "b forward"]
    suite.run("attention", HERE, out=out)
    assert len(calls) == 7


def test_rows_of_other_conditions_are_not_continued(trials, tmp_path):
    out = tmp_path / "result.json"
    trials(trial("a", []))
    result = suite.run("attention", HERE, out=out)
    record.write(out, {**result, "commit": "abc", "machine": {**result["machine"], "CPU": "a 6502", record.PASSING: "9"}})
    with pytest.raises(ValueError, match=r"--resume: .*CPU: a 6502, now .*commit: abc, now") as caught:
        suite.run("attention", HERE, out=out, resume=True)
    assert record.PASSING not in str(caught.value)
    with pytest.raises(ValueError, match="quick: True, now False"):
        suite.run("attention", replace(HERE, quick=False), out=out, resume=True)


def test_other_files_are_no_results(tmp_path):
    (tmp_path / "old.json").write_text('{"rows": [], "lines": []}')
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"old.json: expected a result of `tilewise bench`, this has no benchmark, device"):
        record.load(tmp_path / "old.json")
    with pytest.raises(ValueError, match=r"broken.json: expected the JSON of a benchmark"):
        record.load(tmp_path / "broken.json")


def test_tables():
    entry = {"state": "timed", "reason": "", "seconds": 0.002, "quartiles": [0.001, 0.003], "tflops": 0.5}
    peer, absent = entry | {"seconds": 0.004}, {"state": "absent", "reason": "not here"}
    row = {"part": "speed", "case": "N 8 float32 forward", "setting": {},
           "contenders": {"tilewise": entry, "sdpa flash": peer, "jax": absent, "x": absent},
           "times_faster": {"sdpa flash": {"median": 2.0, "quartiles": [1.5, 2.5], "bar": 1.2}}}
    upper, head, line, why = table.lines([row])
    assert upper.strip() == "sdpa"
    assert head.split() == ["speed", "ours", "GFLOP/s", "flash"]
    assert line.split() == ["N", "8", "fp32", "fwd", "2", "ms", "500", "2.00"]
    assert why.strip() == "jax, x: absent: not here"
    late = {"state": "timed", "reason": "", "seconds": 4.0, "quartiles": [4.0, 4.0], "bar": 3.0}
    built = {**row, "contenders": {"tilewise": late}, "times_faster": {}}
    assert table.lines([built])[-1].strip() == "! N 8 fp32 fwd: 4 s, promised 3 s"


def test_work_is_divided_without_loss():
    items = list(range(7))
    assert sorted(x for i in range(3) for x in workers.part(items, f"{i}/3")) == items
    assert workers.part(items, None) == items


def test_a_process_that_fails_or_hangs_is_reported():
    with pytest.raises(RuntimeError, match=r"part\(\) missing 1 required positional argument"):
        workers.apart("workers", "part", [1, 2])
    with pytest.raises(RuntimeError, match="ended after 0 s"):
        workers.apart("workers", "part", [1, 2], "0/2", patience=0.01)


# ---- the command -------------------------------------------------------------------------------------------------------

def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_commands_share_their_options(trials, tmp_path):
    trials(trial("a", []))
    out = tmp_path / "b.json"
    for name in suite.BENCHMARKS:
        done = bench(name, "--quick", "--device", "cpu", "--out", out)
        assert done.exit_code == 0, done.output
        assert json.loads(out.read_text())["benchmark"] == name
    bench("serving", "--quick", "--device", "cpu", "--out", out)
    assert "a fwd" in bench("show", out).output
    done = bench("serving", "--quick", "--device", "cpu", "--out", out, "--resume")
    assert done.exit_code == 0, done.output
    done = bench("decode", "--quick", "--device", "cpu", "--out", out, "--resume")
    assert done.exit_code == 2
    assert "benchmark: serving, now decode" in done.output
    assert "--resume: expected --out" in bench("decode", "--resume").output
    assert bench("decode", "--device", "abacus").exit_code == 2
    assert '--lengths: expected numbers such as "64,128"' in bench("attention", "--lengths", "64;").output


def test_alone_it_is_quick_and_says_what_there_is(trials, monkeypatch):
    trials(trial("a", []))
    done = bench()
    assert done.exit_code == 0, done.output
    assert "a fwd" in done.output
    assert "tilewise bench all --quick" in done.output


def test_all_of_them_write_a_file_each(trials, tmp_path, monkeypatch):
    trials(replace(trial("a", []), part="attention", setting=asdict(TINY)))
    done = bench("all", "--quick", "--device", "cpu", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    names = [name for name in suite.BENCHMARKS if name != "instructions"]       # which take minutes
    assert {path.stem for path in tmp_path.glob("*.json")} == {*names, "traffic", "roofline"}
    assert str(tmp_path / "index.html") in done.output.replace("\n", "")
    assert 'id="roofline"' in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_result_is_compared_with_an_earlier_one(trials, tmp_path, monkeypatch):
    trials(trial("a", []))
    bench("attention", "--device", "cpu", "--out", tmp_path / "old.json")
    done = bench("attention", "--device", "cpu", "--against", tmp_path / "old.json")
    assert done.exit_code == 0, done.output
    assert "none fails" in done.output
