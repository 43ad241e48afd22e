"""Calls like one made before (`tilewise/calls.py`): the memory changes no result, keeps nothing alive, and is quick."""
import functools
import gc
import os
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.settings import SETTINGS, another

import tilewise as tw
from tilewise import calls, known
from tilewise.backends import load
from tilewise.bench import instructions, overhead, suite
from tilewise.bench.suite import Wanted

NEEDS_CPU = pytest.mark.skipif(load("cpu").supports(tw.problem.make(*[torch.zeros(1, 1, 1, 1)] * 3)[0]) is not None,
                               reason="no C++ compiler")
pytestmark = pytest.mark.usefixtures("forgetful", "one_thread")


def inputs(rows=9, dim=8, heads=2, **options):
    return [torch.randn(1, rows, heads, dim, **options) for _ in range(3)]


def close(ours, truth):
    torch.testing.assert_close(ours, truth.to(ours.dtype), rtol=1e-5, atol=1e-5)


def reference(q, k, v, **options):
    return tw.attention(q.double(), k.double(), v.double(), backend="reference", **options)


WANTED = Wanted(torch.device("cpu"), quick=True)

# Python functions and built-in ones that a call enters, once a call like it was made. More than that is a cost for every user:
# `python -m tilewise.bench.overhead` shows at which stage, `tilewise bench instructions` how much.
MOST_CALLS = {"plain": (25, 33), "causal": (25, 33), "window": (36, 41), "mask function": (31, 40),
              "boolean mask": (34, 43), "recorded": (46, 55), "differentiated": (90, 138),
              "packed": (110, 106), "decoding step": (38, 65), "decoding step, GQA": (38, 65),
              "paged step": (51, 103)}


@NEEDS_CPU
@pytest.mark.parametrize("case", overhead.cases(), ids=lambda case: case.name)
def test_a_call_like_one_before_enters_few_functions(case):
    entered = {"call": 0, "c_call": 0}

    def count(_frame, event, _argument):
        if event in entered:
            entered[event] += 1

    with torch.set_grad_enabled(case.recorded):
        for _ in range(3):
            case.ours()
        before = sys.getprofile()
        gc.disable()                    # what is finalised now is none of the call's
        sys.setprofile(count)
        try:
            case.ours()
        finally:
            sys.setprofile(before)
            gc.enable()
    found, most = tuple(entered.values()), MOST_CALLS[case.name]
    assert all(a <= b for a, b in zip(found, most, strict=True)), (
        f"{case.name}: entered (Python, built-in) functions {found}, at most {most} were committed: see "
        "`python -m tilewise.bench.overhead` for the stage, `tilewise bench instructions` for the cost")


def test_the_benchmark_is_right_and_has_the_common_form(tmp_path):
    case = overhead.cases()[0]
    assert all(error <= allowed for error, allowed in overhead.right(case).values())
    trial = overhead.trial(case, seconds=0.01)
    (row,) = trial.rows(trial.measure())
    assert row["contenders"]["tilewise"]["state"] == "timed"
    assert row["contenders"]["sdpa"]["seconds"] > 0
    assert row["times_faster"]["sdpa"]["median"] > 0
    wrong = overhead.trial(case._replace(ours=lambda: case.ours() + 1e-3), seconds=0.01).measure()
    assert wrong["forward"]["contenders"]["tilewise"]["state"] == "wrong"
    assert "forward" in "\n".join(overhead.lines([row], WANTED))


def test_counting_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda _program: None)
    with pytest.raises(RuntimeError, match=r"expected perf with permission to count .* or valgrind and a C compiler"):
        instructions.trials(WANTED)[0].measure()


@NEEDS_CPU
def test_counts_in_the_common_form(monkeypatch, tmp_path):
    """Counting itself takes a minute: here everything is counted as 1000 instructions, PyTorch's as 500."""
    def pretend(counted):
        for job in counted:
            job.run()
        return {job.name: (500 if job.contender == instructions.THEIRS else 1000, 0) for job in counted}

    monkeypatch.setattr(instructions, "counter", lambda: pretend)
    result = suite.run("instructions", WANTED, out=tmp_path / "result.json")
    assert result["complete"]
    of = {row["case"]: row for row in result["rows"]}
    assert of["call plain forward"]["times_faster"]["sdpa"]["median"] == 0.5
    assert of["kernel backward backward"]["setting"]["elements"] == 128 * 128
    assert any("2.00" in line for line in result["lines"])
    assert (tmp_path / "result.json").exists()


# ---- what decides -------------------------------------------------------------------------------------------------------

CHANGES = {
    "shape": lambda q, k, v: ([q[:, 1:], k, v], {}),
    "strides": lambda q, k, v: ([x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)], {}),
    "offset": lambda q, k, v: ([torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape) for x in (q, k, v)], {}),
    "dtype": lambda q, k, v: ([x.bfloat16() for x in (q, k, v)], {}),
    "causal": lambda q, k, v: ([q, k, v], dict(causal=True)),
    "scale": lambda q, k, v: ([q, k, v], dict(scale=0.1)),
    "mask": lambda q, k, v: ([q, k, v], dict(mask=tw.window(1, 2))),
    "score_mod": lambda q, k, v: ([q, k, v], dict(score_mod=tw.softcap(0.5))),
    "score_mods": lambda q, k, v: ([q, k, v], dict(score_mod=[tw.softcap(0.5), tw.softcap(0.1)])),
    "bias": lambda q, k, v: ([q, k, v], dict(bias=torch.randn(q.shape[1], k.shape[1]))),
    "sinks": lambda q, k, v: ([q, k, v], dict(sinks=torch.randn(q.shape[2]))),
    "layout": lambda q, k, v: ([x.transpose(1, 2).contiguous() for x in (q, k, v)], dict(layout="bhsd")),
    "batch_invariant": lambda q, k, v: ([q, k, v], dict(batch_invariant=True)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_is_told_apart(change):
    first = inputs()
    tensors, options = CHANGES[change](*first)
    for _ in range(2):                  # in turns: one does not become the other
        for given, wanted in ((first, {}), (tensors, options)):
            ours, truth = tw.attention(*given, **wanted), reference(*given, **wanted)
            if ours.dtype == torch.float32:
                close(ours, truth)
            else:
                torch.testing.assert_close(ours.double(), truth, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("wrong, right", [(dict(causal=1), dict(causal=True)), (dict(scale=True), dict(scale=1.0)),
                                          (dict(dropout_p=False), dict(dropout_p=0.0)), (dict(rng=7), {}),
                                          (dict(deterministic=1), dict(deterministic=True)), (dict(batch_invariant=0), {}),
                                          (dict(layout=["bshd"]), {}), (dict(score_mod=3), {})])
def test_equal_to_python_is_not_right(wrong, right):
    q, k, v = inputs()
    for _ in range(2):
        tw.attention(q, k, v, **right)
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            tw.attention(q, k, v, **wrong)


def test_what_has_no_hash_is_not_remembered():
    q, k, v = inputs()
    for _ in range(2):
        out, found = tw.attention(q, k, v, return_stats=["max_score"])
        truth, wanted = reference(q, k, v, return_stats=("max_score",))
        close(out, truth)
        close(found.max_score, wanted.max_score)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_pytorch_decide(setting):
    q, k, v = inputs()
    tw.attention(q, k, v)
    (before,) = known.calls
    with another(setting):
        close(tw.attention(q, k, v), reference(q, k, v))
        assert set(known.calls) > {before}


def test_a_table_written_to_is_read_again():
    q, k, v = inputs()
    table = torch.randn(9)

    @tw.score_mod
    def shifted(score, b, h, q_idx, kv_idx):
        return score + table[kv_idx]

    for _ in range(3):
        close(tw.attention(q, k, v, score_mod=shifted), reference(q, k, v, score_mod=shifted))
        table.mul_(-2)


@pytest.mark.parametrize("shape", [(9, 9), (1, 1, 9, 9), (1, 2, 9, 9)])
def test_a_boolean_tensor_written_to_is_read_again(shape):
    q, k, v = inputs()
    visible = torch.ones(shape, dtype=torch.bool)
    for hidden in range(1, 8):
        close(tw.attention(q, k, v, mask=visible), reference(q, k, v, mask=visible.clone()))
        visible[..., hidden] = False


def test_a_mask_of_lists_follows_its_tensor():
    q, k, v = inputs(rows=140)
    allowed = torch.ones(140, dtype=torch.bool)
    mask = tw.mask_mod(lambda b, h, q_idx, kv_idx: allowed[kv_idx])
    close(tw.attention(q, k, v, mask=mask), reference(q, k, v, mask=mask))
    allowed[:70] = False
    close(tw.attention(q, k, v, mask=mask), reference(q, k, v, mask=mask))


def test_a_growing_cache_and_a_mask_of_lists():
    """Which tiles a step visits follows from how many keys there are then."""
    keys, values = torch.randn(2, 1, 200, 2, 8).unbind(0)
    far = tw.mask_mod(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 20)
    cache = tw.KVCache(1, 256, 2, 8, dtype=torch.float32)
    cache.append(keys[:, :90], values[:, :90])
    for end in range(91, 200, 12):
        first, q = cache.lengths.item(), torch.randn(1, 1, 2, 8)
        ours = tw.attention_with_kv_cache(q, cache, keys[:, first:end], values[:, first:end], mask=far)
        close(ours, reference(q, keys[:, :end], values[:, :end], mask=tw.window(19, 0)))


def test_a_growing_cache_is_one_problem_for_many_steps():
    cache = tw.KVCache(2, 256, 2, 8, dtype=torch.float32)
    cache.append(*(torch.randn(2, 3, 2, 8) for _ in range(2)))
    with torch.no_grad():
        for _ in range(70):
            tw.attention_with_kv_cache(torch.randn(2, 1, 2, 8), cache, *(torch.randn(2, 1, 2, 8) for _ in range(2)))
    found = {id(found) for found in known.calls.values() if isinstance(found, calls.Found)}
    assert len(found) == 2              # up to 64 keys and up to 128


def test_values_are_checked_when_they_change():
    q, k, v = inputs()
    lengths = torch.tensor([9])
    mask = tw.key_lengths(lengths)
    tw.attention(q, k, v, mask=mask)
    lengths.fill_(10)
    with pytest.raises(ValueError, match="expected values from 0 to 9"):
        tw.attention(q, k, v, mask=mask)


def test_a_function_is_not_known_by_its_name():
    q, k, v = inputs()
    reach = 1

    def near(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx).abs() <= reach

    one = tw.attention(q, k, v, mask=near)
    reach = 4
    close(tw.attention(q, k, v, mask=near), reference(q, k, v, mask=tw.window(4, 4)))
    close(one, reference(q, k, v, mask=tw.window(1, 1)))


# ---- gradients --------------------------------------------------------------------------------------------------------

def gradients(attend, given, dout):
    own = [x.detach().clone().requires_grad_() for x in given]
    return torch.autograd.grad(attend(*own), own, dout.to(own[0].dtype))


@pytest.mark.parametrize("dout", ["plain", "turned", "expanded"])
def test_gradients_of_any_dout(dout):
    given = inputs()
    of = {"plain": torch.randn(1, 9, 2, 8), "turned": torch.randn(1, 2, 9, 8).transpose(1, 2),
          "expanded": torch.ones(()).expand(1, 9, 2, 8)}[dout]
    for _ in range(2):
        for ours, truth in zip(gradients(tw.attention, given, of), gradients(reference, [x.double() for x in given], of),
                               strict=True):
            close(ours, truth)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_packed_sequences_and_sinks(causal):
    q, k, v = (x[0] for x in inputs(rows=20))
    sinks, dout, cu_seqlens = torch.randn(2), torch.randn(20, 2, 8), torch.tensor([0, 7, 15], dtype=torch.int32)

    def attend(backend):
        return lambda q, k, v, sinks: tw.attention_varlen(q, k, v, cu_seqlens, sinks=sinks, causal=causal, backend=backend)

    for _ in range(2):
        found = gradients(attend("auto"), (q, k, v, sinks), dout)
        truths = gradients(attend("reference"), [x.double() for x in (q, k, v, sinks)], dout)
        for ours, truth in zip(found, truths, strict=True):
            close(ours, truth)
        assert all((x[15:] == 0).all() for x in found[:3])


def test_hooks_on_saved_tensors_may_move_them():
    given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs()]
    dout = torch.randn(1, 9, 2, 8)
    truth = gradients(reference, [x.double() for x in given], dout)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x):
        found = gradients(tw.attention, given, dout)
    for of in (found, gradients(tw.attention, given, dout)):
        for ours, wanted in zip(of, truth, strict=True):
            close(ours, wanted)


def test_a_table_that_comes_to_need_a_gradient():
    q, k, v = inputs()
    table = torch.randn(9)
    mod = tw.score_mod(lambda score, b, h, q_idx, kv_idx: score + table[kv_idx])
    tw.attention(q, k, v, score_mod=mod)
    table.requires_grad_()
    (found,) = torch.autograd.grad(tw.attention(q, k, v, score_mod=mod).sum(dim=(0, 1, 2))[0], table)
    (truth,) = torch.autograd.grad(reference(q, k, v, score_mod=mod).sum(dim=(0, 1, 2))[0], table)
    close(found, truth)


def test_the_same_call_in_a_transform_and_under_create_graph():
    q, k, v = (x.requires_grad_() for x in inputs())
    tw.attention(q, k, v)
    stacked = torch.stack([q, q * 2])
    found = torch.func.vmap(lambda x: tw.attention(x, k, v))(stacked)
    close(found[1], reference(q * 2, k, v))
    (first,) = torch.autograd.grad(tw.attention(q, k, v).square().sum(), q, create_graph=True)
    (truth,) = torch.autograd.grad(reference(q, k, v).square().sum(), q, create_graph=True)
    close(first, truth)


# ---- how it is kept ---------------------------------------------------------------------------------------------------

def shifted_by(table, score, b, h, q_idx, kv_idx):
    return score + table[kv_idx]


def test_nothing_is_kept_alive():
    q, k, v = inputs()
    table, visible = torch.randn(9), torch.ones(9, 9, dtype=torch.bool)
    mod = tw.score_mod(functools.partial(shifted_by, table))
    tw.attention(q, k, v, score_mod=mod)
    tw.attention(q, k, v, mask=visible)
    assert len(known.calls) == 2
    gone = [weakref.ref(x) for x in (q, table, visible)]
    del q, k, v, table, visible, mod
    gc.collect()
    assert not known.calls
    assert [ref() for ref in gone] == [None] * 3


def test_it_is_bounded(monkeypatch):
    monkeypatch.setattr(known, "KEPT", 4)
    for rows in range(1, 9):
        given = inputs(rows)
        close(tw.attention(*given), reference(*given))
    assert len(known.calls) == 4


def test_threads_share_it():
    given = [inputs(rows) for rows in range(3, 9)]
    truth = [reference(*one) for one in given]

    def work(turn):
        for at in range(30):
            which = (at * 7 + turn) % len(given)
            close(tw.attention(*given[which]), truth[which])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_anew():
    given = inputs()
    tw.attention(*given)
    child = os.fork()
    if child == 0:
        os._exit(len(known.calls))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(known.calls) == 1
