"""Masks: what they show, and that skipping and not masking tiles is sound."""
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from tilewise.packing import cu_seqlens
from tilewise.trace.bounds import EMPTY, FULL, PARTIAL, band_classes
from tilewise.trace.evaluate import slot_values
from tilewise.trace.graph import lower, parse

BATCH, NQ, NK = 2, 13, 9


def ids(length):
    return st.lists(st.lists(st.integers(-1, 2), min_size=length, max_size=length), min_size=BATCH, max_size=BATCH).map(
        torch.tensor)


def parents(length):
    return st.tuples(*[st.tuples(*[st.integers(-1, t - 1) for t in range(length)])] * BATCH).map(torch.tensor)


LEAVES = st.one_of(
    st.just(tw.causal()), st.just(tw.full()),
    st.builds(tw.window, st.none() | st.integers(0, 15), st.none() | st.integers(0, 15)),
    st.lists(st.integers(0, NK), min_size=BATCH, max_size=BATCH).map(lambda n: tw.key_lengths(torch.tensor(n))),
    st.integers(1, 6).map(tw.chunked), st.builds(tw.documents, ids(NQ), ids(NK)),
    parents(NQ + 2).map(tw.tree))
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


def transposed_classes(mask, nq, nk, tile):
    """The transposed question, which the dK, dV kernel asks: by exchanging the roles of q and k."""
    program = lower([[x for band in mask.queries for x in band]])
    values = slot_values(program.captured, program.ints, program.floats)
    (bands,) = parse(re.sub(r"\b[qk]\b", lambda leaf: "k" if leaf[0] == "q" else "q", program.text))
    values |= dict(b=torch.arange(BATCH)[:, None, None, None], h=torch.arange(1)[:, None, None], nk=nk, nq=nq)
    return band_classes(bands, values, nk, nq, *tile).expand(BATCH, 1, -1, -1)


@settings(max_examples=300, deadline=None)
@given(MASKS, st.sampled_from([(1, 1), (2, 3), (4, 4), (16, 2)]))
def test_tile_classes_are_sound(mask, tile):
    dense = mask.dense(BATCH, 1, NQ, NK)
    assert_sound(mask.classify(BATCH, 1, NQ, NK, *tile), dense, *tile)


@settings(max_examples=300, deadline=None)
@given(MASKS, st.sampled_from([(1, 1), (2, 3), (4, 4)]))
def test_bands_of_queries_are_sound(mask, tile):
    assert_sound(transposed_classes(mask, NQ, NK, tile), mask.dense(BATCH, 1, NQ, NK).mT, *tile)


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


# ---- trees --------------------------------------------------------------------------------------------------------------

def random_parents(kind, length, seed):
    """[BATCH, length]: any earlier node or none, a chain, roots only, or mostly the node before."""
    rng = random.Random(seed)
    choose = {"any": lambda t: rng.randint(-1, t - 1), "chain": lambda t: t - 1, "roots": lambda t: -1,
              "deep": lambda t: max(-1, t - 1 - int(rng.expovariate(1.0)))}[kind]
    return torch.tensor([[choose(t) for t in range(length)] for _ in range(BATCH)])


def walked(parents, nq, nk):
    """bool [B, 1, nq, nk], by walking from each query to its root."""
    visible = torch.zeros(len(parents), 1, nq, nk, dtype=torch.bool)
    for b, above in enumerate(parents.tolist()):
        for t in range(nq):
            visible[b, 0, t, :max(0, nk - nq)] = True
            node = t
            while node >= 0:
                if node + nk - nq >= 0:
                    visible[b, 0, t, node + nk - nq] = True
                node = above[node]
    return visible


@pytest.mark.parametrize("kind", ["any", "chain", "roots", "deep"])
@pytest.mark.parametrize("nodes, nq, nk", [(1, 1, 6), (12, 12, 12), (16, 16, 39), (17, 17, 50), (20, 14, 33), (20, 14, 14),
                                           (9, 9, 4)])
def test_a_node_of_a_tree_sees_the_text_before_and_its_ancestors(kind, nodes, nq, nk):
    parents = random_parents(kind, nodes, seed=nodes + nk)
    for given_parents, expected in ((parents, walked(parents, nq, nk)), (parents[0].int(), walked(parents[:1], nq, nk))):
        mask = tw.tree(given_parents)
        dense = mask.dense(BATCH, 1, nq, nk)
        assert torch.equal(dense, expected.expand(dense.shape))
        for tile in ((1, 1), (2, 3), (4, 4), (16, 8)):
            assert_sound(mask.classify(BATCH, 1, nq, nk, *tile), dense, *tile)
            assert_sound(transposed_classes(mask, nq, nk, tile), dense.mT, *tile)


def test_tiles_of_a_tree():
    """128 tokens, of which the last 32 are a tree of two chains, 16 x 16 at a time."""
    chains = torch.arange(32) - 1
    chains[16] = -1
    mask = tw.tree(chains)
    classes = mask.classify(1, 1, 32, 128, 16, 16)[0, 0]
    assert classes.tolist() == [[FULL] * 6 + [PARTIAL, EMPTY], [FULL] * 6 + [PARTIAL, PARTIAL]]
    classes = transposed_classes(mask, 32, 128, (16, 16))[0, 0]
    assert classes.tolist() == [[FULL, FULL]] * 6 + [[PARTIAL, EMPTY], [EMPTY, PARTIAL]]


@pytest.mark.parametrize("nodes, nk", [(40, 100), (40, 40), (1, 64), (70, 70)])
@pytest.mark.parametrize("batched", [True, False], ids=["trees", "one tree"])
def test_attention_over_a_tree(small_tiles, nodes, nk, batched):
    generator = torch.Generator().manual_seed(nodes)
    parents = random_parents("deep", nodes, seed=nodes)
    visible = walked(parents, nodes, nk)
    parents, visible = (parents, visible) if batched else (parents[0], visible[:1])
    q, k, v, dout = (torch.randn(BATCH, n, 2, 8, generator=generator, dtype=torch.float64) for n in (nodes, nk, nk, nodes))

    def run(mask, backend):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = tw.attention(*inputs, mask=mask, backend=backend, return_lse=True)
        return out, lse, *torch.autograd.grad((out * dout).sum() + lse.sum(), inputs)

    for found, expected in zip(run(tw.tree(parents), "tiled"), run(visible, "reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_packed_sequences_have_the_first_nodes_of_a_tree():
    generator = torch.Generator().manual_seed(0)
    parents, nq, nk = random_parents("any", 14, seed=0), torch.tensor([14, 9]), torch.tensor([40, 9])
    q, k, v = (torch.randn(int(n.sum()), 2, 8, generator=generator, dtype=torch.float64) for n in (nq, nk, nk))
    offsets = cu_seqlens(nq), cu_seqlens(nk)
    out = tw.attention_varlen(q, k, v, *offsets, mask=tw.tree(parents), backend="tiled")
    sequences = zip(*(tw.unpack(x, offsets[x is not q]) for x in (q, k, v)), strict=True)
    each = [tw.attention(a[None], b[None], c[None], mask=walked(parents[i:i + 1], len(a), len(b)))[0]
            for i, (a, b, c) in enumerate(sequences)]
    torch.testing.assert_close(out, torch.cat(each), rtol=1e-12, atol=1e-12)


def test_a_tree_does_not_follow_later_changes_of_the_parents():
    numbers = torch.tensor([-1, 0, 0])
    mask = tw.tree(numbers)
    numbers.fill_(-1)
    assert mask.draw(3, 4) == "■ ■ · ·\n■ ■ ■ ·\n■ ■ · ■"


@pytest.mark.parametrize("parents, words", [
    (torch.tensor([-1, 0]), r"tree: parents: expected size 3 in dimension 0 \(S_q\), got \[2, 2\]"),
    (torch.full((1, 4), -1), r"tree: parents: expected size 3 in dimension 1 \(S_q\), got \[1, 4, 4\]"),
    (torch.full((2, 3), -1), r"tree: parents: expected size 1 in dimension 0 \(the batch size\), got \[2, 3, 3\]"),
])
def test_a_tree_has_a_node_for_each_query(parents, words):
    q, k = torch.zeros(1, 3, 1, 8), torch.zeros(1, 5, 1, 8)
    with pytest.raises(ValueError, match=words):
        tw.attention(q, k, k, mask=tw.tree(parents))


def test_a_mask_moves_with_its_tensors():
    mask = tw.documents(torch.tensor([0, 0, 1, 1, 1])) & ~tw.key_lengths(torch.tensor([3, 4]))
    here, there = (lower([[m.element, *(x for band in m.keys + m.queries for x in band)]]) for m in (mask, mask.to("meta")))
    assert here.text == there.text                  # the same graph, and of each tensor one copy
    assert {t.device.type for t in there.captured} == {"meta"}
    blocks = tw.block_mask(torch.ones(2, 2, dtype=torch.bool)).to("meta")
    assert isinstance(blocks, tw.BlockMask)
    assert blocks.classes.is_meta


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
    (lambda: tw.tree([-1]), TypeError, "tree: parents: expected an int32 or int64 tensor of 1 or 2 dimensions, got list"),
    (lambda: tw.tree(torch.tensor([-1.0])), TypeError, r"tree: parents: .* got torch.float32 \[1\]"),
    (lambda: tw.tree(torch.zeros(1, 1, 1).int()), TypeError, r"tree: parents: .* got torch.int32 \[1, 1, 1\]"),
    (lambda: tw.tree(torch.zeros(2, 0).long()), ValueError, r"tree: parents: expected at least one node, got \[2, 0\]"),
    (lambda: tw.tree(torch.tensor([-1, 0, 2, 3])), ValueError,
     r"tree: parents: expected an earlier node, or -1 for a root, got parents\[2\] = 2"),
    (lambda: tw.tree(torch.tensor([[-1, 0], [-1, -2]])), ValueError, r"tree: parents: .* got parents\[1, 1\] = -2"),
    (lambda: tw.causal() & True, TypeError, "&: expected a mask or a mask function on both sides, got bool"),
    (lambda: tw.causal() and tw.full(), TypeError, "combine masks with & | ~"),
    (lambda: tw.alibi([1.0]), TypeError, "alibi: slopes: expected a floating tensor"),
    (lambda: tw.softcap(0.0), ValueError, "softcap: cap: expected a finite number > 0, got 0.0"),
    (lambda: tw.softcap(float("nan")), ValueError, "softcap: cap: .* got nan"),
])
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
