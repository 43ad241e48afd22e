"""The papers' own benchmarks: every printed value has its case, wrong methods are not timed, tables say what is cut."""
import json
from dataclasses import replace

import pytest
import torch
from support.backends import AVAILABLE
from support.halved import Halved

import tilewise as tw
from tilewise.bench import suite
from tilewise.bench.contest import PASSES
from tilewise.bench.paper import (
    figure,
    flash_attention,
    flash_attention_2,
    flash_decoding,
    memory,
    methods,
    passes,
    protocols,
    published,
    tables,
)
from tilewise.bench.paper.inputs import SAMPLE, Inputs, Setting
from tilewise.bench.shapes import Shape
from tilewise.bench.suite import Wanted

CPU, PAPER = Wanted(torch.device("cpu")), Wanted(torch.device("cuda"))
FUSED = Setting(2, 128, 2, 16, "float32", dropout=0.1, padding=True)

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")]


def rows_of(protocol, wanted):
    """The rows of all its trials, as if nobody had taken part."""
    nobody = {mode: {"contenders": {}, "times_faster": {}} for mode in (*PASSES, memory.MEMORY)}
    return [row for trial in protocol.trials(wanted) for row in trial.rows(nobody)]


@pytest.mark.parametrize("name, rows", [("flash_attention", 130), ("flash_attention_2", 108), ("flash_decoding", 10)])
def test_every_printed_value_has_its_case(name, rows):
    found = rows_of({"flash_attention": flash_attention, "flash_attention_2": flash_attention_2,
                     "flash_decoding": flash_decoding}[name], PAPER)
    assert len(found) == len({row["case"] for row in found}) == rows
    assert sum(len(row["published"]) for row in found) == len(published.cells(name))
    assert all(entry["hardware"] for row in found for entry in row["published"].values())


def test_values_stand_where_the_papers_have_them():
    assert len(published.cells("flash_attention")) == 1213
    of = {row["case"]: row["published"] for protocol in protocols.PROTOCOLS for row in rows_of(protocol, PAPER)}
    assert of["tables 9-11 N 1024 forward"]["FlashAttention, A100-40GB"]["seconds"] == pytest.approx(0.82e-3)
    assert of["tables 9-11 N 65536 forward+backward"].keys() == {"FlashAttention, A100-40GB", "BlockSparseFlash, A100-40GB"}
    assert of["tables 18-20 N 128 forward+backward"]["PyTorch, A100-40GB"]["seconds"] == pytest.approx(0.67e-3)
    assert of["table 21 N 4096 memory"]["FlashAttention, A100-40GB"]["bytes"] == 836 * 2**20
    assert of["D 128 full N 16384 forward+backward"]["FlashAttention-2, A100"]["tflops"] == 203
    assert of["D 256 causal N 8192 forward"]["cuDNN, H100"]["tflops"] == 497
    assert of["B 1 N 131072 forward"]["Flash-Decoding, A100"]["seconds"] == pytest.approx(106.6e-6)


def test_sizes_are_the_papers():
    assert {(s["batch"], s["heads"], s["head_dim"], s["dtype"]) for s in settings(flash_attention)} == {(16, 8, 64, "float16")}
    assert {(s["batch"] * s["seqlen"], s["heads"] * s["head_dim"], s["dtype"]) for s in settings(flash_attention_2)} == {
        (16384, 2048, "float16")}
    assert [s["batch"] * s["seqlen"] for s in settings(flash_decoding)] == [65536] * 9 + [131072]
    assert not [line for protocol in protocols.PROTOCOLS for line in protocol.CUTS.lines(PAPER.device, False)]
    for wanted in (CPU, replace(CPU, quick=True)):
        lines = protocols.lines([row for protocol in protocols.PROTOCOLS for row in rows_of(protocol, wanted)], wanted)
        assert sum("cut for this machine: dtype float32 (paper: float16)" in line for line in lines) == 3
        assert max(map(len, lines)) <= 128


def settings(protocol):
    return [trial.setting for trial in protocol.trials(PAPER)]


@pytest.mark.parametrize("seqlen", flash_attention.LENGTHS)
def test_the_butterfly_keeps_to_its_budget(seqlen):
    layout = methods.butterfly(seqlen)
    share = min(1 / 8, 256 / seqlen)
    assert layout.diagonal().all()
    assert layout.float().mean().item() == pytest.approx(max(share, min(1.0, methods.BLOCK / seqlen)))


@pytest.fixture
def tiny(monkeypatch):
    """A trial of each kind, through the suite."""
    of = [flash_attention.trial(9, FUSED, CPU, 0.02),
          flash_attention_2.trial(Shape(1, 64, 2, 2, 16, True, "float32"), CPU, 0.02),
          flash_attention.trial(21, replace(FUSED, dropout=0.0, padding=False, seqlen=512), CPU, 0.02),
          flash_decoding.trial((4, 16384), flash_decoding.Setting(2, 64, "float32"), CPU, 0.02)]
    monkeypatch.setattr("tilewise.bench.attention.discover", lambda device: [])
    monkeypatch.setattr("tilewise.bench.paper.trials", lambda wanted: of)
    return of


def test_end_to_end(tiny, tmp_path):
    result = suite.run("paper", CPU, out=tmp_path / "paper.json")
    assert result["complete"]
    assert json.loads((tmp_path / "paper.json").read_text())["rows"][0]["case"] == "tables 9-11 N 128 forward"
    by_case = {row["case"]: row for row in result["rows"]}
    assert len(by_case) == 3 + 3 + 1 + 1
    for row in by_case.values():
        states = {name: entry["state"] for name, entry in row["contenders"].items()}
        assert states.pop("flex", "absent") == "absent"
        assert set(states.values()) == {"timed"}, row
        assert next(iter(states)) == "tilewise"
        for ratio in row["times_faster"].values():
            assert 0 < ratio["quartiles"][0] <= ratio["median"] <= ratio["quartiles"][1]
    assert by_case["tables 9-11 N 128 backward"]["contenders"].keys() >= {"tilewise block-sparse", "standard", "sdpa"}
    assert by_case["B 4 N 16384 forward"]["contenders"].keys() == {"tilewise", "tilewise unsplit", "standard", "sdpa"}
    assert by_case["D 16 causal N 64 forward"]["contenders"]["tilewise"]["tflops"] > 0
    text = "\n".join(result["lines"])
    assert "table 9: forward, dropout 0.1, padding mask; ms" in text
    assert "Flash-Decoding*" in text
    assert max(map(len, result["lines"])) <= 128
    if AVAILABLE[-1] == "cpu":
        entries = by_case["table 21 N 512 memory"]["contenders"]
        held = {name: entries[name]["bytes"] for name in ("tilewise", "standard")}
        assert held["standard"] > 2 * 2 * 512**2 * 4                    # a matrix of scores for each head of each sequence
        assert held["tilewise"] < held["standard"]


def test_resuming_keeps_rows(tiny, monkeypatch, tmp_path):
    only = tiny[3:]
    monkeypatch.setattr("tilewise.bench.paper.trials", lambda wanted: only)
    first = suite.run("paper", CPU, out=tmp_path / "paper.json")
    again = suite.run("paper", CPU, out=tmp_path / "paper.json", resume=True)
    assert again["rows"] == json.loads(json.dumps(first["rows"]))


@pytest.mark.parametrize("planted, name", [
    (lambda q, k, v, mask, p: 1.1 * SDPA(q, k, v, mask, p), "out"),
    (lambda q, k, v, mask, p: SDPA(q, Halved.apply(k), v, mask, p), "dk"),
    (lambda q, k, v, mask, p: SDPA(q, k, v, None, p), "out"),           # forgets the padding
    (lambda q, k, v, mask, p: SDPA(q, k, v, mask), "dropout"),          # forgets dropout
    (lambda q, k, v, mask, p: SDPA(q, k, v, mask, 0.5 if p else 0.0), "dropout")], ids=["out", "dk", "mask", "kept", "half"])
def test_a_wrong_method_is_not_timed(monkeypatch, planted, name):
    monkeypatch.setattr(methods, "scaled_dot_product_attention", planted)
    found = passes.measure(FUSED, CPU, 0.02)
    for mode in PASSES:
        entry = found[mode]["contenders"]["sdpa"]
        assert entry["state"] == "wrong"
        assert f"{name}: " in entry["reason"]
        assert "seconds" not in entry
        assert "seconds" in found[mode]["contenders"]["tilewise"]


SDPA = torch.nn.functional.scaled_dot_product_attention


def test_what_does_not_fit_is_refused(monkeypatch):
    matrices = methods.MATRICES * FUSED.matrix_bytes
    monkeypatch.setattr(passes, "free_bytes", lambda device: matrices - 1)
    monkeypatch.setattr(passes, "TENSORS", 1)
    states = {e.name: (e.state, e.reason) for e in passes.entrants(FUSED, CPU) if not e.calls}
    assert states["standard"][0] == "refused"
    assert "matrices of scores need" in states["standard"][1]
    monkeypatch.setattr(passes, "free_bytes", lambda device: 0)
    assert {e.state for e in passes.entrants(FUSED, CPU)} == {"refused"}
    monkeypatch.setattr(flash_decoding, "lack", lambda *_: "keys and values need more")
    trial = flash_decoding.trial((1, 131072), flash_decoding.Setting(1, 64, "float32"), CPU, 0.02)
    (row,) = suite.attempt(trial, CPU)
    assert row["contenders"]["tilewise"] == {"state": "refused", "reason": "MemoryError: keys and values need more"}
    assert row["published"]


@pytest.mark.parametrize("setting", [FUSED, replace(FUSED, dropout=0.0, padding=False, seqlen=SAMPLE + 32)],
                         ids=["fused", "plain"])
def test_truth_is_that_of_the_reference(setting):
    """All queries' results by the library's own definition, at those that are checked."""
    x = Inputs(setting, CPU.device)
    right = x.sampled(methods.on_backend("reference", x))
    for name, t in x.standard(torch.float64).items():
        torch.testing.assert_close(right[name].double(), t, atol=2e-6, rtol=2e-5)
    assert (x.lengths <= setting.seqlen).all()
    assert (x.lengths >= setting.seqlen - 20).all()


def test_tables_and_the_picture(tmp_path):
    def entry(n, quantity):
        return {"state": "timed", "reason": "", quantity: 1e-6 * n}

    rows = []
    for row in rows_of(flash_attention, PAPER):
        quantity = "bytes" if row["setting"]["table"] == 21 else "seconds"
        own = {name: entry(row["setting"]["seqlen"], quantity) for name in ("tilewise", "tilewise block-sparse", "sdpa")}
        rows.append(row | {"contenders": own | {"flex": {"state": "wrong", "reason": "out: error 1"},
                                                "standard": {"state": "refused", "reason": "no room"}}})
    lines = flash_attention.lines(rows, PAPER)
    assert max(map(len, lines)) <= 128
    assert [line.split(":")[0] for line in lines if line.startswith("table")] == [f"table {n}" for n in range(9, 22)]
    line = next(line for line in lines if "FlashAttention, A100-40GB" in line)
    assert line.split()[2:] == ["0.04", "0.06", "0.21", "0.82", "2.85", "10.4", "41.7", "167", "671", "2682"]
    assert lines[-2:] == ["  flex: wrong: out: error 1", "  standard: refused: no room"]
    assert tables.cell({"state": "wrong", "reason": ""}, "seconds", 1) == "wrong"
    pytest.importorskip("matplotlib")
    figure.save(rows, tmp_path / "x.svg", "a GPU")
    text = (tmp_path / "x.svg").read_text()
    assert "tilewise block-sparse" in text
    assert "FlashAttention, A100" in text


def test_the_paper_runs_as_a_program(tiny, capsys, tmp_path):
    from tilewise.bench.paper.__main__ import main
    main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path / "paper.json")])
    assert "8 rows are not measured yet" in capsys.readouterr().out


def test_block_sparse_attention_is_what_its_gate_says():
    x = Inputs(replace(FUSED, seqlen=1024, dropout=0.0), CPU.device)
    assert isinstance(tw.block_mask(methods.butterfly(1024), block_size=methods.BLOCK), tw.BlockMask)
    sparse = next(m for m in methods.methods(x.setting, CPU) if m.sparse)
    assert all(v.ok for v in passes.check(sparse, x, sparse.prepare(x)))
    dense = sparse._replace(prepare=lambda x: methods.on_backend("tiled", x))
    assert not all(v.ok for v in passes.check(dense, x, dense.prepare(x)))
