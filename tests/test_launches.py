"""Calls on GPUs up to the launch (`gpu_math/launches.py`): what a kept launch hands to the driver is what Triton's own would.

A stub stands in for driver and compiler (`support/stub_driver.py`); numbers are the contract's and the interpreter's to check.
"""
import gc
import os
import sys
import weakref
from functools import partial

import pytest
import torch
from support.backends import GPU

pytest.importorskip("triton")
if GPU or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are run here", allow_module_level=True)

from support import stub_driver

import tilewise as tw
from tilewise import known
from tilewise.backends import Needs, load
from tilewise.backends.gpu_math import launches, splits
from tilewise.bench.cases import CASES, draw

pytestmark = pytest.mark.usefixtures("forgetful", "one_thread")
TRITON = load("triton")
# what a call allocates for itself
OWN = {"RNG", "OUT", "LSE", "PARTS", "PART_LSE", "DELTA", "DLSE", "DO", "DQ", "DK", "DV_", "DBIAS", "LIST", "WORK"}


@pytest.fixture
def made(monkeypatch):
    with stub_driver.launches(monkeypatch) as made:
        yield made
        for one in made:                # a kernel that counts on a multiple of 16 bytes gets nothing else
            assert one.kernel.aligned == {name for name in one.kernel.pointers if address(one.arguments[name]) % 16 == 0}


def address(pointer):
    return pointer if isinstance(pointer, int) else pointer.data_ptr()


def told(launch):
    """A launch without where a call's own memory begins."""
    return launch.kernel, launch.grid, launch.stream, {
        name: address(x) if name in launch.kernel.pointers else x for name, x in launch.arguments.items() if name not in OWN}


def anew_and_kept(made, anew, kept):
    """What launches that are bound anew are told, and kept ones when they are made a third time."""
    made.clear()
    anew()
    first = [told(one) for one in made]
    for _ in range(3):
        made.clear()
        kept()
    return first, [told(one) for one in made]


NAMES = ("full", "causal bhsd", "one query", "grouped heads", "documents", "boolean tensor", "function of heads",
         "bias over batch", "sinks strided", "no keys", "empty batch", "batch invariant", "everything", "table of keys",
         "packed causal", "packed function of heads", "packed everything")


@pytest.mark.parametrize("name", NAMES)
def test_kept_launches_are_those_of_triton(name, made):
    problem, x = draw(next(case for case in CASES if case.name == name), torch.bfloat16).described()
    out, lse = TRITON.forward(problem, x)
    run = TRITON.prepared(problem, x, out)
    anew, kept = anew_and_kept(made, lambda: TRITON.forward(problem, x), lambda: run(x, out=out, lse=lse))
    assert anew == kept
    assert kept or not problem.batch

    dout, delta, none = torch.randn_like(out), torch.empty_like(lse), Needs(False, False)
    dq, dk, dv = (torch.empty_like(t) for t in x[:3])
    run = TRITON.prepared_backward(problem, x, out, dout)
    results = dict(out=out, lse=lse, dout=dout, delta=delta, dq=dq, dk=dk, dv=dv)
    for dlse in (None, lse) if run is not None else ():
        anew, kept = anew_and_kept(made, partial(TRITON.backward, problem, x, out, lse, dout, dlse, none),
                                   partial(run, x, dlse=dlse, **results))
        assert anew == kept


@pytest.mark.parametrize("kind", ["contiguous", "pages", "fp8"])
def test_a_decoding_step_split_among_programs(kind, made, monkeypatch):
    """Two launches and the one that appends, all of them kept."""
    monkeypatch.setattr(splits, "multiprocessors", lambda device: 132)
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.bfloat16
    new = [torch.randn(2, 222, 2, 32, dtype=torch.bfloat16) for _ in range(2)]
    if kind == "pages":
        cache = tw.PagedKVCache(32, 32, 2, 32, max_sequences=2, dtype=dtype)
        which = [cache.new(), cache.new()]
    else:
        cache, which = tw.KVCache(2, 512, 2, 32, dtype=dtype), None
    cache.append(*new, **({} if which is None else dict(sequences=which)))
    steps = []
    for _ in range(6):
        made.clear()
        q, k, v = (torch.randn(2, 1, heads, 32, dtype=torch.bfloat16) for heads in (4, 2, 2))
        tw.attention_with_kv_cache(q, cache, k, v, backend="triton", cache_batch_idx=which)
        steps.append(list(made))
        if kind == "pages":             # the table gets another column
            assert made[1].arguments["pages_row"] == -(-(222 + len(steps)) // 32)
    for one in steps:
        assert [launch.name for launch in one] == ["append", "forward", "merge"]
        assert one[1].grid[1] == one[1].arguments["splits"] > 1
        assert address(one[1].arguments["OUT"]) == address(one[2].arguments["PARTS"])
    *_, first, last = steps
    assert [one[:2] for one in map(told, first)] == [one[:2] for one in map(told, last)]
    assert all(isinstance(one.arguments[name], int) for one in last for name in one.kernel.pointers)


# ---- pointers -----------------------------------------------------------------------------------------------------------

def inputs(rows=40, heads=2, dim=16, **options):
    return [torch.randn(1, rows, heads, dim, **options) for _ in range(3)]


def attend(q, k, v, **options):
    return tw.attention(q, k, v, backend="triton", **options)


def beginning(x, at):
    """x where it begins `at` bytes behind a multiple of 16, at the start of its storage."""
    memory = bytearray(x.numel() * x.itemsize + 32)
    skipped = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16 + at
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=skipped).view(x.shape).copy_(x)


def test_pointers_decide_for_themselves(made):
    """Storages of tensors that are alike begin anywhere: each pointer gets the kernel it needs."""
    q, k, v = inputs()
    kernels = {}
    for at in ((0, 0, 0), (4, 0, 0), (0, 8, 4), (0, 0, 0), (4, 0, 0), (0, 4, 12), (16, 0, 0)):
        given = [beginning(x, offset) for x, offset in zip((q, k, v), at, strict=True)]
        assert [x.storage_offset() for x in given] == [0, 0, 0]
        attend(*given)
        launch = made[-1]
        assert [address(launch.arguments[name]) for name in "QKV"] == [x.data_ptr() for x in given]
        which = tuple(name for name, offset in zip("QKV", at, strict=True) if offset % 16 == 0)
        assert launch.kernel.aligned & set("QKV") == set(which)
        assert kernels.setdefault(which, launch.kernel) is launch.kernel
    assert len(set(kernels.values())) == 3


def test_tensors_of_one_storage(made):
    """Slices of one tensor, whose offsets are told apart by the layout already, and empty ones."""
    whole = torch.randn(3 * 40 * 2 * 16 + 8)
    for offset in (0, 1, 4, 0, 1, 4):
        q, k, v = whole[offset:][:3 * 40 * 2 * 16].view(3, 1, 40, 2, 16)
        attend(q, k, v)
        assert address(made[-1].arguments["Q"]) == q.data_ptr()
    attend(*(x[:, :0] for x in inputs()))
    attend(*(x[:0] for x in inputs()))
    assert len(made) == 6


# ---- each call's own ----------------------------------------------------------------------------------------------------

def test_results_and_workspaces_are_each_calls_own(made):
    q, k, v = inputs()
    results = [attend(q, k, v) for _ in range(3)]
    pairs = [attend(q, k, v, return_lse=True) for _ in range(2)]
    assert [address(one.arguments["OUT"]) for one in made] == [x.data_ptr() for x in (*results, *(out for out, _ in pairs))]
    assert len({x.data_ptr() for x in (*results, *sum(pairs, ()))}) == 7
    assert [address(one.arguments["LSE"]) for one in made[3:]] == [lse.data_ptr() for _, lse in pairs]


def test_the_current_stream_and_device(made, monkeypatch):
    given = inputs()
    attend(*given)
    attend(*given)
    monkeypatch.setattr(stub_driver.Driver, "stream", 5)
    attend(*given)
    assert [one.stream for one in made] == [0, 0, 5]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert launches.current(torch.device("cuda", 0)) is launches.HERE
    elsewhere = launches.current(torch.device("cuda", 1))
    assert isinstance(elsewhere, torch.cuda.device)
    assert elsewhere.idx == 1


def test_nothing_is_kept_alive(made):
    given = inputs(requires_grad=True)
    dout = torch.randn(1, 40, 2, 16)
    for _ in range(2):
        out, lse = attend(*given, return_lse=True)
        gradients = torch.autograd.grad(out, given, dout)
    gone = [weakref.ref(x) for x in (*given, out, lse, dout, *gradients)]
    made.clear()
    del given, out, lse, dout, gradients
    gc.collect()
    assert len(known.calls) == 1
    assert [ref() for ref in gone] == [None] * len(gone)


def test_a_launch_that_fails_is_made_anew(made, monkeypatch):
    given = inputs()
    with monkeypatch.context() as patch:
        patch.setattr(stub_driver.Driver, "get_current_stream", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attend(*given)
    attend(*given)
    assert len(made) == 1


def test_a_table_written_to_has_its_tiles_listed_anew(made):
    q, k, v = inputs(rows=200)
    visible = torch.ones(200, dtype=torch.bool)
    mask, lists = tw.mask_mod(lambda b, h, q_idx, kv_idx: visible[kv_idx]), []
    for hidden in (200, 200, 100):
        if hidden < 200:
            visible[hidden:] = False
        attend(q, k, v, mask=mask)
        lists.append(address(made[-1].arguments["LIST"]))
    assert lists[0] == lists[1] != lists[2]


# ---- host time ----------------------------------------------------------------------------------------------------------

# Python and built-in functions that a call enters until its last launch reaches the driver, once a call like it was made.
MOST_CALLS = {"forward": (43, 32), "recorded": (63, 52), "forward and backward": (153, 145), "packed": (154, 112),
              "decoding step": (147, 150)}


def timed_cases():
    q, k, v = inputs()
    here = [x.clone().requires_grad_() for x in (q, k, v)]
    dout, cu_seqlens = torch.randn(1, 40, 2, 16), torch.tensor([0, 15, 40], dtype=torch.int32)
    cache = tw.KVCache(1, 64, 2, 16, dtype=torch.float32)
    cache.append(k[:, :20], v[:, :20])
    return {
        "forward": lambda: attend(q, k, v),
        "recorded": lambda: attend(*here),
        "forward and backward": lambda: torch.autograd.grad(attend(*here), here, dout),
        "packed": lambda: tw.attention_varlen(q[0], k[0], v[0], cu_seqlens, backend="triton"),
        "decoding step": lambda: tw.attention_with_kv_cache(q[:, :1], cache, k[:, :1], v[:, :1], backend="triton"),
    }


@pytest.mark.parametrize("name", MOST_CALLS)
def test_a_call_like_one_before_enters_few_functions(name, made):
    entered = {"call": 0, "c_call": 0}

    def count(_frame, event, _argument):
        if event in entered:
            entered[event] += 1

    call = timed_cases()[name]
    with torch.set_grad_enabled(name in ("recorded", "forward and backward")):
        for _ in range(3):
            call()
        gc.disable()                    # what is finalised now is none of the call's
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
            gc.enable()
    found, most = tuple(entered.values()), MOST_CALLS[name]
    assert all(a <= b for a, b in zip(found, most, strict=True)), f"entered {found}, at most {most} were committed"
