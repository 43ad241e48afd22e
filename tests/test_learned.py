"""Gradients of captured tensors: the pattern found from the indices, and the sums each pattern takes."""
import pytest
import torch
from support.backends import AVAILABLE, DEVICE

import tilewise as tw
from tilewise.problem import make
from tilewise.trace.learned import from_offset_tiles

N, H = 30, 2
IDS = torch.arange(N) % 7


def lookups_of(score_mod):
    q = torch.zeros(2, N, H, 8)
    return make(q, q, q, score_mod=score_mod)[0].graphs.learned


@pytest.mark.parametrize("pattern, shape, index", [
    ("rows", (), lambda b, h, q, k: ()), ("rows", (H,), lambda b, h, q, k: (h,)), ("rows", (2, N), lambda b, h, q, k: (b, q)),
    ("rows", (7,), lambda b, h, q, k: (IDS[q],)), ("rows", (H, 60), lambda b, h, q, k: (h, 2 * q)),
    ("cols", (N,), lambda b, h, q, k: (k,)), ("cols", (7, H), lambda b, h, q, k: (IDS[k], h)),
    ("diagonal", (2 * N,), lambda b, h, q, k: (q - k + N,)), ("diagonal", (H, 2 * N), lambda b, h, q, k: (h, N + q - k)),
    ("diagonal", (2 * N,), lambda b, h, q, k: ((q + N) - (k + 1),)), ("diagonal", (N,), lambda b, h, q, k: ((q - k).abs(),)),
    ("diagonal", (N, 5), lambda b, h, q, k: ((k - q).clamp(min=0), (q - k).abs() // 8)),
    ("diagonal", (7,), lambda b, h, q, k: (IDS[(q - k).abs()],)),
    ("direct", (N, N), lambda b, h, q, k: (q, k)), ("direct", (N, N), lambda b, h, q, k: (k, q)),
    ("direct", (2, H, N, N), lambda b, h, q, k: (b, h, q, k)), ("direct", (N, H, N), lambda b, h, q, k: (k, h, q)),
    ("any", (2 * N,), lambda b, h, q, k: (q + k,)), ("any", (N, 7), lambda b, h, q, k: (q, IDS[k])),
    ("any", (N, N), lambda b, h, q, k: (torch.maximum(q, k), q)),
    ("any", (2 * N,), lambda b, h, q, k: ((2 * q - k).clamp(0, 9),)),
])
def test_the_pattern_follows_from_the_indices(pattern, shape, index):
    table = torch.zeros(shape)
    (lookup,) = lookups_of(lambda s, b, h, q, k: s + table[index(b, h, q, k)] if shape else s + table)
    assert lookup.pattern == pattern


def test_each_lookup_of_a_table_adds_to_its_gradient():
    """Two lookups, of different patterns, of one table."""
    def fn(table):
        return lambda s, b, h, q, k: s * torch.sigmoid(table[q]) + table[k] * table[q]
    assert sorted(lookup.pattern for lookup in lookups_of(fn(torch.zeros(N)))) == ["cols", "rows", "rows"]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, N, H, 8, generator=g).to(DEVICE) for _ in range(3))
    table = torch.randn(N, generator=g).to(DEVICE).requires_grad_()
    found = [torch.autograd.grad(tw.attention(q, k, v, score_mod=fn(table), backend=b).square().sum(), table)[0]
             for b in ("reference", *AVAILABLE)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_what_the_score_does_not_depend_on_has_no_gradient():
    table = torch.zeros(N)
    assert lookups_of(lambda s, b, h, q, k: torch.where(table[q] > 0, s, 0.5 * s)) == ()
    assert lookups_of(lambda s, b, h, q, k: s + torch.floor(table[q])) == ()


@pytest.mark.parametrize("tile", [(4, 4), (4, 8), (8, 4), (2, 16)], ids=str)
def test_diagonals_from_tiles_at_equal_offsets(tile):
    m, n = tile
    nq, nk = 21, 26
    matrix = torch.zeros(1, 1, -(-nq // m) * m, -(-nk // n) * n, dtype=torch.float64)
    matrix[..., :nq, :nk] = torch.randn(nq, nk, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, cols, unit = matrix.shape[2] // m, matrix.shape[3] // n, min(m, n)
    tiles = torch.zeros(1, 1, ((rows - 1) * m + (cols - 1) * n) // unit + 1, m, n, dtype=torch.float64)
    for i in range(rows):
        for j in range(cols):
            tiles[0, 0, (i * m + (cols - 1 - j) * n) // unit] += matrix[0, 0, i * m:(i + 1) * m, j * n:(j + 1) * n]
    expected = torch.stack([matrix[0, 0, :nq, :nk].diagonal(-d).sum() for d in range(-(nk - 1), nq)])
    torch.testing.assert_close(from_offset_tiles(tiles, nq, nk)[0, 0], expected)


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"])
def test_any_index_gives_the_same_bits_every_time(backend):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 100, H, 16, generator=g).to(DEVICE) for _ in range(3))
    ids, table = (torch.arange(100) * 7 % 13).to(DEVICE), torch.randn(13, 13, generator=g).to(DEVICE).requires_grad_()
    out = [tw.attention(q, k, v, backend=backend, score_mod=lambda s, b, h, i, j: s + table[ids[i], ids[j]]) for _ in range(3)]
    found = [torch.autograd.grad(o.square().sum(), table)[0] for o in out]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# ---- indices that leave their tensor ------------------------------------------------------------------------------------

TABLE = torch.zeros(H, 2 * N - 1)


@pytest.mark.parametrize("score_mod, words", [
    (lambda s, b, h, q, k: s + TABLE[h, q - k], r"TABLE: expected an index of dimension 1 from 0 to 58, got .* from -29 to 29"),
    (lambda s, b, h, q, k: s + TABLE[h + 1, q], r"TABLE: .* dimension 0 from 0 to 1, got .* from 1 to 2"),
    (lambda s, b, h, q, k: s + TABLE[h, 2 * q + 1], r"clamp it, as in index.clamp\(0, 58\)"),
    (lambda s, b, h, q, k: s + TABLE[h, IDS[q] * 10], r"got one that may reach from 0 to 60"),
])
def test_indices_beyond_a_tensor_are_refused(score_mod, words):
    q = torch.zeros(1, N, H, 8)
    with pytest.raises(IndexError, match=words):
        tw.attention(q, q, q, score_mod=score_mod)


@pytest.mark.parametrize("score_mod", [
    lambda s, b, h, q, k: s + TABLE[h, torch.where(q >= k, q - k, 0)],
    lambda s, b, h, q, k: s + TABLE[h, torch.where((k < q) & (h > 0), 2 * (q - k), q)],
    lambda s, b, h, q, k: s + TABLE[h, (q - k).abs()],
    lambda s, b, h, q, k: s + TABLE[h, (3 * q).clamp(max=58)],
    lambda s, b, h, q, k: s + TABLE[-1, q % 10 * 5 + 13],
])
def test_indices_that_stay_inside_are_not(score_mod):
    q = torch.zeros(1, N, H, 8)
    tw.attention(q, q, q, score_mod=score_mod)


def test_indices_beyond_32_bits_are_refused():
    q = torch.zeros(1, 2000, 1, 8)
    with pytest.raises(OverflowError, match="beyond 32 bits"):
        tw.attention(q, q, q, mask=lambda b, h, q, k: (q * q * q * k) % 3 == 0)
