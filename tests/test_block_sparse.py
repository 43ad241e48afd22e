"""Block masks, their patterns, and the lists of tiles that kernels walk."""
import pytest
import torch
from support.backends import AVAILABLE, DEVICE

import tilewise as tw
from tilewise import patterns
from tilewise.problem import make
from tilewise.trace import tile_lists
from tilewise.trace.tile_lists import Question, tile_list


def blown_up(layout, size, nq, nk):
    """A layout as a mask of elements."""
    return layout.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)[..., :nq, :nk]


@pytest.mark.parametrize("size", [16, (16, 256), (3, 5)], ids=str)
@pytest.mark.parametrize("shape", [(6, 9), (4, 6, 9), (2, 1, 6, 9), (2, 4, 6, 9)], ids=str)
def test_a_layout_is_the_mask_of_its_blocks(shape, size):
    layout = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = tw.block_mask(layout, block_size=size)
    pair = (size, size) if isinstance(size, int) else size
    nq, nk = 6 * pair[0] - 2, 9 * pair[1] - 1
    expected = blown_up(layout, pair, nq, nk)
    assert torch.equal(mask.dense(2, 4, nq, nk), expected[(None,) * (4 - len(shape))].expand(2, 4, nq, nk))
    assert mask.density == pytest.approx(layout.float().mean().item())


def test_tiles_of_a_layout_are_never_partial_where_they_fit():
    layout = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    classes = tw.block_mask(layout, block_size=32).classify(1, 1, 256, 256, 16, 32)
    assert torch.equal(classes[0, 0] == 2, layout.repeat_interleave(2, 0))
    assert not (classes == 1).any()


@pytest.mark.parametrize("transposed", [False, True])
def test_lists_of_a_block_mask(transposed):
    mask = tw.block_mask(lambda b, h, q, k: (q >= k) & (q - k < 40 * (h + 1)), 200, heads=2, block_size=32)
    dense = mask.dense(1, 2, 200, 200)
    for name, kind in (("full", 2), ("partial", 1)):
        counts, indices = mask.lists(transposed)[name]
        for h in range(2):
            for row in range(7):
                listed = indices[0, h, row, :counts[0, h, row]].tolist()
                for block in range(7):
                    i, j = (block, row) if transposed else (row, block)
                    tile = dense[0, h, i * 32:(i + 1) * 32, j * 32:(j + 1) * 32]
                    assert (block in listed) == (2 * bool(tile.all()) + (bool(tile.any()) and not bool(tile.all())) == kind)


def test_bad_block_masks():
    for make_one, error, words in [
        (lambda: tw.block_mask(torch.zeros(4, 4)), TypeError, "block_mask: expected a boolean layout .* got torch.float32"),
        (lambda: tw.block_mask(torch.zeros(4, dtype=torch.bool)), TypeError, "two to four dimensions"),
        (lambda: tw.block_mask(torch.zeros(4, 4, dtype=torch.bool), block_size=0), ValueError, "block_size: .* got 0"),
        (lambda: tw.block_mask(tw.causal()), ValueError, "seqlen_q: a mask or a function needs"),
        (lambda: tw.block_mask(3, 16), TypeError, "block_mask: source: expected .* or a boolean layout, got int"),
        (lambda: patterns.butterfly(12), ValueError, "butterfly: n: expected a power of two, got 12"),
        (lambda: patterns.butterfly(8, 4), ValueError, "factors: expected 0 to log2"),
        (lambda: patterns.local(0, 1), ValueError, "local: n: expected a number of blocks"),
        (lambda: patterns.strided(8, 0), ValueError, "strided: stride"),
        (lambda: patterns.random_blocks(4, 5), ValueError, "per_row: expected 0 to 4, got 5"),
    ]:
        with pytest.raises(error, match=words):
            make_one()


def test_a_layout_too_small_for_the_sequences_is_refused():
    q = torch.zeros(1, 100, 2, 8)
    with pytest.raises(IndexError, match=r"block_mask: layout: expected an index of dimension 0 from 0 to 3, got .* to 6"):
        tw.attention(q, q, q, mask=tw.block_mask(torch.ones(4, 4, dtype=torch.bool), block_size=16))
    with pytest.raises(ValueError, match=r"expected size 2 in dimension 0 \(the number of query heads\)"):
        tw.attention(q, q, q, mask=tw.block_mask(torch.ones(3, 7, 7, dtype=torch.bool), block_size=16))


# ---- patterns -----------------------------------------------------------------------------------------------------------

def test_butterfly_is_the_support_of_its_factors():
    """Pixelated Butterfly: the union of the factors, factor s linking i to itself and to i with bit s flipped."""
    n = 16
    for factors in range(5):
        expected = torch.eye(n, dtype=torch.bool)
        for s in range(factors):
            for i in range(n):
                expected[i, i ^ 2**s] = True
        assert torch.equal(patterns.butterfly(n, factors), expected)
    assert patterns.butterfly(n).sum(1).tolist() == [5] * n
    with_global = patterns.butterfly(n, global_blocks=2)
    assert with_global[:2].all()
    assert with_global[:, :2].all()
    assert torch.equal(with_global[2:, 2:], patterns.butterfly(n)[2:, 2:])


def test_other_patterns():
    for n in (1, 7, 12):
        i, j = torch.arange(n)[:, None], torch.arange(n)
        assert torch.equal(patterns.local(n, 2), (i - j).abs() <= 2)
        assert torch.equal(patterns.strided(n, 3), (i - j) % 3 == 0)
        assert torch.equal(patterns.global_blocks(n, 2), (i < 2) | (j < 2))
        assert patterns.random_blocks(n, min(n, 3), seed=1).sum(1).tolist() == [min(n, 3)] * n
    assert torch.equal(patterns.random_blocks(9, 3, seed=4), patterns.random_blocks(9, 3, seed=4))
    grid = torch.arange(12)
    same = (grid[:, None] // 4 == grid // 4) | (grid[:, None] % 4 == grid % 4)
    assert torch.equal(patterns.axial(3, 4), same)
    kept = patterns.bigbird(16, window=1, global_=2, random=3, seed=0)
    assert (kept | ~(patterns.local(16, 1) | patterns.global_blocks(16, 2))).all()
    assert (kept.sum(1) <= 16).all()


# ---- lists for kernels --------------------------------------------------------------------------------------------------

def question(mask, batch, heads, nq, nk, tile, **options):
    q, k = torch.zeros(batch, nq, heads, 8), torch.zeros(batch, nk, heads, 8)
    problem, x = make(q, k, k, mask=mask)
    defaults = dict(transposed=False, all_partial=False, device=torch.device("cpu")) | options
    return Question(problem.program, problem.graphs.mask, tuple(x.ints), tuple(x.floats), batch, heads, (nq, nk), tile,
                    **defaults), x.captured


def walked(listed, row):
    """(full tiles, partial tiles) of a row."""
    tiles = listed.tiles.tolist()
    f, p, end = tiles[2 * row:2 * row + 3]
    return tiles[f:p], tiles[p:end]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", [
    lambda b, h, q, k: q >= k, lambda b, h, q, k: (q - k).abs() < 20 * (h + 1), lambda b, h, q, k: k < 30 * (b + 1),
    lambda b, h, q, k: (q - k).abs() < 10 * (h + 1) + 30 * b], ids=["shared", "per head", "per sequence", "per both"])
def test_a_list_holds_each_visible_tile_once(mask, transposed):
    nq, nk, tile = 100, 130, (16, 32)
    asked, captured = question(mask, 2, 3, nq, nk, tile, transposed=transposed)
    listed = tile_list(asked, captured)
    dense = tw.mask_mod(mask).dense(2, 3, nq, nk)
    if transposed:
        dense, nq, nk, tile = dense.mT, nk, nq, tile[::-1]
    rows, cols = -(-nq // tile[0]), -(-nk // tile[1])
    for b in range(2):
        for h in range(3):
            for i in range(rows):
                leading = (b * listed.per_batch * (3 if listed.per_head else 1) + h * listed.per_head) * rows
                full, partial = walked(listed, leading + i)
                assert full == sorted(full)
                assert partial == sorted(partial)
                for j in range(cols):
                    seen = dense[b, h, i * tile[0]:(i + 1) * tile[0], j * tile[1]:(j + 1) * tile[1]]
                    ragged = (j + 1) * tile[1] > nk
                    assert (j in full) == (bool(seen.all()) and not ragged)
                    assert (j in full) + (j in partial) == bool(seen.any())


def test_all_partial_is_one_ascending_list():
    asked, captured = question(lambda b, h, q, k: q >= k, 1, 1, 64, 64, (16, 16), all_partial=True)
    listed = tile_list(asked, captured)
    assert [walked(listed, i) for i in range(4)] == [([], list(range(i + 1))) for i in range(4)]


def test_a_list_is_found_again_until_a_captured_tensor_changes(monkeypatch):
    ids = torch.tensor([0] * 32 + [1] * 32)
    built = []
    monkeypatch.setattr(tile_lists, "_build", lambda *a, build=tile_lists._build: built.append(1) or build(*a))
    mask = tw.mask_mod(lambda b, h, q, k: ids[q] == ids[k])
    for _ in range(3):
        first = tile_list(*question(mask, 1, 1, 64, 64, (16, 16)))
    assert len(built) == 1
    ids[32:] = 0
    second = tile_list(*question(mask, 1, 1, 64, 64, (16, 16)))
    assert len(built) == 2
    assert walked(first, 0) == ([0, 1], [])
    assert walked(second, 0) == ([0, 1, 2, 3], [])
    tile_list(*question(mask, 1, 1, 64, 64, (32, 16)))
    assert len(built) == 3


def test_lists_of_masks_on_a_device_need_not_know_their_length(monkeypatch):
    """There the list is as long as the grid, and the first entries are the same."""
    asked, captured = question(lambda b, h, q, k: (q - k).abs() < 20, 1, 1, 100, 100, (16, 16))
    compact = tile_list(asked, captured).tiles
    monkeypatch.setattr(tile_lists, "on_host", lambda device: False)
    tile_lists._lists.known.clear()
    padded = tile_list(asked, captured).tiles
    assert len(padded) > len(compact)
    assert torch.equal(padded[:len(compact)], compact)


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"])
def test_only_kept_blocks_are_read(backend, small_tiles):
    """What lies in dropped blocks may be anything: their keys are not loaded."""
    layout = torch.zeros(4, 4, dtype=torch.bool, device=DEVICE)
    layout[0, 0] = layout[1, 2] = layout[2, 0] = layout[2, 2] = layout[3, 2] = True
    g = torch.Generator().manual_seed(0)
    size = 64 if backend == "cpu" else 32  # at least a tile
    q, k, v = (torch.randn(1, 4 * size, 2, 16, generator=g).to(DEVICE) for _ in range(3))
    mask = tw.block_mask(layout, block_size=size)
    clean = tw.attention(q, k, v, mask=mask, backend=backend)
    for x in (k, v):
        x[:, size:2 * size] = torch.nan
        x[:, 3 * size:] = torch.nan
    assert torch.equal(tw.attention(q, k, v, mask=mask, backend=backend), clean)
