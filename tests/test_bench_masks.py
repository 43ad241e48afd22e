"""The benchmark of masks and score functions: it times what it says, only what is right, and writes what it has."""
import json
import sys
from dataclasses import replace

import pytest
import torch
from support.halved import Halved

import tilewise as tw
from tilewise.bench import masks
from tilewise.trace.graph import lower

CPU = torch.device("cpu")
TINY = masks.Sizes(functions=96, classified=(2048,), flex_from=2048, sparse=256, sparse_heads=1, captured=64, repeats=2,
                   seconds=0.05, head_dim=16, block=32)
SUMMARY = {"seconds", "quartiles", "host_seconds", "rounds"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("make", [lambda i: tw.mask_mod(masks.new_mask(i)).element,
                                  lambda i: tw.score_mod(masks.new_score(i)).expr])
def test_new_functions_are_new_graphs_of_one_size(make):
    texts = {lower([[make(index)]]).text for index in range(40)}
    assert len(texts) == 40
    assert len({text.count("(") for text in texts}) == 1


def test_new_mask_functions_are_causal():
    for index in (0, 5, 255):
        assert torch.equal(tw.mask_mod(masks.new_mask(index)).dense(1, 1, 12, 12), tw.causal().dense(1, 1, 12, 12))


def test_functions():
    row = masks.functions(TINY, CPU)
    for what in ("mask", "score"):
        assert row[what]["state"] == "timed", row[what]["reason"]
        for which in ("new_function", "new_length"):
            assert row[what][which].keys() == {"first", "again", "beyond"}
            assert row[what][which]["beyond"]["rounds"] == 2
            assert row[what][which]["again"]["seconds"] > 0
    assert row["flex"]["state"] == "timed" or row["flex"]["reason"]
    assert len(masks.function_lines(row)) == 4


def test_flex_that_fails_is_left_out_with_its_reason(monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", failing)
    row = masks.flex(96, TINY, CPU)
    assert row == {"state": "refused", "reason": "RuntimeError: not on this machine"}


def test_classification_in_processes_of_their_own():
    ours, *others = masks.classification(TINY)
    assert ours["who"] == "tilewise"
    assert ours["state"] == "timed", ours["reason"]
    assert ours["tiles"] == 64**2
    assert ours["wrong"] == 0
    assert 64 <= ours["kept"] <= 64 * 65 // 2
    assert ours.keys() >= SUMMARY
    assert [(row["who"], row["length"]) for row in others] == [("create_block_mask", 2048)]
    if others[0]["state"] == "timed":
        assert others[0]["kept"] == ours["kept"]
        assert others[0]["within"]
    if sys.platform == "linux":
        assert 0 <= ours["bytes"] < 2**28
    assert len(masks.classification_lines([ours, *others])) == 3


def test_a_process_that_fails_or_hangs_is_reported():
    assert "KeyError" in masks.classified("nobody", 64, TINY)["reason"]
    assert masks.classified("tilewise", 64, TINY, patience=0.01)["reason"] == "ended after 0 s"


def test_misjudged_tiles_are_seen():
    classes = tw.causal().classify(1, 1, 64, 64, 8, 8)[0, 0]
    assert masks.misjudged(classes, masks.causal, 64, 8) == (0, 0)
    assert masks.misjudged(torch.full_like(classes, 2), masks.causal, 64, 8)[0] > 0
    assert masks.misjudged(torch.zeros_like(classes), masks.causal, 64, 8)[0] > 0
    wrong, loose = masks.misjudged(torch.ones_like(classes), masks.causal, 64, 8)
    assert wrong == 0
    assert loose > 0


def test_block_sparse():
    row = masks.block_sparse(TINY, CPU)
    assert row["patterns"].keys() == {"full", "butterfly", "local+global", "bigbird"}
    for name, entry in row["patterns"].items():
        assert entry["state"] == "timed", entry["reason"]
        assert entry["forward"].keys() >= SUMMARY
        if name != "full":
            assert 0 < entry["density"] < 1
            assert entry["both"]["of_ideal"] == pytest.approx(entry["both"]["of_full"] / entry["density"])
    assert row["patterns"]["butterfly"]["density"] == 4 / 8
    assert len(masks.sparse_lines(row)) == 5


def test_captured():
    row = masks.captured(TINY, CPU)
    assert row["tables"].keys() == {"relative position", "pair bias", "scalar per head"}
    for entry in row["tables"].values():
        assert entry["state"] == "timed", entry["reason"]
        assert entry["ratio"] > 0
    assert row["tables"]["relative position"]["shape"] == [4, 127]
    assert len(masks.captured_lines(row)) == 4


def test_what_is_wrong_is_not_timed(monkeypatch):
    tensors, dout = masks.draw(64, 1, 16, CPU)
    work = masks.Work(tensors, dout, mask=masks.causal)
    assert masks.faults(work) == ""
    assert "out: error" in masks.faults(replace(work, blocks=tw.window(3, 0)))
    assert "dq: error" in masks.faults(replace(work, blocks=tw.window(3, 0)))

    monkeypatch.setattr(masks, "faults", lambda work: "out: error 1, allowed 0")
    row = masks.captured(TINY, CPU)
    assert {entry["state"] for entry in row["tables"].values()} == {"wrong"}
    assert "ratio" not in row["tables"]["pair bias"]
    assert "wrong: out: error 1" in masks.captured_lines(row)[1]


def test_wrong_gradients_of_a_table_alone_are_seen():
    class Mistaken(masks.Work):
        def forward(self, turn=0):
            table = Halved.apply(self.tensors["table"])
            return tw.attention(*(self.tensors[name] for name in "qkv"), score_mod=self.score(table))

    tensors, dout = masks.draw(48, 2, 16, CPU)
    (shape, score), table = masks.tables(48, 2)["scalar per head"], torch.ones(2, requires_grad=True)
    assert shape == (2,)
    assert masks.faults(Mistaken(tensors | {"table": table}, dout, score=score)).startswith("dtable: error")


def test_one_part_may_fail(monkeypatch, tmp_path):
    def failing(sizes, device):
        raise MemoryError("too large")

    monkeypatch.setattr(masks, "functions", failing)
    monkeypatch.setattr(masks, "classification", lambda sizes: [])
    result = masks.benchmark(TINY, CPU, tmp_path / "sub" / "masks.json")
    stored = json.loads((tmp_path / "sub" / "masks.json").read_text())
    assert stored["lines"] == result["lines"]
    assert stored["functions"] == {"error": "MemoryError: too large"}
    assert "functions: MemoryError: too large" in stored["lines"]
    assert stored["captured"]["tables"]["pair bias"]["state"] == "timed"
    assert {"machine", "commit", "date"} <= stored.keys()
    assert max(map(len, stored["lines"])) <= 128


def test_main(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(masks, "benchmark", lambda sizes, device, out, progress: {"lines": [str(sizes.sparse), str(device)]})
    masks.main(["--quick", "--device", "cpu"])
    assert capsys.readouterr().out.split() == [str(masks.QUICK.sparse), "cpu"]


def test_cli_bench_masks(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from tilewise.cli import app

    monkeypatch.setattr(masks, "QUICK", TINY)
    monkeypatch.setattr(masks, "functions", lambda sizes, device: {})
    monkeypatch.setattr(masks, "classification", lambda sizes: [])
    done = CliRunner().invoke(app, ["bench", "--masks", "--quick", "--device", "cpu", "--out", str(tmp_path / "m.json")])
    assert done.exit_code == 0, done.output
    assert "butterfly" in done.output
    assert json.loads((tmp_path / "m.json").read_text())["block_sparse"]
