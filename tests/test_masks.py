"""Masks: what they show, and that skipping and not masking tiles is sound."""
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from tilewise.trace.bounds import EMPTY, FULL, band_classes
from tilewise.trace.evaluate import slot_values
from tilewise.trace.graph import lower, parse

BATCH, NQ, NK = 2, 13, 9


def ids(length):
    return st.lists(st.lists(st.integers(-1, 2), min_size=length, max_size=length), min_size=BATCH, max_size=BATCH).map(
        torch.tensor)


LEAVES = st.one_of(
    st.just(tw.causal()), st.just(tw.full()),
    st.builds(tw.window, st.none() | st.integers(0, 15), st.none() | st.integers(0, 15)),
    st.lists(st.integers(0, NK), min_size=BATCH, max_size=BATCH).map(lambda n: tw.key_lengths(torch.tensor(n))),
    st.integers(1, 6).map(tw.chunked), st.builds(tw.documents, ids(NQ), ids(NK)))
MASKS = st.recursive(LEAVES, lambda inner: st.one_of(
    st.builds(lambda a, b: a & b, inner, inner), st.builds(lambda a, b: a | b, inner, inner), inner.map(lambda a: ~a)),
    max_leaves=5)


def assert_sound(classes, dense, tile_q, tile_k):
    """No tile said EMPTY shows a score, none said FULL hides one."""
    for i in range(classes.shape[2]):
        for j in range(classes.shape[3]):
            block = dense[:, :, i * tile_q:(i + 1) * tile_q, j * tile_k:(j + 1) * tile_k].flatten(2)
            assert not ((classes[:, :, i, j] == EMPTY) & block.any(-1)).any()
            assert not ((classes[:, :, i, j] == FULL) & ~block.all(-1)).any()


@settings(max_examples=300, deadline=None)
@given(MASKS, st.sampled_from([(1, 1), (2, 3), (4, 4), (16, 2)]))
def test_tile_classes_are_sound(mask, tile):
    dense = mask.dense(BATCH, 1, NQ, NK)
    assert_sound(mask.classify(BATCH, 1, NQ, NK, *tile), dense, *tile)


@settings(max_examples=300, deadline=None)
@given(MASKS, st.sampled_from([(1, 1), (2, 3), (4, 4)]))
def test_bands_of_queries_are_sound(mask, tile):
    """The transposed question, which the dK, dV kernel asks: by exchanging the roles of q and k."""
    program = lower([[x for band in mask.queries for x in band]])
    values = slot_values(program.captured, program.ints, program.floats)
    (bands,) = parse(re.sub(r"\b[qk]\b", lambda leaf: "k" if leaf[0] == "q" else "q", program.text))
    values |= dict(b=torch.arange(BATCH)[:, None, None, None], h=torch.arange(1)[:, None, None], nk=NK, nq=NQ)
    classes = band_classes(bands, values, NK, NQ, *tile).expand(BATCH, 1, -1, -1)
    assert_sound(classes, mask.dense(BATCH, 1, NQ, NK).mT, *tile)


@settings(max_examples=100, deadline=None)
@given(MASKS, MASKS)
def test_operators_are_logic(a, b):
    x, y = (m.dense(BATCH, 1, NQ, NK) for m in (a, b))
    assert torch.equal((a & b).dense(BATCH, 1, NQ, NK), x & y)
    assert torch.equal((a | b).dense(BATCH, 1, NQ, NK), x | y)
    assert torch.equal((~a).dense(BATCH, 1, NQ, NK), ~x)


@pytest.mark.parametrize("mask, visited, full", [
    (tw.causal(), 36, 28), (tw.window(15, 0), 8 + 7, 0), (tw.window(31, 0), 8 + 7 + 6, 7), (tw.full(), 64, 64),
    (tw.chunked(32), 16, 16), (tw.causal() | tw.prefix(torch.tensor([32])), 16 + 6 + 15, 16 + 15),
    (tw.documents(torch.arange(128) // 64), 32, 32), (~tw.causal(), 36, 28), (tw.key_lengths(torch.tensor([40])), 24, 16),
], ids=str)
def test_closed_forms_are_tight(mask, visited, full):
    classes = mask.classify(1, 1, 128, 128, 16, 16)
    assert int((classes != EMPTY).sum()) == visited
    assert int((classes == FULL).sum()) == full


def test_a_million_tokens_classify_without_n_squared():
    n = 2**20
    classes = (tw.causal() & tw.documents(torch.arange(n) // 5000)).classify(1, 1, n, n, 1024, 1024)
    assert classes.shape == (1, 1, 1024, 1024)
    assert 0 < int((classes != EMPTY).sum()) < 10_000


def test_documents_do_not_follow_later_changes_of_the_ids():
    numbers = torch.tensor([0, 0, 1, 1])
    mask = tw.documents(numbers)
    before = mask.dense(1, 1, 4, 4)
    numbers.zero_()
    assert torch.equal(mask.dense(1, 1, 4, 4), before)


def test_drawings(tmp_path):
    assert tw.window(1, 0).draw(3) == "■ · ·\n■ ■ ·\n· ■ ■"
    assert tw.causal().draw(2, 4) == "■ ■ ■ ·\n■ ■ ■ ■"
    tw.causal().save_png(tmp_path / "mask.png", 40, 50, tile=8)
    assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("make, error, words", [
    (lambda: tw.window(-1, 0), ValueError, "window: left: expected a number of neighbours >= 0 or None, got -1"),
    (lambda: tw.window(0, 1.5), ValueError, "window: right: .* got 1.5"),
    (lambda: tw.window(True, 0), ValueError, "window: left: .* got True"),
    (lambda: tw.chunked(0), ValueError, "chunked: size: expected an integer >= 1, got 0"),
    (lambda: tw.key_lengths([1]), TypeError, "key_lengths: lengths: expected an int32 or int64 tensor .* got list"),
    (lambda: tw.key_lengths(torch.zeros(2)), TypeError, "key_lengths: lengths: .* got torch.float32"),
    (lambda: tw.prefix(torch.zeros(2, 2, dtype=torch.int32)), TypeError, r"prefix: lengths: .* \[2, 2\]"),
    (lambda: tw.documents(torch.zeros(3)), TypeError, "documents: ids_q: .* got torch.float32"),
    (lambda: tw.documents(torch.zeros(3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32)), ValueError,
     "documents: ids_k: expected as many dimensions as ids_q"),
    (lambda: tw.causal() & True, TypeError, "&: expected a mask or a mask function on both sides, got bool"),
    (lambda: tw.causal() and tw.full(), TypeError, "combine masks with & | ~"),
    (lambda: tw.alibi([1.0]), TypeError, "alibi: slopes: expected a floating tensor"),
    (lambda: tw.softcap(0.0), ValueError, "softcap: cap: expected a finite number > 0, got 0.0"),
    (lambda: tw.softcap(float("nan")), ValueError, "softcap: cap: .* got nan"),
])
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
