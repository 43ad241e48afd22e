"""The benchmark of the CPU backend: it times only what is right, holds ratios to their bars, and writes what it has."""
import json
from dataclasses import replace

import pytest
import torch
from support.backends import AVAILABLE
from support.halved import Halved
from typer.testing import CliRunner

import tilewise as tw
from tilewise.bench.cpu import butterfly, compiling, decode, dense, others, packed, plot, run, table
from tilewise.bench.cpu.figures import COST, FASTER, Ratio, figure, ratios
from tilewise.bench.peers import Contender
from tilewise.bench.serving import packed as serving_packed
from tilewise.bench.serving import rivals
from tilewise.bench.timing import Timing
from tilewise.cli import app

FORWARD = dense.Setting("forward", 40, 2, 16, "float32", "full", faster=1e-9, of_sgemm=1e9, seconds=0.02)
BOTH = dense.Setting("both", 40, 2, 16, "bfloat16", "causal", faster=1e9, seconds=0.02)
TINY = {dense: [FORWARD, BOTH], packed: [serving_packed.Setting(3, False, 2, 16, 4, 40, "float32", 0.02, 2.0)],
        decode: [rivals.Setting(1, 40, 4, 2, 16, 16, "float32", 0.02, 3.0)],
        butterfly: [butterfly.Setting("forward", 64, 16, 1, 16, seconds=0.02)],
        compiling: [compiling.Setting("causal", ("decode",), 1)], others: [replace(FORWARD, mask="causal")]}

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU backend is not what runs here")]


@pytest.fixture
def tiny(monkeypatch):
    for part, settings in TINY.items():
        monkeypatch.setattr(part, "settings", lambda quick, own=settings: own)
    monkeypatch.setattr(dense, "SGEMM", 32)
    monkeypatch.setattr(decode, "COPIED", 2**12)
    monkeypatch.setattr(others, "flex", lambda: Contender("flex", None, "takes long to compile"))


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "--cpu", *map(str, arguments)])


def test_end_to_end(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    done = bench("--out", tmp_path / "cpu.json")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert {"machine", "commit", "date", "device", "threads", "wait_policy"} <= result.keys()
    assert result["threads"] == 1
    assert [row["part"] for row in result["rows"]] == ["dense", *run.PARTS]
    assert not [row for row in result["rows"] if "error" in row]
    states = {(row["part"], name): entry["state"] for row in result["rows"] for name, entry in row["contenders"].items()}
    assert states.pop(("others", "flex")) == "absent"
    assert set(states.values()) == {"timed"}
    for row in result["rows"]:
        for of in row["figures"]:
            assert 0 < of["quartiles"][0] <= of["median"] <= of["quartiles"][1]
            assert of["met"] in ((None,) if of["bar"] is None else (True, False))
    assert [of["met"] for of in result["rows"][0]["figures"]] == [True, False]
    assert "flex: absent: takes long to compile" in done.output
    assert "times faster than SDPA, padded" in done.output
    assert (tmp_path / "cpu.svg").read_text().lstrip().startswith("<?xml")


def test_what_each_part_measures(tiny):
    words = {part: [f"{of['quantity']} {of['against']}" for of in part.measure(TINY[part][0])["figures"]]
             for part in (dense, packed, decode, butterfly, others)}
    assert words == {
        dense: ["times faster than SDPA", "share of the sgemm rate"],
        packed: ["times faster than SDPA, padded", "times faster than SDPA, in a loop"],
        decode: ["times faster than SDPA, cache as is", "times faster than SDPA, heads first", "share of a copy's bandwidth",
                      "share of a sum's bandwidth"],
        butterfly: ["cost over density x full attention"],
        others: ["times faster than standard", "times faster than tiled"]}


@pytest.mark.parametrize("setting", [FORWARD, BOTH], ids=str)
def test_a_wrong_contender_is_not_timed(monkeypatch, setting):
    def mistaken(q, k, v, **options):
        calls.append(options)
        return 1.1 * sdpa(q, k, v, **options)

    calls, sdpa = [], dense.scaled_dot_product_attention
    monkeypatch.setattr(dense, "scaled_dot_product_attention", mistaken)
    row = dense.measure(setting)
    assert row["contenders"]["sdpa"]["state"] == "wrong"
    assert "seconds" not in row["contenders"]["sdpa"]
    assert len(calls) == 1
    assert "seconds" in row["contenders"]["tilewise"]
    assert "SDPA" not in [of["against"] for of in row["figures"]]
    lines = table.lines([row | {"title": "attention", "case": str(setting)}])
    assert any("sdpa: wrong: out: error" in line for line in lines)


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    def mistaken(q, k, v, **options):
        return sdpa(q, Halved.apply(k), v, **options)

    sdpa = dense.scaled_dot_product_attention
    monkeypatch.setattr(dense, "scaled_dot_product_attention", mistaken)
    entry = dense.measure(BOTH)["contenders"]["sdpa"]
    assert entry["state"] == "wrong"
    assert entry["reason"].startswith("dk: error")


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_masks_and_their_functions_are_the_same(mask):
    setting = replace(FORWARD, mask=mask, window=7 if mask == "window" else 0)
    named, function = setting.masks()
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    expected, found = (tw.attention(q, k, v, mask=m, backend="reference") for m in (named, function))
    assert torch.equal(expected, found)
    torch.testing.assert_close(dense.sdpa(setting).forward(), dense.ours(setting).forward(), atol=1e-5, rtol=1e-5)


def test_ratios_are_paired_and_held_to_their_bars():
    timed = {"ours": Timing([1.0, 2.0, 4.0], []), "other": Timing([3.0, 6.0, 12.0], [])}
    kept, missing = Ratio(FASTER, "another", "other", "ours", 3.1, factor=2.0), Ratio(FASTER, "nobody", "absent", "ours")
    assert ratios([kept, missing], timed) == [{
        "quantity": "times faster than", "against": "another", "median": 6.0, "quartiles": (6.0, 6.0), "bar": 3.1,
        "at_most": False, "met": True}]
    assert figure(COST, "x", 1.4, (1.4, 1.4), 1.3)["met"] is False
    assert figure(COST, "x", 1.4, (1.4, 1.4))["met"] is None


def test_bars_of_the_full_sizes():
    of_decode = [(s.context, s.dtype, s.promised) for s in decode.settings() if s.promised]
    assert of_decode == [(32768, "float32", 3.0), (32768, "bfloat16", 3.0)]
    window = dense.settings()[-1]
    assert (window.seqlen, window.window, window.faster) == (8192, 512, 8.0)
    assert [s.of_sgemm for s in dense.settings() if s.of_sgemm] == [0.85] * 4
    assert sum(packed.settings()[0].lengths()) == 16547
    for part in run.PARTS.values():
        assert all(max(quick.seqlen, 1) <= 1024 for quick in part.settings(True) if hasattr(quick, "seqlen"))


def test_one_part_may_fail(tiny, monkeypatch, tmp_path):
    def failing(setting):
        raise MemoryError("too large")

    for part in run.PARTS.values():
        monkeypatch.setattr(part, "measure", failing)
    result = run.benchmark(quick=True, out=tmp_path / "sub" / "cpu.json")
    assert {row["error"] for row in result["rows"]} == {"MemoryError: too large"}
    assert any("MemoryError: too large" in line for line in result["lines"])
    assert run.TOO_SMALL in result["lines"]
    assert result["lines"][-1].startswith("no picture:")


def test_lines_are_short_and_tables_whole(tmp_path):
    of = [figure(COST, "density x full attention", 123.456, (100.0, 130.0), 1.3), figure(FASTER, "SDPA", 1.5, (1.2, 1.7), 1.05)]
    rows = [{"part": "dense", "title": "attention", "case": str(setting), "contenders": {}, "figures": of}
            for part in (dense, butterfly) for setting in part.settings()]
    assert max(map(len, table.lines(rows))) <= 128
    assert {line.count("|") for line in table.markdown(rows).splitlines()} == {8}
    pytest.importorskip("matplotlib")
    plot.save(rows, tmp_path / "x.svg", "a CPU")


def test_it_says_why_it_cannot_run(monkeypatch):
    assert "--device: expected cpu or auto with --cpu, got 'cuda'" in bench("--device", "cuda").output.replace("\n", " ")
    assert bench("--masks").exit_code == 2
    monkeypatch.setattr(run.doctor, "check_backend", lambda *_: run.doctor.Check("cpu", "cpu", None, "no C++ compiler"))
    done = bench()
    assert done.exit_code == 2
    assert "backend cpu: no C++ compiler" in done.output
