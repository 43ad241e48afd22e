"""The `hopper` backend in a simulator of Hopper's asynchrony: right, and free of races and deadlocks, under many schedules."""
import pytest
import torch
from support.backends import INTERPRETING

pytest.importorskip("triton", reason="needs triton", exc_type=ImportError)
if INTERPRETING:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)

from support.hopper.product import install

import tilewise as tw
from tilewise.backends import hopper, load
from tilewise.backends.hopper import configs
from tilewise.bench import tolerance
from tilewise.bench.cases import CASES, draw, named, rows_in_use
from tilewise.bench.hopper import correctness, tuning
from tilewise.bench.hopper.correctness import LONGER
from tilewise.bench.shapes import Shape
from tilewise.problem import make

BF16 = torch.bfloat16


@pytest.fixture
def simulated(monkeypatch):
    return install(monkeypatch)


def assert_right(call):
    wrong = [verdict for verdict in tolerance.check(call, "hopper") if not verdict.ok]
    assert not wrong, "\n".join(map(str, wrong))


# ---- what is computed --------------------------------------------------------------------------------------------------

CONTRACT = [(case, BF16) for case in CASES] + [(case, torch.float16) for case in CASES[::4]]


@pytest.mark.parametrize("case, dtype", CONTRACT, ids=str)
def test_contract(case, dtype, simulated, poisoned):
    call = draw(case, dtype)
    if not call.supported("hopper") or "table" in call.options:
        with pytest.raises(NotImplementedError, match="cannot compute this"):
            call.run({name: x.clone().requires_grad_() for name, x in call.differentiable.items()}, "hopper")
        return
    assert_right(call)
    assert simulated.launched


@pytest.mark.parametrize("case", LONGER, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_several_tiles(case, seed, simulated, poisoned):
    simulated.seed = seed
    call = draw(case, BF16, seed=seed)
    assert_right(call)
    assert len(simulated.launched) == 2 + len(configs.passes(call.described()[0]))


@pytest.mark.parametrize("case", [case for case in LONGER if "repeatable" in case.name], ids=str)
def test_repeatable_gradients_have_the_same_bits_under_all_schedules(case, simulated):
    call, found = draw(case, BF16), []
    assert hopper.repeatable(call.described()[0])
    for simulated.seed in range(3):
        found.append(tolerance.run(call, "hopper").tensors)
    for again in found[1:]:
        assert all(torch.equal(again[name], x) for name, x in found[0].items())


@pytest.mark.parametrize("deterministic, words", [(True, "bitwise repeatable"), (False, "sums in any order")])
def test_explain_says_whether_gradients_are_repeatable(deterministic, words, simulated):
    q = torch.zeros(2, 100, 4, 64, dtype=BF16)
    plan = tw.explain(q, q, q, deterministic=deterministic, backend="hopper")
    assert words in str(plan)
    assert plan.workspace[1] == 4 * 4 * 200 * (3 if deterministic else 3 + 64)


SERVED = ("causal", "window", "grouped heads", "softcap", "alibi", "sinks", "key lengths", "documents", "prefix lm", "function",
          "blocks", "score function", "packed causal", "packed used", "head dim 40", "causal bhsd", "values wider",
          "scale negative", "dropout", "head dim 192")


@pytest.mark.parametrize("name", SERVED)
def test_what_is_promised_is_served(name):
    assert hopper.unsupported(draw(named(name), BF16).described()[0]) is None


REFUSED = {"fp32 inputs": "float32", "bias": "a bias", "head dim 512": "head dims over 256",
           "head dim 1": "rows that do not begin at multiples of 16 bytes", "batch invariant": "batch_invariant",
           "no keys": "without rows", "table of keys": None}


@pytest.mark.parametrize("name", [name for name in REFUSED if REFUSED[name]])
def test_what_is_not_says_why(name):
    case = next((case for case in CASES if case.name == name), CASES[0])
    reason = hopper.unsupported(draw(case, torch.float32 if name == "fp32 inputs" else BF16).described()[0])
    assert REFUSED[name] in (reason or "")


def test_results_have_rows_that_tma_can_write():
    """Inputs may be views of something wider; what is allocated for them is not."""
    q, v = torch.zeros(1, 8, 1, 64, dtype=BF16), torch.zeros(1, 8, 1, 16, dtype=BF16)
    assert hopper.unsupported(make(q, q, v)[0]) is None
    assert "multiples of 16 bytes" in hopper.unsupported(make(q, q, v[..., :5])[0])


VIEWS = {"columns": lambda x: x[..., 1:65], "expanded": lambda x: x.expand(4, -1, -1, -1)[..., :64],
         "first": lambda x: x.as_strided((1, 8, 1, 64), (999, 72, 72, 1), 4)}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_that_tma_cannot_read_go_elsewhere(view):
    x = view(torch.zeros(1, 8, 1, 72, dtype=BF16))
    assert "multiples of 16 bytes" in hopper.unsupported(make(x, x, x)[0])


def test_on_a_cpu_explain_says_why_others_serve():
    q = torch.zeros(1, 8, 1, 64, dtype=BF16)
    assert "not hopper: inputs are on cpu" in str(tw.explain(q, q, q))
    with pytest.raises(NotImplementedError, match="its kernels run on Hopper GPUs"):
        tw.attention(q, q, q, backend="hopper")


def test_gradients_of_tables_go_elsewhere(simulated):
    q, table = torch.zeros(1, 8, 1, 64, dtype=BF16), torch.zeros(8)
    learned = table.clone().requires_grad_()
    tw.attention(q, q, q, score_mod=lambda s, b, h, i, j: s + table[j], backend="hopper")
    with pytest.raises(NotImplementedError, match="gradients of captured tensors"):
        tw.attention(q, q, q, score_mod=lambda s, b, h, i, j: s + learned[j], backend="hopper")


@pytest.mark.parametrize("name", ["packed", "packed used", "packed no sequences in use"])
def test_rows_of_no_sequence(name, simulated, poisoned):
    call = draw(named(name), BF16)
    found = tolerance.run(call, "hopper").tensors
    rows, keys = (~rows_in_use(call.case, side) for side in (0, 1))
    assert (found["out"][rows] == 0).all()
    assert (found["lse"][:, rows] == -torch.inf).all()
    for name, outside in (("dq", rows), ("dk", keys), ("dv", keys)):
        assert (found[name][outside] == 0).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_padding_may_hold_nan(deterministic, simulated, poisoned):
    """Keys that a mask hides from all queries reach neither output nor gradients."""
    lengths = torch.tensor([70, 130])
    q, k, v = torch.randn(3, 2, 140, 2, 64).bfloat16().unbind()
    padding = torch.arange(140) >= lengths[:, None]
    clean = [torch.where(padding[:, :, None, None], 0, x) for x in (k, v)]
    found = []
    for k_b, v_b in ([torch.where(padding[:, :, None, None], torch.nan, x) for x in (k, v)], clean):
        inputs = [x.clone().requires_grad_() for x in (q, k_b, v_b)]
        out = tw.attention(*inputs, mask=tw.key_lengths(lengths.int()), causal=True, deterministic=deterministic,
                           backend="hopper")
        out.backward(torch.ones_like(out))
        found.append([out, *(x.grad for x in inputs)])
    for with_nan, without in zip(*found, strict=True):
        assert torch.equal(with_nan, without)


# ---- the command that checks and tunes it on a GPU ---------------------------------------------------------------------

def test_correctness_command_finds_what_is_wrong(simulated, monkeypatch, tmp_path):
    monkeypatch.setattr(correctness, "LONGER", correctness.LONGER[:1])
    monkeypatch.setattr(correctness, "CASES", ())
    monkeypatch.setattr(correctness, "DTYPES", (BF16,))
    assert correctness.run(torch.device("cpu"), seconds=100, repeats=1)["failures"] == {}
    right = hopper.forward

    def sometimes_wrong(problem, x):
        out, lse = right(problem, x)
        out[0, 0, 7] += len(simulated.launched) > 4
        return out, lse

    monkeypatch.setattr(hopper, "forward", sometimes_wrong)
    simulated.launched.clear()
    result = correctness.run(torch.device("cpu"), seconds=100, repeats=2, out=tmp_path / "found.json")
    assert "long bfloat16" in result["failures"]
    assert "out" in result["failures"]["long bfloat16"]
    assert (tmp_path / "found.json").exists()


def test_tuning_prints_rows_of_the_table():
    rates = {"(128, 128, 2, 1, 1, 240, 24, 1)": 500.0, "(128, 64, 2, 1, 1, 240, 24, 0)": 600.0, "sdpa cudnn": 650.0}
    row = {"part": "forward", "case": "forward D 64 N 4096 causal", "setting": {"head_dim": 64}, "contenders": {
        name: {"state": "timed", "reason": "", "tflops": rate, "seconds": 1 / rate} for name, rate in rates.items()}}
    said = tuning.lines([row])
    assert said[0].startswith("forward D 64 N 4096 causal: 600 TFLOP/s by (128, 64,")
    assert "sdpa cudnn 650" in said[0]
    fields = said[-1].split("\t")
    assert configs.Config(*map(int, fields[4:])) in tuning.candidates("forward", 64)
    assert len(fields) == len(configs.TABLE.read_text().splitlines()[0].split("\t"))


def test_tuning_measures_each_kernel_beside_peers(monkeypatch):
    """The wiring, with `tiled` in the place of launches: two sets of inputs, and all passes of both kinds of backward."""
    tiled = load("tiled")
    monkeypatch.setattr(tuning.launch, "forward", tiled.forward)
    monkeypatch.setattr(tuning.launch, "backward", tiled.backward)
    monkeypatch.setattr(tuning, "SECONDS", 0.01)
    monkeypatch.setattr(tuning, "PEERS", ("sdpa flash",))       # FlexAttention compiles for half a minute
    rows = list(tuning.measure(Shape(1, 64, 2, 2, 64, True, "bfloat16"), torch.device("cpu")))
    assert {row["part"] for row in rows} == {"forward", "forward fp8", "dq dk dv", "dq", "dk dv"}
    for row in rows:
        variants = [entry["state"] for name, entry in row["contenders"].items() if name.startswith("(")]
        assert set(variants) == {"timed"}
        assert row["contenders"]["sdpa flash"]["seconds"] > 0


@pytest.mark.parametrize("head_dim", tuning.FORWARD_TILES)
def test_variants_of_the_forward_kernel_are_right(head_dim, simulated):
    """Each in the simulator, on several blocks of several tiles."""
    q, k = (torch.randn(1, n, 1, head_dim, dtype=BF16) for n in (300, 200))
    expected = tw.attention(q, k, k, causal=True, backend="reference")
    for config in tuning.candidates("forward", head_dim):
        with tuning.configured("forward", config):
            assert tuning.deviation(tw.attention(q, k, k, causal=True, backend="hopper"), expected) < 1, config


@pytest.mark.parametrize("head_dim", tuning.FORWARD_TILES)
def test_variants_of_the_fp8_kernel_are_right(head_dim, simulated):
    q, k = (torch.randn(1, n, 1, head_dim).to(torch.float8_e4m3fn) for n in (150, 200))
    expected = tw.attention(q, k, k, causal=True, backend="tiled")
    for config in tuning.candidates("forward fp8", head_dim)[::3]:
        with tuning.configured("forward fp8", config):
            assert tuning.deviation(tw.attention(q, k, k, causal=True, backend="hopper"), expected) < 1, config


PASSES = {name for way in (*configs.ADDED, *configs.SEPARATE) for name in way}


@pytest.mark.parametrize("kernel, head_dim", [
    (name, dim) for name, dim, _, features in configs.table() if name in PASSES and features == "plain"])
def test_variants_of_the_backward_kernels_are_right(kernel, head_dim, simulated):
    """Each in the simulator, on a problem of several tiles."""
    added = any(kernel in way for way in configs.ADDED)
    q, k, dout = (torch.randn(1, n, 1, head_dim, dtype=BF16) for n in (200, 330, 200))
    found = {}
    for config in ("reference", *tuning.candidates(kernel, head_dim)):
        with tuning.configured(kernel, config):
            inputs = [x.clone().requires_grad_() for x in (q, k, k)]
            out = tw.attention(*inputs, causal=True, deterministic=not added,
                               backend="reference" if config == "reference" else "hopper")
            found[config] = torch.autograd.grad(out, inputs, dout)
        for x, expected in zip(found[config], found["reference"], strict=True):
            assert tuning.deviation(x, expected) < 1, config
