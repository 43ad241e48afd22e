"""Decoding on the `hopper` backend, in the simulator: caches of all kinds, each way to miss a key or to read one too many."""
import re
from dataclasses import replace

import pytest
import torch
from support.backends import INTERPRETING

pytest.importorskip("triton", reason="needs triton", exc_type=ImportError)
if INTERPRETING:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)

from support.hopper.product import install
from support.hopper.product import simulated as simulated_run
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

import tilewise as tw
from tilewise import api, inspect
from tilewise.backends import hopper
from tilewise.backends.gpu_math import splits
from tilewise.backends.gpu_math.cases import Case
from tilewise.backends.hopper import configs, decoding
from tilewise.backends.hopper.pieces import load_pieces
from tilewise.bench.caches import Setting
from tilewise.bench.hopper import decoding as bench
from tilewise.bench.hopper.cached import CASES, draw

BF16, FP16 = torch.bfloat16, torch.float16
SCHEDULED = "several tiles", "head dim 128", "packed shares", "pages of 16", "fp8, shares"


@pytest.fixture
def simulated(monkeypatch):
    return install(monkeypatch)


def case(name):
    return next(case for case in CASES if case.name == name)


# ---- what is computed --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case, dtype", [*((case, BF16) for case in CASES), *((case, FP16) for case in CASES[::5])], ids=str)
def test_cases(case, dtype, simulated, poisoned):
    call = draw(case, dtype)
    assert call.faults("hopper") == ""
    merged = call.options.get("num_splits", 1) > 1
    assert simulated.launched == ["decode"] + ["merge"] * merged


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("seed", range(1, 4))
def test_schedules(name, seed, simulated, poisoned):
    simulated.seed = seed
    assert draw(case(name), BF16, seed=seed).faults("hopper") == ""


def test_what_no_sequence_holds_changes_no_bit(simulated):
    """Keys of others, free pages, left padding: NaN there or numbers, the results are the same."""
    for name in ("left padding", "pages of 16", "fp8, small pages"):
        call = draw(case(name), BF16)
        found = call.run("hopper")
        for x in (call.cache.k, call.cache.v):
            x.copy_(x.float().nan_to_num(3.0).to(x.dtype))
        for name, again in call.run("hopper").items():
            assert torch.equal(found[name], again)


@pytest.mark.parametrize("pages", [False, True])
def test_append_then_attend(pages, simulated, poisoned):
    """A prompt by another backend, then token by token."""
    shape = dict(kv_heads=2, head_dim=64, dtype=BF16)
    caches = [tw.PagedKVCache(8, 16, max_sequences=2, **shape) if pages else tw.KVCache(2, 64, **shape) for _ in range(2)]
    which = [torch.tensor([cache.new(), cache.new()]) for cache in caches] if pages else [None, None]
    generator = torch.Generator().manual_seed(0)
    rotary = tw.Rotary.of(64, max_position=64)
    for step, (tokens, backend) in enumerate(((20, "reference"), (1, "hopper"), (3, "hopper"))):
        q, k, v = (torch.randn(2, tokens, heads, 64, generator=generator).to(BF16) for heads in (4, 2, 2))
        found = [tw.attention_with_kv_cache(q, cache, k, v, cache_batch_idx=own, rotary=rotary, causal=True, backend=name)
                 for cache, own, name in zip(caches, which, (backend, "reference"), strict=True)]
        torch.testing.assert_close(*found, rtol=2e-2, atol=1e-2)
        assert len(simulated.launched) == step


def test_few_queries_without_a_cache(simulated, monkeypatch):
    """They are split, too, and have gradients."""
    monkeypatch.setattr(splits, "multiprocessors", lambda device: 132)
    q, k, v = (torch.randn(1, n, heads, 64, dtype=BF16) for n, heads in ((3, 4), (400, 2), (400, 2)))
    found = {}
    for backend in ("hopper", "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = tw.attention(*inputs, causal=True, backend=backend)
        found[backend] = [out, *torch.autograd.grad(out.sum(), inputs)]
    for x, expected in zip(*found.values(), strict=True):
        torch.testing.assert_close(x, expected, rtol=2e-2, atol=2e-2)
    assert simulated.launched[:2] == ["decode", "merge"]


# ---- what is not, and what it takes ---------------------------------------------------------------------------------------

def described(queries=1, dtype=BF16, page_size=None, **options):
    shape = dict(kv_heads=2, head_dim=options.pop("head_dim", 64), dtype=dtype, v_in_k=options.pop("v_in_k", False),
                 head_dim_v=options.pop("head_dim_v", None))
    cache = tw.KVCache(1, 100, **shape) if page_size is None else tw.PagedKVCache(4, page_size, max_sequences=1, **shape)
    which = None if page_size is None else [cache.new()]
    stored = BF16 if dtype == torch.float8_e4m3fn else dtype
    new = torch.zeros(1, 70, 2, cache.head_dim, dtype=stored)
    if not cache.v_in_k:
        cache.append(new, new[..., :cache.head_dim_v], **({} if which is None else dict(sequences=which)))
    q = torch.zeros(1, queries, 4, cache.head_dim, dtype=stored)
    return tw.explain(q, cache, cache_batch_idx=which, backend="reference", **options).problem


REFUSED = {
    "for more than 64 queries": dict(queries=33),
    "a mask without intervals": dict(mask=lambda b, h, q, k: (q + k) % 2 == 0),
    "values that are a part of keys": dict(v_in_k=True, head_dim=192, head_dim_v=128),
    "head dims over 256": dict(head_dim=264),
    "pages of 20 keys": dict(page_size=20),
    "multiples of 16 bytes": dict(dtype=torch.float8_e4m3fn, head_dim=72),
    "a bias": dict(bias=torch.zeros(70, dtype=BF16)),
    "dropout": dict(dropout_p=0.5, rng=tw.Rng(0)),
    "batch_invariant": dict(batch_invariant=True),
    "float32 inputs": dict(dtype=torch.float32),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_says_why(reason):
    assert reason in (hopper.unsupported(described(**REFUSED[reason])) or "")


def test_split_without_few_queries():
    q = torch.zeros(1, 100, 1, 64, dtype=BF16)
    assert "num_splits" in hopper.unsupported(tw.explain(q, q, q, num_splits=2, backend="reference").problem)


def test_explain(simulated):
    call = draw(case("shares"), BF16)
    plan = tw.explain(call.q, call.cache, **call.options, backend="hopper")
    assert (plan.splits, plan.tiles) == (3, (64, 128))
    assert plan.workspace[0] == 4 * 4 * 3 * (1 + 3 * (1 + 64))


@pytest.mark.parametrize("name", ["several tiles", "head dim 128", "head dim 256", "fp8", "fp8, shares"])
def test_room(name, monkeypatch):
    """As much shared memory as is planned with, but for barriers; two programs find room where head dims are at most 128."""
    call = draw(case(name), BF16)
    problem, x = api._of_cache(call.q, call.cache, None, **call.options)
    reports = []
    decoding.forward(problem, x, start=lambda *given: reports.append(simulated_run(*given)[2]))
    config = decoding.chosen(problem)
    planned = decoding.shared_bytes(problem, config)
    assert planned < reports[0].shared <= planned + decoding.RESERVED
    places = decoding.together(problem, config)
    assert places == (1 if problem.head_dim > 128 else 2)
    assert places * (reports[0].shared + decoding.RESERVED) <= decoding.SHARED
    monkeypatch.setattr(splits, "multiprocessors", lambda device: 132)
    one = replace(problem, batch=1, kv_heads=1, heads=1, seqlen_k=2**17, settings=problem.settings._replace(splits=0))
    assert 0.8 * places * 132 < decoding.splits(one) <= places * 132


# ---- what the simulator does not model ------------------------------------------------------------------------------------

@gluon.jit
def copied_and_read(desc, OUT):
    """A tile that comes in pieces of 16 rows; a thread reads 8 columns of each."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile = gl.allocate_shared_memory(desc.dtype, [64, 128], gl.NVMMASharedLayout(128, 16))
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    load_pieces(desc, ((0, 0), (1, 0), (2, 0), (3, 0)), 0, barrier, tile)
    rows, columns = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)), gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    gl.store(OUT + rows[:, None] * 128 + columns[None, :], tile.load(LAYOUT))


def test_pieces_lie_where_the_tile_is_read():
    """In the machine's memory, not the simulator's: offsets in the assembly."""
    block = "tensordesc<bf16[1, 1, 16, 64],NVMMASharedLayout(128, 16, rank=4)>"
    case = Case("pieces", "decode", "sm_90", copied_and_read, {"desc": block, "OUT": "*bf16"}, {}, 4, 1, False, "")
    assembly = inspect.build(case).asm["ptx"]
    moved = {name: int(step) for name, step in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", assembly)}
    copied = re.findall(r"cp\.async\.bulk\.tensor.*?\[(%r\d+)\]", assembly)
    read = re.findall(r"ld\.shared\.v4\S*\s+\{.*\}, \[%r\d+(?:\+(\d+))?\]", assembly)
    expected = [2048 * piece + 8192 * panel for piece in range(4) for panel in range(2)]
    assert sorted(moved.get(name, 0) for name in copied) == sorted(expected)
    assert sorted(int(step or 0) for step in read) == sorted(expected)


# ---- the command that checks and times it on a GPU --------------------------------------------------------------------------

def test_the_command(simulated, monkeypatch, tmp_path):
    """It says what is wrong, and how fast what is right."""
    monkeypatch.setattr(bench, "CASES", (case("one key"), case("queries")))
    monkeypatch.setattr(bench, "DTYPES", (BF16,))
    monkeypatch.setattr(bench, "SETTINGS", (Setting(1, 130, 4, 2, 64, 64),))
    monkeypatch.setattr(bench, "TUNED", (Setting(1, 130, 2, 1, 64, 64),))
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    result = bench.run(torch.device("cpu"), seconds=100, repeats=1, out=tmp_path / "found.json")
    assert (result["right"], result["failures"]) == (2, {})
    row, tuned = result["rows"]
    assert {name for name, entry in row["contenders"].items() if entry["state"] == "timed"} == {
        "hopper", "hopper pages 16", "hopper fp8", "sdpa", "copy", "sum"}
    assert row["times_faster"]["copy"]["median"] > 0
    assert {entry["state"] for entry in tuned["contenders"].values()} == {"timed"}
    assert len(tuned["contenders"]) == len(bench.candidates(64))
    fields = result["lines"][-1].split("   ")[0].split("\t")
    assert len(fields) == len(configs.TABLE.read_text().splitlines()[0].split("\t"))
    right = hopper.forward

    def sometimes_wrong(problem, x):
        out, lse = right(problem, x)
        out[0, 0, 0] += len(simulated.launched) % 2
        return out, lse

    monkeypatch.setattr(hopper, "forward", sometimes_wrong)
    simulated.launched.append("one more")
    monkeypatch.setattr(bench, "SETTINGS", ())
    monkeypatch.setattr(bench, "TUNED", ())
    result = bench.run(torch.device("cpu"), seconds=100, repeats=1)
    assert "repeat 0: out has other bits" in result["failures"]["one key bfloat16"]
