"""The benchmarks' cases: each measures what it says, and only what is right."""
import sys
from dataclasses import replace

import pytest
import torch
from support.backends import AVAILABLE
from support.halved import Halved

import tilewise as tw
from tilewise.bench import (
    caches,
    chunks,
    compiling,
    cpu,
    decode,
    first_calls,
    memory,
    packed,
    sparse,
    table_gradients,
    tiles,
    work,
)
from tilewise.bench.contest import BOTH, FORWARD, PASSES
from tilewise.bench.gate import faults
from tilewise.bench.peers import Contender, standard
from tilewise.bench.resident import GIVE_BACK
from tilewise.bench.shapes import Shape
from tilewise.bench.suite import BENCHMARKS, Wanted, trials
from tilewise.trace.graph import lower

CPU = torch.device("cpu")
TINY = caches.Setting(2, 40, 4, 2, 16, 16, "float32", 0.02)
TINY_MLA = caches.Setting(3, 33, 4, 1, 24, 16, "float32", 0.02)
TINY_PACKED = packed.Setting(3, True, 2, 16, 4, 40, "float32", 0.02)
TINY_CHUNKS = chunks.Setting(24, (5, 24), 20, 4, 2, 16, "float32", 0.02)
TINY_CALLS = first_calls.Setting(96, 2, 16, 1)
TINY_TABLES = table_gradients.Setting(64, 2, 16, 1, 0.02)
native = pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU backend is not what runs here")

pytestmark = pytest.mark.usefixtures("one_thread")


def states(outcome):
    return {name: entry["state"] for name, entry in outcome["contenders"].items()}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_cases_have_names_of_their_own(name, quick):
    if name == "cpu" and "cpu" not in AVAILABLE:
        pytest.skip("the CPU backend is not what runs here")
    cases = [trial.named(mode) for trial in trials(name, Wanted(CPU, quick)) for mode in trial.modes]
    assert cases
    assert len(set(cases)) == len(cases)
    if name != "cpu":
        on_gpu = trials(name, Wanted(torch.device("cuda"), quick)) if name not in ("sparse",) else []
        assert len({t.case for t in on_gpu}) == len(on_gpu)


# ---- decoding ----------------------------------------------------------------------------------------------------------

def after(world, new):
    """Standard attention with the context and so many new tokens."""
    k, v = (torch.cat([x[:, :world.setting.context], *[token] * new], 1)
            for x, token in ((world.cache.k, world.k_new), (world.cache.v, world.v_new)))
    return tw.attention(world.q, k, v, backend="reference")


@pytest.mark.parametrize("setting", [TINY, TINY_MLA], ids=str)
def test_everyone_decodes_the_same_and_grows(setting):
    world = caches.World(setting, CPU)
    found = [d for d in caches.decoders(world) if d.attend is not None]
    assert len(found) == (7 if setting is TINY else 6)
    expected = [after(world, new) for new in range(3)]
    for decoder in found:
        for call, new in ((decoder.attend, 0), (decoder.step, 1), (decoder.step, 2)):
            torch.testing.assert_close(call(0), expected[new], msg=lambda words, name=decoder.name: f"{name}: {words}")


def test_decode():
    found = decode.measure(TINY, CPU)
    attend, step = found[decode.ATTEND], found[decode.STEP]
    assert {name for name, state in states(attend).items() if state != "timed"} == {"flash_attn"}
    assert set(states(step)) == set(states(attend)) - {"standard", "copy", "sum"}
    ours = attend["contenders"]["tilewise"]
    assert ours["gb_per_s"] == pytest.approx(2 * 2 * 40 * 2 * 16 * 4 / ours["seconds"] / 1e9)
    low, high = attend["times_faster"]["sdpa"]["quartiles"]
    assert 0 < low <= attend["times_faster"]["sdpa"]["median"] <= high
    assert "tilewise" not in step["times_faster"]


def test_decoders_that_would_be_the_same_are_left_out():
    of_mla, of_mha = (states(decode.measure(setting, CPU, modes=(decode.ATTEND,))[decode.ATTEND]) for setting in
                      (TINY_MLA, replace(TINY, heads=2)))
    assert (of_mla["sdpa contiguous"], of_mla["sdpa folded"]) == ("absent", "timed")
    assert of_mha["sdpa folded"] == "absent"


def test_a_wrong_decoder_is_not_timed(monkeypatch):
    monkeypatch.setattr(caches, "folded", lambda q, k, v: 1.01 * caches.sdpa(q, k, v))
    for outcome in decode.measure(TINY, CPU).values():
        assert outcome["contenders"]["sdpa folded"]["state"] == "wrong"
        assert "seconds" not in outcome["contenders"]["sdpa folded"]


def test_what_finds_no_memory_is_left_out(monkeypatch):
    size = TINY.nbytes()
    monkeypatch.setattr(caches, "free_bytes", lambda device: size)
    found = decode.measure(TINY, CPU)[decode.ATTEND]["contenders"]
    assert "a copy of the cache needs" in found["pages 16"]["reason"]
    assert "beside the cache" in found["standard"]["reason"]
    assert found["sdpa"]["state"] == "timed"
    monkeypatch.setattr(decode, "free_bytes", lambda device: size)
    with pytest.raises(MemoryError, match="third of the free"):
        decode.measure(TINY, CPU)


# ---- sequences of unequal length, chunks -----------------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [True, False])
def test_packed(causal):
    found = packed.measure(replace(TINY_PACKED, causal=causal), CPU)
    for mode in PASSES:
        assert states(found[mode])["tilewise padded"] == ("timed" if mode == FORWARD else "absent")
        assert {"sdpa padded", "sdpa in a loop"} <= set(found[mode]["times_faster"])
    facts = packed.trial(TINY_PACKED, CPU).setting
    assert all(4 <= n <= 40 for n in facts["lengths"])
    assert facts["padding"] == pytest.approx(1 - sum(facts["lengths"]) / (3 * max(facts["lengths"])))


def test_a_wrong_gradient_of_packed_sequences_is_not_timed(monkeypatch):
    def mistaken(lengths, causal, q, k, v):
        return in_a_loop(lengths, causal, q, k, Halved.apply(v))

    in_a_loop = packed.in_a_loop
    monkeypatch.setattr(packed, "in_a_loop", mistaken)
    entry = packed.measure(TINY_PACKED, CPU)[FORWARD]["contenders"]["sdpa in a loop"]
    assert entry["state"] == "wrong"
    assert entry["reason"].startswith("dv: error")
    alone = packed.measure(TINY_PACKED, CPU, modes=(FORWARD,), only=("sdpa in a loop",))
    assert states(alone[FORWARD]) == {"tilewise": "timed", "sdpa in a loop": "timed"}


def test_padded_and_packed_are_the_same_numbers():
    batch = packed.Batch(TINY_PACKED, CPU)
    for x, y in zip(batch.packed, batch.dense, strict=True):
        assert torch.equal(batch.flat(y), x)
    assert batch.dense.q.count_nonzero() == batch.packed.q.count_nonzero()


def test_chunks_and_drafts():
    prefill, drafts = (trial.measure()[FORWARD] for trial in chunks.trials(TINY_CHUNKS, CPU))
    assert states(prefill) == dict.fromkeys(("at once", "chunks of 5", "chunks of 24"), "timed")
    assert states(drafts) == dict.fromkeys(("tree", "one by one"), "timed")
    assert drafts["times_faster"]["one by one"]["median"] > 0


def test_chunks_that_forget_a_token_are_not_timed(monkeypatch):
    monkeypatch.setattr(chunks, "in_chunks", lambda q, k, v, cache, size, turn: tw.attention(q, k.roll(1, 1), v, causal=True))
    found = chunks.prefill(TINY_CHUNKS, CPU)[FORWARD]
    assert found["contenders"]["chunks of 5"]["state"] == "wrong"
    assert "out: error" in found["contenders"]["chunks of 5"]["reason"]


# ---- masks and functions ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern, block", [("butterfly", 16), ("local+global", 16), ("window", 7)])
def test_patterns_and_their_functions_are_the_same(pattern, block):
    mask, function, density = sparse.Setting(pattern, 64, 1, 16, "float32", block).masks(CPU)
    seen = mask.dense(1, 1, 64, 64)
    assert torch.equal(seen, tw.mask_mod(function).dense(1, 1, 64, 64))
    assert density == pytest.approx(seen.float().mean().item())


def test_sparse():
    setting = sparse.Setting("butterfly", 128, 1, 16, "float32", 32, seconds=0.02)
    found = sparse.measure(setting, CPU, others=("sdpa, boolean mask",))
    assert set(found) == set(PASSES)
    for mode in PASSES:
        assert set(states(found[mode]).values()) == {"timed"}
        assert found[mode]["contenders"][sparse.IDEAL]["yardstick"]


def test_what_is_wrong_is_seen_in_a_sample():
    tensors, dout = work.draw(64, 1, 16, CPU)
    right = work.Work(tensors, dout, mask=lambda b, h, q, k: q >= k)
    assert faults(right.verdicts()) == ""
    for wrong in (replace(right, blocks=tw.window(3, 0)),
                  replace(right, attend=lambda q, k, v: tw.attention(q, Halved.apply(k), v, causal=True))):
        assert "dk: error" in faults(wrong.verdicts())
    assert faults(wrong.verdicts(gradients=False)) == ""


def test_wrong_gradients_of_a_table_alone_are_seen():
    tensors, dout = work.draw(48, 2, 16, CPU)
    (shape, score), table = table_gradients.tables(48, 2)["scalar per head"], torch.ones(2, requires_grad=True)
    assert shape == (2,)
    mistaken = work.Work(tensors | {"table": table}, dout, score=score,
                         attend=lambda q, k, v, table: tw.attention(q, k, v, score_mod=score(Halved.apply(table))))
    assert faults(mistaken.verdicts()).startswith("dtable: error")


@pytest.mark.parametrize("make", [lambda i: tw.mask_mod(first_calls.new_mask(i)).element,
                                  lambda i: tw.score_mod(first_calls.new_score(i)).expr])
def test_new_functions_are_new_graphs_of_one_size(make):
    texts = {lower([[make(index)]]).text for index in range(40)}
    assert len(texts) == 40
    assert len({text.count("(") for text in texts}) == 1


def test_new_mask_functions_are_causal():
    for index in (0, 5, 255):
        assert torch.equal(tw.mask_mod(first_calls.new_mask(index)).dense(1, 1, 12, 12), tw.causal().dense(1, 1, 12, 12))


def test_functions(monkeypatch):
    def here(module, function, *arguments, environment, patience):
        assert {"XDG_CACHE_HOME", "TRITON_CACHE_DIR"} <= set(environment)
        return getattr(first_calls, function)(*arguments)

    monkeypatch.setattr(first_calls, "apart", here)
    found = first_calls.measure("mask", TINY_CALLS, CPU, compiled=False)
    for mode in first_calls.MODES:
        assert states(found[mode]) == {"tilewise": "timed", first_calls.AGAIN: "timed", "flex": "absent"}
        assert found[mode]["contenders"]["tilewise"]["rounds"] == TINY_CALLS.repeats


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "apart", lambda module, function, *arguments, environment: getattr(tiles, function)(*arguments))
    found = tiles.measure(2048, 32)[tiles.CLASSIFY]
    ours, flex = found["contenders"].values()
    assert ours["state"] == flex["state"] == "timed"
    assert 64 <= ours["count"] <= 64 * 65 // 2
    assert flex["count"] == ours["count"]
    assert 0 <= ours["bytes"] < 2**28
    monkeypatch.setattr(tiles, "MOST_BYTES", 1)
    assert "evaluates every score" in tiles.measure(2048, 32)[tiles.CLASSIFY]["contenders"]["create_block_mask"]["reason"]


def test_misjudged_tiles_are_seen(monkeypatch):
    def causal(b, h, q, k):
        return q >= k

    classes = tw.causal().classify(1, 1, 64, 64, 8, 8)[0, 0]
    assert tiles.misjudged(classes, causal, 64, 8) == (0, 0)
    assert tiles.misjudged(torch.full_like(classes, 2), causal, 64, 8)[0] > 0
    assert tiles.misjudged(torch.zeros_like(classes), causal, 64, 8)[0] > 0
    wrong, loose = tiles.misjudged(torch.ones_like(classes), causal, 64, 8)
    assert wrong == 0
    assert loose > 0
    monkeypatch.setattr(tiles, "apart", lambda *_, **__: {"wrong": 1, "seconds": [1.0], "bytes": 0, "kept": 0})
    assert tiles.measure(64, 8)[tiles.CLASSIFY]["contenders"]["tilewise"] == {"state": "wrong", "reason": "2 tiles"}


@pytest.mark.parametrize("name", table_gradients.tables(1, 1))
def test_gradients_of_tables(name):
    found = table_gradients.measure(name, TINY_TABLES, CPU)[BOTH]
    assert states(found) == {"tilewise": "timed", table_gradients.WITHOUT: "timed", "flex": "absent"}
    assert found["times_faster"][table_gradients.WITHOUT]["median"] > 0


# ---- memory, the CPU backend ---------------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(monkeypatch):
    """In one process, whose allocator may keep what it had; others measure ours apart (tests/test_memory.py)."""
    def here(module, function, *arguments, environment, patience):
        assert environment == GIVE_BACK
        return getattr(memory, function)(*arguments)

    def shifted(q, k, v, causal):
        return tw.attention(q, k, v, causal=causal) + 1e-2

    monkeypatch.setattr(memory, "apart", here)
    monkeypatch.setattr(memory, "SHOWN", ("tilewise", "standard", "wrong"))
    own = memory.contenders
    monkeypatch.setattr(memory, "contenders", lambda *_: [*own(*_), Contender("wrong", shifted)])
    shape = Shape(1, 2048, 2, 2, 16, True, "float32")
    found = memory.measure(shape, Wanted(CPU, quick=True))
    matrix = 4 * 2 * 2048**2
    for mode in memory.MODES:
        assert states(found[mode]) == {"tilewise": "timed", "standard": "timed", "wrong": "wrong"}
        entries = found[mode]["contenders"]
        assert entries["tilewise"]["bytes"] < matrix / 2 < matrix <= entries["standard"]["bytes"]
        assert found[mode]["times_faster"] == {}


def test_what_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr("tilewise.bench.attention.free_bytes", lambda device: 2**20)
    with pytest.raises(MemoryError, match="needs about"):
        memory.held(standard(), Shape(1, 1024, 2, 2, 16, True, "float32"), CPU)


@native
def test_bars_of_the_full_sizes():
    promised = [(t.case, t.bars) for t in cpu.trials(Wanted(CPU))]
    assert ("B 1, N 32768, 32/8/128, float32", {("attend", "sdpa"): 3.0, ("attend", "copy"): 0.7}) in promised
    assert ("window 512, N 8192 H 4 D 64 float32", {(BOTH, "sdpa, boolean mask"): 8.0}) in promised
    assert sum((FORWARD, "sgemm") in bars for _, bars in promised) == 4
    (lengths,) = (t.setting["lengths"] for t in cpu.of_packed(Wanted(CPU)))
    assert sum(lengths) == 16547


@native
def test_the_matrix_product_is_a_yardstick_of_as_much_work():
    shape = Shape(1, 64, 2, 2, 16, False, "float32")
    (sgemm,) = cpu.sgemm(shape)
    assert sgemm.check is None
    assert sgemm.factor == shape.flops() / (2 * cpu.SGEMM**3)


@native
def test_a_kernel_is_built_into_an_empty_cache_then_loaded(monkeypatch):
    caches_seen = []

    def apart(module, function, program, kernel, environment):
        caches_seen.append(environment["XDG_CACHE_HOME"])
        return float(len(caches_seen))

    monkeypatch.setattr(compiling, "apart", apart)
    found = compiling.measure("causal", "decode", 2)
    assert [caches_seen[0], caches_seen[2]] == [caches_seen[1], caches_seen[3]]
    assert caches_seen[0] != caches_seen[2]
    assert found[compiling.BUILD]["contenders"]["tilewise"]["seconds"] == 2.0


def test_the_cpu_backend_says_why_it_cannot_be_measured(monkeypatch):
    with pytest.raises(ValueError, match="expected cpu, got 'cuda'"):
        cpu.trials(Wanted(torch.device("cuda")))
    monkeypatch.setattr(cpu.doctor, "check_backend", lambda *_: cpu.doctor.Check("cpu", "cpu", None, "no C++ compiler"))
    with pytest.raises(RuntimeError, match=r"backend cpu: no C\+\+ compiler"):
        cpu.trials(Wanted(CPU))
