"""Decoding steps like one before (`tilewise/steps.py`): remembered or not, they do the same to the bit, errors included."""
import copy
import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.settings import SETTINGS, another

import tilewise as tw
from tilewise import known, steps
from tilewise.backends import load
from tilewise.backends.cpu.append import Append

pytestmark = [
    pytest.mark.skipif(load("cpu").supports(tw.problem.make(*[torch.zeros(1, 1, 1, 1)] * 3)[0]) is not None,
                       reason="no C++ compiler"),
    pytest.mark.usefixtures("forgetful", "one_thread")]
BATCH, HEADS, KV_HEADS, DIM, PAGE = 3, 4, 2, 8, 16


@pytest.fixture
def forgetful():
    known.forget()
    yield
    known.forget()


@pytest.fixture
def general(monkeypatch):
    """A call, the general way."""
    def call(run):
        with monkeypatch.context() as patch:
            patch.setattr(steps, "asked", lambda *_: None)
            return run()

    return call


@pytest.fixture
def served(monkeypatch):
    """One entry for each step asked for: whether it was remembered."""
    found, again = [], steps.again

    def spy(*arguments):
        result = again(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(steps, "again", spy)
    return found


def tokens(seed=0, count=1, batch=BATCH):
    """q, k_new, v_new."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, count, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))


def contiguous(**options):
    return tw.KVCache(BATCH, 96, KV_HEADS, DIM, dtype=torch.float32, **options), None


def in_slots():
    k, v = torch.zeros(2, 5, 96, KV_HEADS, DIM).unbind(0)
    return tw.KVCache.wrap(k, v, torch.zeros(BATCH, dtype=torch.int32), slots=torch.tensor([4, 0, 3])), None


def some_of_many():
    return tw.KVCache(5, 96, KV_HEADS, DIM, dtype=torch.float32), torch.tensor([4, 0, 3])


def paged():
    cache = tw.PagedKVCache(24, PAGE, KV_HEADS, DIM, max_sequences=5, max_pages_per_sequence=6, dtype=torch.float32)
    cache.new()
    return cache, [cache.new() for _ in range(BATCH)][::-1]


def foreign(left_padding=None):
    k, v = torch.zeros(2, 20, PAGE, KV_HEADS, DIM).unbind(0)
    table = torch.arange(18, dtype=torch.int32).view(BATCH, 6).flip(1).contiguous() + 1
    return tw.PagedKVCache.wrap(k, v, table, torch.zeros(BATCH, dtype=torch.int32), left_padding=left_padding), None


def values_in_keys():
    return tw.KVCache(BATCH, 96, KV_HEADS, DIM, head_dim_v=6, dtype=torch.float32, v_in_k=True), None


PADDING = torch.tensor([3, 0, 7], dtype=torch.int32)
CACHES = {"contiguous": contiguous, "left padding": lambda: contiguous(left_padding=PADDING), "slots": in_slots,
          "some of many": some_of_many, "pages": paged, "foreign pages": foreign,
          "foreign pages, left padding": lambda: foreign(PADDING), "some foreign pages": lambda: (foreign()[0], (2, 0, 1)),
          "values in keys": values_in_keys}


def filled(kind, counts=(11, 2, 30)):
    """A cache with so many keys in each sequence, and which sequences those are."""
    cache, which = CACHES[kind]()
    cache.k.zero_()
    cache.v.zero_()
    k, v = torch.randn(2, sum(counts), KV_HEADS, DIM, generator=torch.Generator().manual_seed(1)).unbind(0)
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0)
    name = "sequences" if isinstance(cache, tw.PagedKVCache) else "cache_batch_idx"
    cache.append(k, None if cache.v_in_k else v, cu_seqlens=cu_seqlens, **{name: which})
    return cache, which


def attend(cache, which, q, k_new, v_new, **options):
    return tw.attention_with_kv_cache(q, cache, k_new, None if cache.v_in_k else v_new, cache_batch_idx=which,
                                      return_lse=True, **options)


def everything(cache):
    """All that a cache holds, to compare."""
    book = getattr(cache, "book", None)
    of_book = None if book is None else (cache.block_table.tolist(), copy.deepcopy(book.pages), book.lengths.copy(),
                                         book.free_pages.copy())
    return cache.k.tolist(), cache.v.tolist(), cache.lengths.tolist(), of_book


def outcome(run, cache):
    """What a call returns or raises, and what the cache then holds."""
    try:
        out, lse, *others = run()
        result = [out.tolist(), lse.tolist(), [x.max_score.tolist() for x in others]]
    except Exception as error:
        result = type(error), str(error)
    return result, everything(cache)


@pytest.mark.parametrize("kind", CACHES)
def test_growing_by_steps(kind, served, general):
    """Across pages, and across lengths at which a problem becomes another."""
    cache, which = filled(kind)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        for turn in range(40):
            given = tokens(turn)
            ours, theirs = attend(cache, which, *given), general(lambda given=given: attend(twin, which, *given))
            assert all(map(torch.equal, ours, theirs))
    assert everything(cache) == everything(twin)
    assert served == [False] + 33 * [True] + [False] + 5 * [True]       # 30 keys were there: the 35th step makes 65


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, count, rotary_dim, interleaved", [("left padding", 1, DIM, False), ("pages", 3, 6, False),
                                                                  ("slots", 2, DIM, True), ("foreign pages", 1, 2, True)])
def test_turning_to_positions(kind, count, rotary_dim, interleaved, dtype, served, general):
    """A step turns as PyTorch does, to the bit."""
    cache, which = filled(kind)
    cache.k, cache.v = cache.k.to(dtype), cache.v.to(dtype)
    twin, rotary = copy.deepcopy(cache), tw.Rotary.of(rotary_dim, 50, interleaved=interleaved)
    for turn in range(4):
        given = [x.to(dtype) for x in tokens(turn, count)]
        given[0] = given[0].transpose(1, 2).contiguous().transpose(1, 2) if turn > 1 else given[0]
        ours = attend(cache, which, *given, rotary=rotary)
        theirs = general(lambda given=given: attend(twin, which, *given, rotary=rotary))
        assert all(map(torch.equal, ours, theirs))
    assert everything(cache) == everything(twin)
    assert served == [False, True, count == 1, True]        # of one query, heads and rows lie alike
    rotary.cos.mul_(2)
    ours = attend(cache, which, *given, rotary=rotary)
    assert all(map(torch.equal, ours, general(lambda: attend(twin, which, *given, rotary=rotary))))
    short, before = tw.Rotary.of(rotary_dim, 30 + 6 * count - 1, interleaved=interleaved), everything(cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="rotary: expected tables for"):
            attend(cache, which, *given, rotary=short)
    assert everything(cache) == before


def test_tables_end(served):
    cache, which = filled("contiguous")
    rotary = tw.Rotary.of(DIM, 32)
    for turn in range(2):
        attend(cache, which, *tokens(turn), rotary=rotary)
    before = everything(cache)
    with pytest.raises(ValueError, match="rotary: expected tables for 33 positions, got 32"):
        attend(cache, which, *tokens(), rotary=rotary)
    cache.lengths[:] = torch.tensor([5, 0, 4])
    wide = tokens()[0].repeat(1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"q: expected at most as many queries .* \(1\), got 2"):
        attend(cache, which, wide, *tokens()[1:], rotary=rotary)
    assert everything(cache)[:2] == before[:2]
    assert served == [False, True, False, False]


def test_a_step_is_attention_to_all_keys(served):
    keys, values = (torch.randn(BATCH, 9, KV_HEADS, DIM, dtype=torch.float64) for _ in range(2))
    cache, which = paged()
    with torch.no_grad():
        for row in range(9):
            q = torch.randn(BATCH, 1, HEADS, DIM)
            out, lse = attend(cache, which, q, keys[:, row:row + 1].float(), values[:, row:row + 1].float())
            held = [x[:, :row + 1].float().double() for x in (keys, values)]
            truth = tw.attention(q.double(), *held, return_lse=True, backend="reference")
            torch.testing.assert_close((out.double(), lse.double()), truth, rtol=1e-5, atol=1e-5)
    assert sum(served) == 8


# ---- what a remembered step notices -------------------------------------------------------------------------------------

def lengths(*values):
    def change(cache, which, given):
        cache.lengths[:BATCH] = torch.tensor(values, dtype=torch.int32)

    return change


def replaced(name, make):
    def change(cache, which, given):
        setattr(cache, name, make(getattr(cache, name)))

    return change


def other(**arguments):
    def change(cache, which, given):
        given.update({name: make(given[name]) if name in given else make(None) for name, make in arguments.items()})

    return change


def entry(name, at, value):
    def change(cache, which, given):
        getattr(cache, name)[at] = value

    return change


def several(*changes):
    def change(cache, which, given):
        for one in changes:
            one(cache, which, given)

    return change


WINDOW, SINKS = tw.window(5, 0), torch.randn(HEADS, generator=torch.Generator().manual_seed(2))
CHANGES = {                             # what changes: (caches, change, part of the error)
    "shorter": (["contiguous", "foreign pages"], lengths(4, 0, 9), None),
    "longer": (["contiguous", "left padding", "foreign pages"], lengths(80, 60, 13), None),
    "full": (["contiguous", "foreign pages"], lengths(96, 2, 30), "k_new: expected at most 0 tokens"),
    "full behind padding": (["left padding"], lengths(93, 2, 30), "k_new: expected at most 0 tokens"),
    "more than there is": (["foreign pages"], lengths(11, 97, 30), "lengths: expected values from 0 to 96, got 97"),
    "less than none": (["foreign pages"], lengths(11, -1, 30), "lengths: expected values from 0 to 96, got -1"),
    "lengths by hand under a book": (["pages"], entry("lengths", 1, 3), "extended: expected True"),
    "other lengths": (["contiguous", "foreign pages"], replaced("lengths", lambda x: x + 1), None),
    "wide lengths": (["contiguous"], replaced("lengths", torch.Tensor.long), None),
    "k replaced": (["contiguous", "pages"], replaced("k", torch.randn_like), None),
    "another order of k": (["contiguous", "pages"],
                           replaced("k", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), None),
    "less capacity": (["contiguous"], several(replaced("k", lambda x: x[:, :30].clone()),
                                              replaced("v", lambda x: x[:, :30].clone())), "at most 0 tokens"),
    "padding": (["left padding"], entry("left_padding", 1, 5), None),
    "no padding": (["left padding"], replaced("left_padding", lambda x: None), None),
    "slots": (["slots"], replaced("slots", lambda x: x.flip(0)), None),
    "narrow slots": (["slots"], replaced("slots", torch.Tensor.int), None),
    "slot written in place": (["slots"], entry("slots", 1, 2), None),
    "a slot twice": (["slots"], entry("slots", 1, 4), "slots: expected each sequence once, got 4 twice"),
    "table swapped": (["foreign pages"], replaced("block_table", lambda x: x.flip(0)), None),
    "table turned": (["foreign pages"], replaced("block_table", lambda x: x.t().contiguous().t()), None),
    "more columns": (["foreign pages"], replaced("block_table", lambda x: torch.cat([x, x[:, :1] * 0 + 19], 1)), None),
    "no such page": (["foreign pages"], entry("block_table", (1, 0), 20), "expected pages from 0 to 19 in sequence 1, got 20"),
    "a page twice": (["foreign pages"], entry("block_table", (2, 1), 18), "got page 18 twice in sequence 2"),
    "a page of two": (["foreign pages"], entry("block_table", (1, 0), 18), "pages that sequence"),
    "a page of two that neither writes to": (["foreign pages"],
                                             several(lengths(16, 16, 16), entry("block_table", (1, 0), 6)), None),
    "k_new in bf16": (["contiguous", "pages"], other(k_new=torch.Tensor.bfloat16), "k_new: expected float32"),
    "all in bf16": (["contiguous"], other(q=torch.Tensor.bfloat16, k_new=torch.Tensor.bfloat16, v_new=torch.Tensor.bfloat16),
                    "q: expected the cache's dtype"),
    "more tokens": (["contiguous", "pages"], other(q=lambda x: x.repeat(1, 3, 1, 1), k_new=lambda x: x.repeat(1, 3, 1, 1),
                                                   v_new=lambda x: x.repeat(1, 3, 1, 1)), None),
    "more queries than keys": (["contiguous"], several(lengths(3, 0, 5), other(q=lambda x: x.repeat(1, 4, 1, 1))), None),
    "more keys than values": (["contiguous", "pages"], other(k_new=lambda x: x.repeat(1, 2, 1, 1)), "v_new: expected"),
    "a head too many": (["contiguous"], other(k_new=lambda x: x.repeat(1, 1, 2, 1)), "k_new: expected"),
    "more heads": (["contiguous"], other(q=lambda x: x.repeat(1, 1, 2, 1)), None),
    "no values": (["contiguous", "pages"], other(v_new=lambda x: None), "v_new: expected"),
    "no tokens": (["contiguous", "pages"], other(k_new=lambda x: None, v_new=lambda x: None), None),
    "another order": (["contiguous", "pages"], other(k_new=lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
                                                     q=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), None),
    "one key for all": (["contiguous"], other(k_new=lambda x: x[:1].expand(BATCH, -1, -1, -1)), None),
    "no tensor": (["contiguous"], other(k_new=torch.Tensor.tolist), "k_new: expected float32, got list"),
    "gradients": (["contiguous", "pages"], other(q=lambda x: x.clone().requires_grad_()), "q: expected no gradient"),
    "scale": (["contiguous"], other(scale=lambda _: 0.7), None),
    "wrong scale": (["contiguous"], other(scale=lambda _: True), "scale: expected"),
    "causal": (["contiguous"], other(causal=lambda _: True), None),
    "equal to causal": (["contiguous"], other(causal=lambda _: 0), "causal: expected"),
    "window": (["contiguous", "pages"], other(mask=lambda _: WINDOW), None),
    "sinks": (["contiguous"], other(sinks=lambda _: SINKS), None),
    "bias": (["contiguous"], other(bias=lambda _: torch.randn(31, generator=torch.Generator().manual_seed(3))), None),
    "bias of another length": (["contiguous"], other(bias=lambda _: torch.zeros(30)), "bias: expected"),
    "splits": (["contiguous"], other(num_splits=lambda _: 2), None),
    "statistics": (["contiguous"], other(return_stats=lambda _: ["max_score"]), None),
    "an empty list of statistics": (["contiguous"], other(return_stats=lambda _: []), None),
    "another backend": (["contiguous"], other(backend=lambda _: "tiled"), None),
    "no backend": (["contiguous"], other(backend=lambda _: "fast"), "backend: expected"),
    "rotary": (["contiguous", "pages"], other(rotary=lambda _: tw.Rotary.of(DIM, 99)), None),
}
NOTICED = [pytest.param(kind, name, id=f"{name}, {kind}") for name, (kinds, *_) in CHANGES.items() for kind in kinds]


@pytest.mark.parametrize("kind, name", NOTICED)
def test_what_a_remembered_step_notices(kind, name, served, general):
    _, change, error = CHANGES[name]
    cache, which = filled(kind, (9, 0, 28))
    for turn in range(2):
        attend(cache, which, *tokens(turn))
    assert served == [False, True]
    given = dict(zip(("q", "k_new", "v_new"), tokens(5), strict=True))
    change(cache, which, given)
    for _ in range(3):                  # as it is, remembered, and once more
        twin = copy.deepcopy(cache)
        before = everything(cache)
        ours = outcome(lambda: attend(cache, which, **given), cache)
        theirs = general(lambda twin=twin: outcome(lambda: attend(twin, which, **given), twin))
        assert ours == theirs
        if error is not None:
            assert isinstance(ours[0], tuple)
            assert error in ours[0][1]
            assert everything(cache) == before


# ---- settings, and what else there is -----------------------------------------------------------------------------------

def steady(kind):
    """A step that is remembered, on a cache that it leaves as it was."""
    cache, which = filled(kind)
    before, given = cache.lengths.clone(), tokens(7)

    def step(**options):
        cache.lengths.copy_(before)
        return attend(cache, which, *given, **options)

    for _ in range(2):
        step()
    return step


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_pytorch_decide(setting, served):
    step = steady("contiguous")
    truth = step()
    with another(setting):
        torch.testing.assert_close(step(), truth)
    assert served == [False, True, True, False]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode, served):
    """A step under them may be given what needs a gradient; the same step outside may not."""
    cache, which = filled("contiguous")
    q, k_new, v_new = tokens()
    with mode():
        for _ in range(3):
            attend(cache, which, q.requires_grad_(), k_new, v_new)
    assert served == [False, True, True]
    before = everything(cache)
    with pytest.raises(ValueError, match="q: expected no gradient"):
        attend(cache, which, q, k_new, v_new)
    assert everything(cache) == before


def test_a_table_that_comes_to_need_a_gradient(served):
    table = torch.randn(96)
    mod = tw.score_mod(lambda score, b, h, q_idx, kv_idx: score + table[kv_idx])
    cache, which = filled("contiguous")
    for _ in range(2):
        attend(cache, which, *tokens(), score_mod=mod)
    table.requires_grad_()
    with torch.no_grad():
        attend(cache, which, *tokens(), score_mod=mod)
    before = everything(cache)
    with pytest.raises(ValueError, match=r"captured tensor \[96\]: expected no gradient"):
        attend(cache, which, *tokens(), score_mod=mod)
    assert everything(cache) == before


def test_autocast(served, general):
    cache = tw.KVCache(BATCH, 96, KV_HEADS, DIM, dtype=torch.bfloat16)
    for turn in range(3):
        attend(cache, None, *(x.bfloat16() for x in tokens(turn)))
    with pytest.raises(TypeError, match="q: expected the cache's dtype"):
        attend(cache, None, *tokens(3))
    twin = copy.deepcopy(cache)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = attend(cache, None, *tokens(3)), general(lambda: attend(twin, None, *tokens(3)))
    assert all(map(torch.equal, ours, theirs))


def test_a_mask_of_the_lengths_themselves(general):
    """A step writes to the lengths, and whoever reads them is told."""
    cache, _ = filled("contiguous")
    twin = copy.deepcopy(cache)
    masks = [tw.mask_mod(lambda b, h, q_idx, kv_idx, of=of: kv_idx * 2 >= of.lengths[b]) for of in (cache, twin)]
    for turn in range(5):
        version = cache.lengths._version, cache.k._version, cache.v._version
        ours = attend(cache, None, *tokens(turn), mask=masks[0])
        theirs = general(lambda turn=turn: attend(twin, None, *tokens(turn), mask=masks[1]))
        assert all(map(torch.equal, ours, theirs))
        assert all(a > b for a, b in zip((cache.lengths._version, cache.k._version, cache.v._version), version, strict=True))


def test_a_fork_gets_a_page_of_its_own(served, general):
    cache, which = filled("pages")
    attend(cache, which, *tokens())
    twin = copy.deepcopy(cache)
    for one in (cache, twin):
        child = one.fork(which[2])
    which = [which[0], child, which[1]]
    for turn in range(3):
        ours = attend(cache, which, *tokens(turn))
        theirs = general(lambda turn=turn: attend(twin, which, *tokens(turn)))
        assert all(map(torch.equal, ours, theirs))
    assert everything(cache) == everything(twin)
    assert served == [False, True, True, True]


def test_no_page_is_left():
    cache, which = filled("pages", (16, 16, 16))
    cache.book.free_pages[2:] = []
    attend(cache, which[:2], *tokens(batch=2))
    for sequence in which[:2]:
        cache.truncate(sequence, 16)
    cache.book.free_pages[1:] = []
    before = everything(cache)
    with pytest.raises(tw.CacheFull, match="pages: needed 2, free 1 of 24"):
        attend(cache, which[:2], *tokens(batch=2))
    assert everything(cache) == before


def test_room_made_before(served):
    cache, which = filled("pages")
    for turn in range(3):
        with pytest.raises(ValueError, match="extended: expected False"):
            attend(cache, which, *tokens(turn), extended=True)
        cache.extend(which, [1] * BATCH)
        with pytest.raises(ValueError, match="extended: expected True"):
            attend(cache, which, *tokens(turn))
        attend(cache, which, *tokens(turn), extended=True)
    assert served == [False, False, False, False, False, True, False, False, True]


def test_a_failure_gives_room_back(monkeypatch):
    cache, which = filled("pages")
    attend(cache, which, *tokens())
    before = everything(cache)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Append, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            attend(cache, which, *tokens())
    assert everything(cache) == before
    attend(cache, which, *tokens())


def test_prompts_go_the_general_way(served):
    """Many tokens are copied by PyTorch's threads."""
    cache = tw.KVCache(1, 600, 8, 64, dtype=torch.float32)
    q, k = torch.randn(1, 300, 8, 64), torch.randn(1, 300, 8, 64)
    for _ in range(2):
        tw.attention_with_kv_cache(q, cache, k, k)
    assert served == [False, False]


def test_steps_of_other_caches_in_turns(served):
    """Caches that lie alike share what is remembered, whatever their lengths."""
    caches = [filled("contiguous", counts) for counts in ((1, 2, 3), (70, 2, 3), (5, 5, 95))]
    for _ in range(3):
        for cache, which in caches[:2]:
            attend(cache, which, *tokens())
    assert served == [False, False, True, True, True, True]
    attend(*caches[2], *tokens())
    with pytest.raises(ValueError, match="at most 0 tokens for sequence 2"):
        attend(*caches[2], *tokens())


def test_threads_share_them(general):
    def work(turn, one_way=lambda run: run()):
        cache, which = filled("pages" if turn % 2 else "contiguous", (turn, 2 * turn, 3))
        for at in range(20):
            out, _ = one_way(lambda at=at: attend(cache, which, *tokens(100 * turn + at)))
        return out, everything(cache)

    truth = [work(turn, general) for turn in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for (out, held), (wanted, wanted_held) in zip(found, truth, strict=True):
        assert torch.equal(out, wanted)
        assert held == wanted_held


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_goes_on(served):
    step = steady("contiguous")
    truth = step()
    child = os.fork()
    if child == 0:
        same = all(torch.equal(a, b) for _ in range(2) for a, b in zip(step(), truth, strict=True))
        os._exit(0 if same and served == [False, True, True, False, True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nothing_is_kept_alive():
    cache, which = filled("contiguous")
    q, k_new, v_new = tokens()
    for _ in range(2):
        attend(cache, which, q, k_new, v_new)
    gone = [weakref.ref(x) for x in (q, k_new, v_new, cache.k, cache.lengths, cache)]
    del cache, q, k_new, v_new
    gc.collect()
    assert [ref() for ref in gone] == [None] * 6


def test_what_goes_with_its_mask():
    cache, which = filled("contiguous")
    mask = tw.mask_mod(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 20)
    for _ in range(2):
        attend(cache, which, *tokens(), mask=mask)
    assert len(known.calls) == 3       # the call, the tokens' places, and both
    del mask
    gc.collect()
    assert len(known.calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_until_memory_ends(dtype):
    """All but the first remembered, in caches of every kind."""
    table = torch.arange(12, dtype=torch.int32).flip(0).view(3, 4)
    padding = torch.tensor([5, 0, 1], dtype=torch.int32)
    k, v = torch.randn(2, 12, 8, 2, 40).to(dtype).unbind(0)
    pages = tw.PagedKVCache(12, 8, 2, 40, max_sequences=3, max_pages_per_sequence=4, dtype=dtype)
    slots = tw.KVCache.wrap(*(x.view(3, 32, 2, 40) for x in (k, v)), padding * 0, slots=torch.tensor([2, 0, 1]))
    rotary = tw.Rotary.of(30, 32)
    for cache, which, count in ((tw.KVCache(3, 32, 2, 40, dtype=dtype, left_padding=padding), None, 7), (slots, None, 12),
                                (pages, [pages.new() for _ in range(3)], 12),
                                (tw.PagedKVCache.wrap(k.clone(), v.clone(), table, padding * 0), None, 12)):
        name = "sequences" if isinstance(cache, tw.PagedKVCache) else "cache_batch_idx"
        cache.append(*torch.randn(2, 3, 20, 2, 40).to(dtype), **{name: which})
        for _ in range(count):
            q, k_new, v_new = (torch.randn(3, 1, heads, 40).to(dtype) for heads in (4, 2, 2))
            out = tw.attention_with_kv_cache(q, cache, k_new, v_new, cache_batch_idx=which, rotary=rotary)
            q = rotary.rotate(q.transpose(1, 2), cache.lengths[:3, None, None] - 1).transpose(1, 2)
            again = tw.attention_with_kv_cache(q, cache, cache_batch_idx=which, backend="reference")
            torch.testing.assert_close(out, again, rtol=0, atol=max(1e-5, 4 * torch.finfo(dtype).eps))
