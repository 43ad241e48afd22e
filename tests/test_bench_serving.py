"""The benchmark of decoding, packed batches and chunks: it times what it says, only what is right, and writes what it has."""
import json
from functools import partial

import pytest
import torch
from support.halved import Halved

import tilewise as tw
from tilewise.bench.serving import chunks, decode, packed, rivals, run
from tilewise.bench.serving.contest import ratio
from tilewise.bench.timing import Timing

CPU = torch.device("cpu")
TINY = rivals.Setting(2, 40, 4, 2, 16, 16, "float32", 0.02, 2.0)
TINY_MLA = rivals.Setting(3, 33, 4, 1, 24, 16, "float32", 0.02)
TINY_PACKED = packed.Setting(3, True, 2, 16, 4, 40, "float32", 0.02, 1.5)
TINY_CHUNKS = chunks.Setting(24, (5, 24), 20, 4, 2, 16, "float32", 0.02)

pytestmark = pytest.mark.usefixtures("one_thread")


def states(rows):
    return {name: entry["state"] for name, entry in rows.items()}


def after(world, new):
    """Standard attention with the context and so many new tokens."""
    k, v = (torch.cat([x[:, :world.setting.context], *[token] * new], 1)
            for x, token in ((world.cache.k, world.k_new), (world.cache.v, world.v_new)))
    return tw.attention(world.q, k, v, backend="reference")


@pytest.mark.parametrize("setting", [TINY, TINY_MLA], ids=str)
def test_everyone_decodes_the_same_and_grows(setting):
    world = rivals.World(setting, CPU)
    found = [d for d in rivals.decoders(world) if d.attend is not None]
    assert len(found) == (7 if setting is TINY else 6)
    expected = [after(world, new) for new in range(3)]
    for decoder in found:
        for call, new in ((decoder.attend, 0), (decoder.step, 1), (decoder.step, 2)):
            torch.testing.assert_close(call(0), expected[new], msg=lambda words, name=decoder.name: f"{name}: {words}")


def test_decode():
    row = decode.measure(TINY, CPU)
    assert set(states(row["attention"]).values()) == {"timed", "absent"}
    assert [name for name, state in states(row["attention"]).items() if state == "absent"] == ["flash_attn"]
    assert set(row["step"]) == set(row["attention"]) - {"standard"}
    for rows in (row["attention"], row["step"]):
        low, high = rows["sdpa"]["times_faster"]["quartiles"]
        assert 0 < low <= rows["sdpa"]["times_faster"]["median"] <= high
        assert "times_faster" not in rows["tilewise"]
    assert row["bytes"] == 2 * 2 * 40 * 2 * 16 * 4
    assert row["of_copy"] == pytest.approx(row["bandwidth"] / row["copy_bandwidth"])
    assert row["tokens_per_second"] == pytest.approx(2 / row["attention"]["tilewise"]["seconds"])
    assert row["than_sdpa"]["layout"] in ("sdpa", "sdpa contiguous")
    lines = decode.lines([row])
    assert "promised 2" in lines[3]
    assert "flash_attn, attention: absent: it runs on CUDA only" in lines[4]


def test_decoders_that_would_be_the_same_are_left_out():
    of_mla, of_mha = (decode.measure(setting, CPU)["attention"] for setting in
                      (TINY_MLA, rivals.Setting(1, 40, 2, 2, 16, 16, "float32", 0.02)))
    assert of_mla["sdpa contiguous"]["state"] == "absent"
    assert of_mla["sdpa folded"]["state"] == "timed"
    assert of_mha["sdpa folded"]["state"] == "absent"


def test_a_wrong_decoder_is_not_timed(monkeypatch):
    monkeypatch.setattr(rivals, "folded", lambda q, k, v: 1.01 * rivals.sdpa(q, k, v))
    row = decode.measure(TINY, CPU)
    for what in ("attention", "step"):
        assert row[what]["sdpa folded"]["state"] == "wrong"
        assert "seconds" not in row[what]["sdpa folded"]
    assert any("sdpa folded, attention: wrong: out: error" in line for line in decode.lines([row]))


def test_what_finds_no_memory_is_left_out(monkeypatch):
    size = TINY.nbytes()
    monkeypatch.setattr(rivals, "free_bytes", lambda device: size)
    row = decode.measure(TINY, CPU)
    assert row["attention"]["pages 16"]["state"] == "absent"
    assert "a copy of the cache needs" in row["attention"]["pages 16"]["reason"]
    assert "beside the cache" in row["attention"]["standard"]["reason"]
    assert row["attention"]["sdpa"]["state"] == "timed"
    monkeypatch.setattr(decode, "free_bytes", lambda device: size)
    row = decode.measure(TINY, CPU)
    assert row["state"] == "skipped"
    assert "third of the free" in decode.lines([row])[-1]


def test_settings_keep_the_promised_row():
    kept = [s for s in decode.settings(CPU) if s.promised]
    assert [(s.batch, s.heads, s.kv_heads, s.head_dim, s.context, s.promised) for s in kept] == [(1, 32, 8, 128, 32768, 2.0)]
    assert {s.promised for s in packed.settings(CPU)} == {1.5}
    assert len(decode.settings(torch.device("cuda"))) == 5 * 4 * 3


def test_warm_runs_ours(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(decode, "World", lambda setting, device: seen.append((setting.batch, setting.context)) or "a world")
    monkeypatch.setattr(decode, "decoders", lambda world: [rivals.Decoder("ours", seen.append, None)])
    decode.warm([TINY], CPU, "1/2")
    assert seen == [(1, 32768), 0]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("causal", [True, False])
def test_packed(causal):
    setting = packed.Setting(3, causal, 2, 16, 4, 40, "float32", 0.02, 1.5)
    row = packed.measure(setting, CPU)
    assert all(4 <= n <= 40 for n in row["lengths"])
    assert row["padding"] == pytest.approx(1 - sum(row["lengths"]) / (3 * max(row["lengths"])))
    assert set(states(row["contenders"]).values()) == {"timed", "absent"}
    for name in ("sdpa padded", "sdpa in a loop"):
        assert row["contenders"][name]["both"]["times_faster"]["median"] > 0
    assert "both" not in row["contenders"]["tilewise padded"]
    assert row["than_padded"]["promised"] == 1.5
    assert len(packed.lines([row])) == 8


def test_a_wrong_gradient_of_packed_sequences_is_not_timed(monkeypatch):
    def mistaken(lengths, causal, q, k, v):
        return in_a_loop(lengths, causal, q, k, Halved.apply(v))

    in_a_loop = packed.in_a_loop
    monkeypatch.setattr(packed, "in_a_loop", mistaken)
    entry = packed.measure(TINY_PACKED, CPU)["contenders"]["sdpa in a loop"]
    assert entry["state"] == "wrong"
    assert entry["reason"].startswith("dv: error")
    assert "forward" not in entry


def test_padded_and_packed_are_the_same_numbers():
    batch = packed.Batch(TINY_PACKED, CPU)
    for x, y in zip(batch.packed, batch.dense, strict=True):
        assert torch.equal(batch.flat(y), x)
    assert batch.dense.q.count_nonzero() == batch.packed.q.count_nonzero()


def test_chunks():
    row = chunks.measure(TINY_CHUNKS, CPU)
    assert states(row["prefill"]) == dict.fromkeys(("at once", "chunks of 5", "chunks of 24"), "timed")
    assert states(row["drafts"]) == dict.fromkeys(("tree", "one by one"), "timed")
    assert row["drafts"]["one by one"]["times_faster"]["median"] > 0
    assert len(chunks.lines([row])) == 7


def test_chunks_that_forget_a_token_are_not_timed(monkeypatch):
    monkeypatch.setattr(chunks, "in_chunks", lambda q, k, v, cache, size, turn: tw.attention(q, k.roll(1, 1), v, causal=True))
    row = chunks.measure(TINY_CHUNKS, CPU)
    assert row["prefill"]["chunks of 5"]["state"] == "wrong"
    assert "wrong: out: error" in chunks.lines([row])[2]


def test_ratios_are_paired():
    assert ratio(Timing([1.0, 2.0, 4.0], []), Timing([3.0, 6.0, 12.0], [])) == {"median": 3.0, "quartiles": (3.0, 3.0)}
    assert ratio(Timing([1.0, 2.0, 3.0], []), Timing([8.0], []))["median"] == 4.0


@pytest.fixture
def tiny(monkeypatch):
    for part, settings in ((decode, [TINY, TINY_MLA]), (packed, [TINY_PACKED]), (chunks, [TINY_CHUNKS])):
        monkeypatch.setattr(part, "settings", lambda device, quick=False, own=settings: own)


def test_one_setting_may_fail(tiny, monkeypatch, tmp_path):
    def failing(measure, setting, device):
        if setting is TINY_MLA:
            raise MemoryError("too large")
        return measure(setting, device)

    monkeypatch.setattr(decode, "measure", partial(failing, decode.measure))
    result = run.benchmark(CPU, out=tmp_path / "sub" / "serving.json")
    stored = json.loads((tmp_path / "sub" / "serving.json").read_text())
    assert stored["lines"] == result["lines"]
    assert [len(stored[part]) for part in ("decode", "packed", "chunks")] == [1, 1, 1]
    assert stored["failed"] == {f"decode: {TINY_MLA}": "MemoryError: too large"}
    assert f"decode: {TINY_MLA}: MemoryError: too large" in stored["lines"]
    assert {"machine", "commit", "date"} <= stored.keys()
    assert max(map(len, stored["lines"])) <= 128


def test_nothing_begins_without_time(tiny):
    result = run.benchmark(CPU, parts=["chunks"], seconds=-1.0)
    assert result["not_reached"] == [f"chunks: {TINY_CHUNKS}"]
    assert result["chunks"] == []
    assert result["lines"] == ["1 more not reached: there was no time left"]


def test_main(monkeypatch, capsys):
    def measured(device, *, quick, parts, seconds, out, progress):
        return {"lines": [str(device), str(quick), *parts]}

    monkeypatch.setattr(run, "benchmark", measured)
    run.main(["--quick", "--device", "cpu", "--parts", "packed,chunks"])
    assert capsys.readouterr().out.split() == ["cpu", "True", "packed", "chunks"]
    with pytest.raises(SystemExit):
        run.main(["--parts", "decode,nothing"])
    assert "expected some of decode,packed,chunks, got nothing" in capsys.readouterr().err


def test_cli_bench_serving(tiny, tmp_path):
    from typer.testing import CliRunner

    from tilewise.cli import app

    done = CliRunner().invoke(app, ["bench", "--serving", "--device", "cpu", "--out", str(tmp_path / "s.json")])
    assert done.exit_code == 0, done.output
    assert "sdpa padded" in done.output
    assert json.loads((tmp_path / "s.json").read_text())["decode"]
    done = CliRunner().invoke(app, ["bench", "--serving", "--masks"])
    assert done.exit_code == 2
