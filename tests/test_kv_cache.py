"""Caches against what they stand for: a list of keys and values per sequence."""
import random as python_random

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tilewise.kv_cache import FLOATS, FP8, KVCache, write
from tilewise.paged_cache import CacheFull, PagedKVCache
from tilewise.rotary import Rotary

H, D, D_V = 2, 6, 4
PAGE_SIZES = (1, 3, 16, 64)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def contiguous(batch=3, capacity=20, *, head_dim_v=D_V, dtype=torch.float32, **options):
    """A cache whose memory holds NaN."""
    cache = KVCache(batch, capacity, H, D, head_dim_v=head_dim_v, dtype=dtype, **options)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def paged(pages=40, page_size=3, *, max_sequences=8, head_dim_v=D_V, dtype=torch.float32, **options):
    cache = PagedKVCache(pages, page_size, H, D, max_sequences=max_sequences, head_dim_v=head_dim_v, dtype=dtype, **options)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def dense(stored):
    """[(keys [H_kv, n, D], values [H_kv, n, D_v])] of a Stored, read row by row."""
    sequences = []
    for b, (slot, first, length) in enumerate(stored.rows.tolist()):
        assert length <= stored.longest
        if stored.pages is None:
            places = [(slot, first + i) for i in range(length)]
        else:
            size = stored.k.shape[2]
            places = [(int(stored.pages[b, i // size]), i % size) for i in range(length)]
        sequences.append(tuple(
            torch.stack([x[page, :, row] for page, row in places], 1) if places else x.new_empty(x.shape[1], 0, x.shape[3])
            for x in (stored.k, stored.v)))
    return sequences


def same(stored, expected):
    """expected: [(keys [n, H_kv, D], values)]."""
    got = dense(stored)
    assert len(got) == len(expected)
    for (k, v), (k_want, v_want) in zip(got, expected, strict=True):
        assert torch.equal(k.transpose(0, 1), k_want)
        assert torch.equal(v.transpose(0, 1), v_want)


def raw(cache):
    """All that a cache holds on its device, bit by bit."""
    tensors = [cache.k, cache.v, cache.lengths] + ([cache.block_table] if isinstance(cache, PagedKVCache) else [])
    return [x.contiguous().view(torch.uint8).clone() for x in tensors]


def unchanged(cache, before):
    return all(torch.equal(a, b) for a, b in zip(raw(cache), before, strict=True))


def pack(parts):
    """Tokens of several sequences [n, ...] as one tensor, and cu_seqlens."""
    return torch.cat(parts), ints(0, *(len(x) for x in parts)).cumsum(0, dtype=torch.int32)


# ---- what is written where ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", FLOATS)
def test_appends_in_pieces_equal_one(dtype):
    k, v = draw(3, 11, H, D, dtype=dtype), draw(3, 11, H, D_V, dtype=dtype, seed=1)
    caches = [contiguous(dtype=dtype)] + [paged(page_size=size, dtype=dtype) for size in PAGE_SIZES]
    for cache in caches:
        names = {} if isinstance(cache, KVCache) else {"sequences": [cache.new() for _ in range(3)]}
        for a, b in ((0, 1), (1, 2), (2, 2), (2, 9), (9, 11)):
            assert cache.append(k[:, a:b], v[:, a:b], **names) is None
        same(cache.stored(*names.values()), list(zip(k, v, strict=True)))
        assert cache.stored(*names.values()).longest == 11


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_paged_equals_contiguous(page_size):
    rng = python_random.Random(page_size)
    flat, pages = contiguous(batch=4, capacity=64), paged(page_size=page_size, pages=256 // page_size + 4)
    numbers = [pages.new() for _ in range(4)]
    rotary = Rotary.of(4, 64)
    for step in range(12):
        chosen = rng.sample(range(4), rng.randint(1, 4))
        slots = torch.tensor(chosen)
        counts = [rng.randint(0, 5) for _ in chosen]
        k, cu_seqlens = pack([draw(n, H, D, seed=step) for n in counts])
        v, q = draw(len(k), H, D_V, seed=step + 50), draw(len(k), 2 * H, D, seed=step + 99)
        turned = [cache.append(k, v, cu_seqlens=cu_seqlens, q=q, rotary=rotary, **which) for cache, which in (
            (flat, {"cache_batch_idx": slots}), (pages, {"sequences": [numbers[i] for i in chosen]}))]
        assert torch.equal(*turned)
        same(pages.stored(numbers), [(k.transpose(0, 1), v.transpose(0, 1)) for k, v in dense(flat.stored())])
    assert flat.lengths.tolist() == [pages.length(n) for n in numbers]


def test_nothing_else_is_written():
    padding = ints(0, 2, 5, 1)
    cache = contiguous(batch=4, capacity=9, left_padding=padding)
    cache.append(draw(4, 3, H, D), draw(4, 3, H, D_V))
    k, v = cache.k.clone(), cache.v.clone()
    (k_new, cu_seqlens), v_new = pack([draw(n, H, D, seed=n) for n in (3, 0, 1)]), draw(6, H, D_V, seed=9)
    k_new = torch.cat([k_new, draw(2, H, D)])             # rows behind cu_seqlens[-1] belong to nobody
    cache.append(k_new, v_new, cu_seqlens=cu_seqlens, cache_batch_idx=torch.tensor([3, 0, 2]))
    for slot, row, token in ((3, 4, 0), (3, 5, 1), (3, 6, 2), (2, 8, 3)):
        k[slot, row], v[slot, row] = k_new[token], v_new[token]
    assert torch.equal(cache.k.view(torch.uint8), k.view(torch.uint8))
    assert torch.equal(cache.v.view(torch.uint8), v.view(torch.uint8))
    assert cache.lengths.tolist() == [3, 3, 4, 6]
    assert cache.stored(torch.tensor([2, 3])).rows.tolist() == [[2, 5, 4], [3, 1, 6]]


@pytest.mark.parametrize("cu_seqlens", [ints(0, 0, 0), ints(0), None])
def test_nothing_is_written_without_tokens(cu_seqlens):
    k, batch = (draw(2, 0, H, D), 2) if cu_seqlens is None else (draw(4, H, D), len(cu_seqlens) - 1)
    flat, pages = contiguous(), paged()
    numbers = [pages.new() for _ in range(batch)]
    for cache, which in ((flat, {"cache_batch_idx": torch.arange(batch)}), (pages, {"sequences": numbers})):
        before = raw(cache)
        q = draw(*k.shape)
        assert torch.equal(cache.append(k, k[..., :D_V], cu_seqlens=cu_seqlens, q=q, rotary=Rotary.of(2, 4), **which), q)
        assert unchanged(cache, before)


def test_rows_of_new_tokens_in_any_order():
    cache = contiguous(batch=3, head_dim_v=D)
    k, q, rotary = draw(2, H, 4, D), draw(2, 1, 5, D, seed=1), Rotary.of(D, 9)
    new, q_rows = ints(1, 1, 2, 1, 1, 0, 0, 0, 4).view(3, 3), ints(0, 3, 2, 1, 0, 0, 0, 0, 3).view(3, 3)
    turned = write(cache.stored(), new, k, k, q, q_rows, rotary)
    cache.lengths.copy_(ints(2, 0, 4))
    same(cache.stored(), [(rotary.rotate(x, torch.arange(x.shape[1])).transpose(0, 1), x.transpose(0, 1))
                          for x in (k[1, :, 1:3], k[0, :, :0], k[0])])
    assert torch.equal(turned[0], rotary.rotate(q[0], torch.tensor([1, 2, 3, 0, 1])))
    assert torch.equal(turned[1], q[1])


def test_without_a_check_lengths_stop_at_the_capacity(monkeypatch):
    """As on a GPU, where lengths are not read."""
    monkeypatch.setattr(KVCache, "_readable", lambda self, check: check)
    cache = contiguous(batch=2, capacity=5, left_padding=ints(0, 1))
    for _ in range(3):
        k = draw(2, 2, H, D)
        cache.append(k, k[..., :D_V])
    assert cache.lengths.tolist() == [5, 4]
    assert [len(k[0]) for k, _ in dense(cache.stored())] == [5, 4]
    assert cache.k[1, 0].isnan().all()
    cache.truncate(ints(9, 2))
    assert cache.lengths.tolist() == [5, 2]
    with pytest.raises(ValueError, match="k_new: expected at most 0 tokens for sequence 0"):
        cache.append(k, k[..., :D_V], check=True)


def test_what_does_not_fit_is_not_written():
    cache = contiguous(batch=2, capacity=5)
    cache.append(draw(2, 3, H, D), draw(2, 3, H, D_V))
    k = cache.k.clone()
    k_new, v_new = draw(1, H, 4, D), draw(1, H, 4, D_V)
    write(cache.stored(), ints(0, 0, 4, 0, 4, 0).view(2, 3), k_new, v_new, None, None, None)
    k[0, 3:] = k_new[0, :, :2].transpose(0, 1)
    assert torch.equal(cache.k.view(torch.uint8), k.view(torch.uint8))
    write(cache.stored()._replace(rows=ints(2, 0, 0, -1, 0, 0).view(2, 3)), ints(0, 0, 2, 0, 2, 2).view(2, 3), k_new, v_new,
          None, None, None)
    assert torch.equal(cache.k.view(torch.uint8), k.view(torch.uint8))

    table = ints(1, 9).view(1, 2)
    wrapped = PagedKVCache.wrap(torch.full((3, 2, H, D), torch.nan), torch.full((3, 2, H, D_V), torch.nan), table, ints(1))
    write(wrapped._stored(None, torch.tensor([0])), ints(0, 0, 4).view(1, 3), k_new, v_new, None, None, None)
    assert wrapped.k.isfinite().all((2, 3)).tolist() == [[False, False], [False, True], [False, False]]


def test_new_tokens_may_have_any_strides():
    kv, cache = draw(3, 2, 4, H, D), contiguous(head_dim_v=D)
    cache.append(kv[:, 0], kv[:, 1])
    same(cache.stored(), list(zip(kv[:, 0], kv[:, 1], strict=True)))
    cache = contiguous(head_dim_v=D)
    bhsd = draw(3, H, 4, D)
    cache.append(bhsd.transpose(1, 2), bhsd.transpose(1, 2))
    same(cache.stored(), [(x.transpose(0, 1),) * 2 for x in bhsd])


def test_no_gradient_flows_into_a_cache():
    cache, k = contiguous(head_dim_v=D), draw(3, 2, H, D).requires_grad_()
    cache.append(k, k, rotary=Rotary.of(4, 9))
    assert not cache.k.requires_grad
    assert not cache.v.requires_grad


def test_a_backend_may_write():
    calls = []

    def recorded(*args):
        calls.append(args)
        return write(*args)

    for cache, which in ((contiguous(batch=1), {}), (paged(), {"sequences": [0]})):
        if which:
            cache.new()
        cache.append(draw(1, 3, H, D), draw(1, 3, H, D_V), writer=recorded, **which)
        cache.append(draw(1, 2, H, D), draw(1, 2, H, D_V), writer=recorded, q=draw(1, 1, H, D), **which)
        stored, new, k_new, v_new, q, q_rows, rotary = calls[-1]
        assert (stored.rows.tolist(), new.tolist(), rotary) == ([[0, 0, 3]], [[0, 0, 2]], None)
        assert (k_new.shape, v_new.shape) == ((1, H, 2, D), (1, H, 2, D_V))
        assert (q.shape, q_rows.tolist()) == ((1, H, 1, D), [[0, 0, 1]])
        assert stored.pages is None or stored.pages.shape == (1, 2)


def test_a_failing_writer_changes_nothing():
    def failing(*args):
        raise MemoryError

    flat, pages = contiguous(), paged()
    numbers, k = [pages.new() for _ in range(3)], draw(3, 2, H, D)
    for cache, which in ((flat, {}), (pages, {"sequences": numbers})):
        cache.append(k, k[..., :D_V], **which)
        before = raw(cache)
        with pytest.raises(MemoryError):
            cache.append(k, k[..., :D_V], writer=failing, **which)
        assert unchanged(cache, before)
    assert [pages.length(n) for n in numbers] == [2, 2, 2]


# ---- positions ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_to_absolute_positions(interleaved):
    rotary = Rotary.of(4, 30, interleaved=interleaved)
    cache = contiguous(left_padding=ints(0, 3, 1))
    present = [4, 0, 2]
    k, cu_seqlens = pack([draw(n, H, D, seed=n) for n in present])
    cache.append(k, k[..., :D_V], cu_seqlens=cu_seqlens, rotary=rotary)
    k_new, q = draw(3, 5, H, D), draw(3, 2, 4, D, seed=3)
    turned = cache.append(k_new, k_new[..., :D_V], q=q, rotary=rotary)
    assert turned.is_contiguous()
    for b, (keys, _) in enumerate(dense(cache.stored())):
        whole = torch.cat([k[cu_seqlens[b]:cu_seqlens[b + 1]], k_new[b]]).transpose(0, 1)
        n = present[b] + 5
        assert torch.equal(keys, rotary.rotate(whole, torch.arange(n)))
        assert torch.equal(turned[b].transpose(0, 1), rotary.rotate(q[b].transpose(0, 1), torch.arange(n - 2, n)))


def test_queries_of_no_sequence_are_copied():
    rotary = Rotary(draw(30, 3), draw(30, 3, seed=1))         # position 0 turns too
    cache = paged()
    numbers = [cache.new() for _ in range(4)]
    cache.append(draw(4, 2, H, D), draw(4, 2, H, D_V), sequences=numbers)
    k, cu_seqlens = draw(9, H, D), ints(0, 0, 3, 4, 4)
    q = draw(9, H, D, seed=4)
    turned = cache.append(k, k[..., :D_V], sequences=numbers, cu_seqlens=cu_seqlens, q=q, rotary=rotary)
    assert torch.equal(turned[4:], q[4:])
    assert torch.equal(turned[:4].transpose(0, 1), rotary.rotate(q[:4].transpose(0, 1), torch.tensor([2, 3, 4, 2])))
    assert cache.append(k, k[..., :D_V], sequences=numbers, cu_seqlens=cu_seqlens, q=q) is q


# ---- storage --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [contiguous, paged])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fp8_round_trip(make, dtype):
    scale = torch.tensor([0.01, 2.0])
    cache = make(dtype=FP8, k_scale=scale)
    assert cache.v_scale.tolist() == [1.0, 1.0]
    which = {"sequences": [cache.new() for _ in range(3)]} if make is paged else {}
    k, v = draw(3, 20, H, D, dtype=dtype), draw(3, 20, H, D_V, dtype=dtype)
    k[0, 0, :, :2] = 2000.0
    rotary = Rotary.of(D, 20)
    cache.append(k, v, rotary=rotary, **which)
    k = rotary.rotate(k.transpose(1, 2).float(), torch.arange(20))        # rounded once, to fp8
    saturated = torch.minimum(k.abs(), 448 * scale[:, None, None]) * k.sign()
    for b, (stored_k, stored_v) in enumerate(dense(cache.stored(*which.values()))):
        error = (stored_k.float() * scale[:, None, None] - saturated[b]).abs()
        assert (error <= saturated[b].abs() / 16 + 2**-10 * scale[:, None, None]).all()   # 3 bits; subnormals: steps of 2^-9
        assert torch.equal(stored_k.float(), (saturated[b] / scale[:, None, None]).to(FP8).float())
        assert torch.equal(stored_v.float(), v[b].float().to(FP8).float().transpose(0, 1))


@pytest.mark.parametrize("make", [contiguous, paged])
def test_values_as_a_prefix_of_keys(make):
    cache, plain = make(v_in_k=True), make()
    which = {"sequences": [cache.new(), cache.new()]} if make is paged else {"cache_batch_idx": torch.tensor([1, 0])}
    k = draw(2, 5, H, D)
    cache.append(k, q=k, **which)
    stored = cache.stored(*which.values())
    same(stored, [(x, x[..., :D_V]) for x in k])
    assert stored.v.data_ptr() == stored.k.data_ptr()
    assert cache.nbytes * (D + D_V) == plain.nbytes * D
    if make is paged:
        child = cache.fork(0)
        cache.append(k[:1], sequences=[child])
        same(cache.stored([0, child]), [(x, x[..., :D_V]) for x in (k[0], torch.cat([k[0], k[0]]))])
    scaled = make(dtype=FP8, v_in_k=True, k_scale=torch.tensor([1.0, 2.0]))
    assert scaled.v_scale is scaled.k_scale


def test_wrapped_tensors_are_used_in_place():
    kv, lengths = torch.full((3, 8, 2, H, D), torch.nan), ints(1, 0, 2)
    kv[0, 0], kv[2, :2] = 1.0, 2.0
    cache = KVCache.wrap(kv[:, :, 0], kv[:, :, 1], lengths)
    k, v = draw(3, 2, H, D), draw(3, 2, H, D, seed=1)
    cache.append(k, v)
    assert lengths.tolist() == [3, 2, 4]
    for b, start in enumerate((1, 0, 2)):
        assert torch.equal(kv[b, start:start + 2], torch.stack([k[b], v[b]], 1))
        assert kv[b, start + 2:].isnan().all()
    latent = torch.full((1, 4, 1, 10), torch.nan)
    cache = KVCache.wrap(latent, latent[..., :8], ints(0))
    assert cache.v_in_k
    cache.append(draw(1, 4, 1, 10))
    assert torch.equal(dense(cache.stored())[0][1], latent[0, ..., :8].transpose(0, 1))


def test_sequences_in_chosen_slots():
    """Lengths, left padding and names are the sequences'; several may read a slot, one may write to it."""
    k, v = torch.full((5, 8, H, D), torch.nan), torch.full((5, 8, H, D_V), torch.nan)
    lengths, new = ints(0, 0), draw(2, 3, H, D)
    cache = KVCache.wrap(k, v, lengths, slots=ints(4, 1), left_padding=ints(2, 0))
    cache.append(new, new[..., :D_V])
    assert (cache.batch, lengths.tolist()) == (2, [3, 3])
    assert torch.equal(k[4, 2:5], new[0])
    assert torch.equal(k[1, :3], new[1])
    assert k[[0, 2, 3]].isnan().all()
    cache.append(new[:1], new[:1, ..., :D_V], cache_batch_idx=ints(1))
    same(cache.stored(), [(x, x[..., :D_V]) for x in (new[0], torch.cat([new[1], new[0]]))])
    shared = KVCache.wrap(k, v, ints(2, 3, 6), slots=ints(1, 1, 1))
    same(shared.stored(), [(x, x[..., :D_V]) for x in (new[1, :2], new[1], torch.cat([new[1], new[0]]))])
    with pytest.raises(ValueError, match="slots: expected each sequence once, got 1 twice"):
        shared.append(draw(3, 1, H, D), draw(3, 1, H, D_V))
    shared.append(new[:1, :1], new[:1, :1, :, :D_V], cache_batch_idx=ints(2))
    assert torch.equal(k[1, 6], new[0, 0])


def test_truncate_and_reset():
    k = draw(3, 6, H, D)
    cache = contiguous()
    cache.append(k, k[..., :D_V])
    cache.truncate(torch.tensor([6, 0, 2]))
    cache.truncate(ints(4), torch.tensor([0]))
    assert cache.lengths.tolist() == [4, 0, 2]
    cache.append(k[:, :1], k[:, :1, :, :D_V])
    parts = [torch.cat([x[:n], x[:1]]) for x, n in zip(k, (4, 0, 2), strict=True)]
    same(cache.stored(), [(x, x[..., :D_V]) for x in parts])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.stored().longest == 0


# ---- pages ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_forks_diverge(page_size):
    cache = paged(page_size=page_size)
    parent = cache.new()
    prompt, more, other = (draw(1, 7, H, D, seed=s) for s in range(3))

    def append(sequence, k):
        cache.append(k, k[..., :D_V], sequences=[sequence])

    def holds(sequence, *parts):
        k = torch.cat([x[0] for x in parts])
        same(cache.stored([sequence]), [(k, k[..., :D_V])])

    append(parent, prompt)
    free = cache.free_pages
    child = cache.fork(parent)
    assert cache.free_pages == free
    append(child, more)
    holds(parent, prompt)
    append(parent, other)
    holds(child, prompt, more)
    holds(parent, prompt, other)
    cache.free(parent)
    holds(child, prompt, more)
    cache.free(child)
    assert cache.free_pages == 40
    assert (cache.block_table == -1).all()


def test_forks_may_grow_in_one_call():
    cache = paged(pages=8, page_size=4)
    first = cache.new()
    prompt, k = draw(1, 6, H, D), draw(3, 3, H, D, seed=1)
    cache.append(prompt, prompt[..., :D_V], sequences=[first])
    family = [first, cache.fork(first), cache.fork(first)]
    cache.append(k, k[..., :D_V], sequences=family)
    whole = [torch.cat([prompt[0], x]) for x in k]
    same(cache.stored(family), [(x, x[..., :D_V]) for x in whole])
    assert cache.free_pages == 8 - 1 - 3 - 3        # one shared, and of their own the second page and the third


def test_only_those_that_write_need_a_copy():
    cache = paged(pages=2, page_size=4)
    k = draw(1, 2, H, D)
    family = [cache.new()]
    cache.append(k, k[..., :D_V], sequences=family)
    family += [cache.fork(0), cache.fork(0)]
    cache.extend(family, [0, 1, 0])
    assert cache.free_pages == 0


def test_pages_are_given_back_and_used_again():
    cache = paged(pages=4, page_size=2, max_sequences=3)
    a, k = cache.new(), draw(1, 8, H, D)
    cache.append(k, k[..., :D_V], sequences=[a])
    assert cache.free_pages == 0
    assert sorted(cache.block_table[a, :4].tolist()) == [0, 1, 2, 3]
    cache.truncate(a, 3)
    assert cache.free_pages == 2
    assert cache.block_table[a, 2:].tolist() == [-1, -1]
    b = cache.new()
    cache.append(k[:, :4], k[:, :4, :, :D_V], sequences=[b])
    cache.append(k[:, 3:4], k[:, 3:4, :, :D_V], sequences=[a])
    same(cache.stored([a, b]), [(k[0, :4], k[0, :4, :, :D_V])] * 2)
    cache.free(a)
    cache.free(b)
    assert cache.free_pages == 4
    assert {cache.new(), cache.new(), cache.new()} == {0, 1, 2}


def test_a_full_cache_stays_as_it_is():
    cache = paged(pages=5, page_size=4, max_sequences=3)
    a, k = cache.new(), draw(2, 10, H, D)
    cache.append(k[:1], k[:1, ..., :D_V], sequences=[a])
    b = cache.fork(a)
    before, free = raw(cache), cache.free_pages
    with pytest.raises(CacheFull, match="pages: needed 3, free 2 of 5"):
        cache.append(k[:, :4], k[:, :4, :, :D_V], sequences=[a, b])     # a copied page, and a further page for each
    with pytest.raises(CacheFull, match="pages: needed 3, free 2 of 5"):
        cache.extend([a, b], [3, 3])
    assert unchanged(cache, before)
    assert (cache.free_pages, cache.length(a), cache.length(b)) == (free, 10, 10)
    cache.append(k[:, :2], k[:, :2, :, :D_V], sequences=[a, b])
    assert cache.free_pages == 1
    cache.new()
    with pytest.raises(CacheFull, match="sequences: needed 1, free 0 of 3"):
        cache.fork(a)


def test_room_made_before():
    """As for CUDA graphs: numbers on the device, room made by `extend`."""
    cache = paged(page_size=4)
    numbers, k = [cache.new() for _ in range(2)], draw(2, 8, H, D)
    for a, b in ((0, 3), (3, 8)):
        cache.extend(numbers, [b - a, b - a])
        assert cache.length(0) == b
        cache.append(k[:, a:b], k[:, a:b, :, :D_V], sequences=ints(*numbers), extended=True)
    same(cache.stored(torch.tensor(numbers)), [(x, x[..., :D_V]) for x in k])
    with pytest.raises(ValueError, match="expected False: extend has made room for 0 tokens of sequence 0, which gets 1"):
        cache.append(k[:, :1], k[:, :1, :, :D_V], sequences=numbers, extended=True)
    cache.extend([1], [2])
    with pytest.raises(ValueError, match="expected True: extend has made room for 2 tokens of sequence 1, which gets 1"):
        cache.append(k[:, :1], k[:, :1, :, :D_V], sequences=numbers)


def wrapped(table, lengths, pages=6, page_size=2):
    k = torch.full((pages, page_size, H, D), torch.nan)
    return PagedKVCache.wrap(k, k.clone()[..., :D_V], torch.tensor(table, dtype=torch.int32), ints(*lengths))


def test_foreign_pages():
    cache = wrapped([[4, 1, -7], [0, 99, 4], [4, 3, 2]], [0, 0, 0])
    k = draw(2, 4, H, D)
    cache.append(k[:1], k[:1, ..., :D_V], sequences=[0])
    cache.append(k[1:, :1], k[1:, :1, :, :D_V], sequences=torch.tensor([1]))
    assert cache.lengths.tolist() == [4, 1, 0]
    same(cache.stored(), [(x, x[..., :D_V]) for x in (k[0], k[1, :1], k[0, :0])])
    assert torch.equal(cache.k[[4, 1]].flatten(0, 1), k[0])
    assert cache.k[[2, 3, 5]].isnan().all()
    assert cache.k[0, 1].isnan().all()
    cache.lengths[2] = 2                     # a prefix that two sequences share and neither writes to
    cache.append(k[:1, :1], k[:1, :1, :, :D_V], sequences=[2])
    assert torch.equal(cache.k[3, 0], k[0, 0])


@pytest.mark.parametrize("table, lengths, message", [
    ([[0, 6], [1, 2]], [2, 0], r"block_table: expected pages from 0 to 5 in sequence 0, got 6 at entry 1"),
    ([[0, 1], [-1, 2]], [0, 0], r"block_table: expected pages from 0 to 5 in sequence 1, got -1 at entry 0"),
    ([[3, 3], [1, 2]], [2, 0], "block_table: expected every page once in a sequence, got page 3 twice in sequence 0"),
    ([[3, 4], [1, 4]], [2, 3], "pages that sequence 0 writes to in no other sequence, got page 4 in several"),
    ([[3, 4], [3, 5]], [1, 1], "pages that sequence 0 writes to in no other sequence, got page 3 in several"),
    ([[3, 4], [5, 1]], [2, 4], r"k_new: expected at most 0 tokens for sequence 1 \(length 4, capacity 4"),
    ([[3, 4], [5, 1]], [2, -1], r"lengths: expected values from 0 to 4, got -1 at index 1"),
])
def test_foreign_pages_are_checked(table, lengths, message):
    cache = wrapped(table, lengths)
    before = raw(cache)
    with pytest.raises(ValueError, match=message):
        cache.append(draw(2, 1, H, D), draw(2, 1, H, D_V))
    assert unchanged(cache, before)


def test_foreign_pages_are_checked_when_read():
    with pytest.raises(ValueError, match="got 6 at entry 1"):
        wrapped([[0, 6], [1, 2]], [3, 0]).stored()
    assert wrapped([[0, 6], [0, 2]], [2, 3]).stored([1]).pages.tolist() == [[0, 2]]


@pytest.mark.parametrize("padding, size", [((0, 0), 6), ((6, 12), 6), ((4, 0), 2), ((5, 13), 1)])
def test_foreign_pages_with_left_padding(padding, size):
    """They are seen in smaller pages, of which the padding is whole ones."""
    k = torch.full((7, 6, H, D), torch.nan)
    table, lengths = torch.tensor([[4, 1, 6], [0, 3, 2]], dtype=torch.int32), ints(0, 0)
    cache = PagedKVCache.wrap(k, k.clone()[..., :D_V], table, lengths, left_padding=ints(*padding))
    assert cache.page_size == size
    new = draw(2, 5, H, D)
    for a, b in ((0, 2), (2, 5)):
        cache.append(new[:, a:b], new[:, a:b, :, :D_V])
    same(cache.stored(), [(x, x[..., :D_V]) for x in new])
    for b, first in enumerate(padding):
        rows = k[table[b].long()].flatten(0, 1)
        assert torch.equal(rows[first:first + 5], new[b])
        assert rows[:first].isnan().all()
        assert rows[first + 5:].isnan().all()
    assert cache.stored().limits().tolist() == [18 - first for first in padding]
    with pytest.raises(ValueError, match=rf"k_new: expected at most {13 - padding[0]} tokens for sequence 0"):
        cache.append(draw(2, 14, H, D), draw(2, 14, H, D_V))


def test_calls_that_need_a_book():
    cache = wrapped([[0, 1], [2, 3]], [0, 0])
    calls = {"new": cache.new, "fork": lambda: cache.fork(0), "free": lambda: cache.free(0), "length": lambda: cache.length(0),
             "extend": lambda: cache.extend([0], [1]), "truncate": lambda: cache.truncate(0, 0),
             "free_pages": lambda: cache.free_pages}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: expected a cache that manages its pages"):
            call()


# ---- no waiting -----------------------------------------------------------------------------------------------------

def test_no_call_reads_the_device():
    """Tensors on `meta` have no values: whatever looks at one raises."""
    meta = {"device": "meta"}
    k, v, rotary = torch.empty(2, 3, H, D, **meta), torch.empty(2, 3, H, D_V, **meta), Rotary.of(4, 64, device="meta")
    shape = dict(kv_heads=H, head_dim=D, head_dim_v=D_V, dtype=torch.float32, device="meta")
    flat = KVCache(3, 20, left_padding=torch.empty(3, dtype=torch.int32, **meta), **shape)
    slots = torch.empty(2, dtype=torch.int64, **meta)
    assert flat.append(k, v, q=k, rotary=rotary, cache_batch_idx=slots).shape == k.shape
    packed = dict(cu_seqlens=ints(0, 2, 3), q=k[0], rotary=rotary)
    assert flat.append(k[0], v[0], cache_batch_idx=slots, **packed).shape == (3, H, D)
    packed_there = packed | {"cu_seqlens": ints(0, 2, 3).to("meta")}
    assert flat.append(k[0], v[0], cache_batch_idx=slots, **packed_there).shape == (3, H, D)
    flat.truncate(slots, slots)
    assert flat.stored().longest == 20
    pages = PagedKVCache(16, 4, max_sequences=3, **shape)
    numbers = [pages.new(), pages.new()]
    pages.append(k, v, q=k, rotary=rotary, sequences=numbers)
    numbers = [pages.fork(numbers[0]), numbers[1]]
    pages.append(k[0], v[0], sequences=numbers, **packed)
    assert pages.stored(numbers).longest == 5
    assert pages.stored(numbers).pages.shape == (2, 2)
    pages.extend(numbers, [3, 3])
    pages.append(k, v, sequences=slots, extended=True)
    assert pages.stored(slots).longest == 64
    with pytest.raises(ValueError, match="sequences: expected values on the CPU, or extend"):
        pages.append(k, v, sequences=slots)
    with pytest.raises(ValueError, match="cu_seqlens: expected values on the CPU, or extend"):
        pages.append(k[0], v[0], sequences=numbers, **packed_there)
    pages.truncate(numbers[0], 1)
    pages.free(numbers[1])
    table = torch.empty(2, 3, dtype=torch.int32, **meta)
    foreign = PagedKVCache.wrap(pages.k, pages.v, table, table[:, 0].clone())
    foreign.append(k, v, q=k, rotary=rotary)
    assert foreign.stored().longest == 12
    padded = PagedKVCache.wrap(pages.k, pages.v, table, table[:, 0].clone(), left_padding=table[:, 0].clone())
    padded.append(k, v, q=k, rotary=rotary)
    assert padded.page_size == 1
    chosen = KVCache.wrap(flat.k, flat.v, table[:, 0].clone(), slots=slots)
    chosen.append(k, v, q=k, rotary=rotary)
    assert chosen.stored().longest == 20


# ---- errors ---------------------------------------------------------------------------------------------------------

K, V = torch.zeros(3, 2, H, D), torch.zeros(3, 2, H, D_V)
ROTARY = Rotary.of(4, 30)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(k_new=None), TypeError, "k_new: expected float32, got NoneType"),
    (dict(k_new=K.half()), TypeError, "k_new: expected float32, got torch.float16"),
    (dict(k_new=K.to("meta")), ValueError, "k_new: expected a tensor on cpu, got meta"),
    (dict(k_new=K[:2]), ValueError, r"k_new: expected \[3, S_new, 2, 6\], got \[2, 2, 2, 6\]"),
    (dict(k_new=K[0]), ValueError, r"k_new: expected \[3, S_new, 2, 6\], got \[2, 2, 6\]"),
    (dict(k_new=K[:, :, :1]), ValueError, r"k_new: expected \[3, S_new, 2, 6\]"),
    (dict(k_new=K.transpose(2, 3).contiguous().transpose(2, 3)), ValueError, "k_new: expected a contiguous last dimension"),
    (dict(v_new=None), ValueError, "v_new: expected a tensor like k_new, got None"),
    (dict(v_new=K), ValueError, r"v_new: expected \[3, 2, 2, 4\], got \[3, 2, 2, 6\]"),
    (dict(v_new=V.double()), TypeError, "v_new: expected float32, got torch.float64"),
    (dict(q=K[:2]), ValueError, r"q: expected \[3, S_q, H, 6\], got \[2, 2, 2, 6\]"),
    (dict(q=K.double()), TypeError, "q: expected float32, got torch.float64"),
    (dict(cu_seqlens=ints(0, 1, 2, 2)), ValueError, r"k_new: expected \[total, 2, 6\], got \[3, 2, 2, 6\]"),
    (dict(packed=ints(0, 1, 2)), ValueError, r"cu_seqlens: expected \[4\], got \[3\]"),
    (dict(packed=ints(0, 1, 2, 2).float()), TypeError, "cu_seqlens: expected int32 or int64, got torch.float32"),
    (dict(packed=ints(1, 1, 2, 2)), ValueError, r"cu_seqlens: .* got \[1, 1, 2, 2\]"),
    (dict(packed=ints(0, 2, 1, 2)), ValueError, r"cu_seqlens: .* got \[0, 2, 1, 2\]"),
    (dict(packed=ints(0, 1, 2, 3)), ValueError, r"cu_seqlens: .* at the total 2, got \[0, 1, 2, 3\]"),
    (dict(packed=ints(0, 1, 2, 2), q=K[0, :1]), ValueError, r"q: expected \[2, H, 6\], got \[1, 2, 6\]"),
    (dict(rotary="llama"), TypeError, "rotary: expected a Rotary or None, got str"),
    (dict(rotary=Rotary.of(8, 30)), ValueError, "rotary: expected a rotary_dim of at most head_dim 6, got 8"),
    (dict(rotary=Rotary.of(4, 6)), ValueError, "rotary: expected tables for 7 positions, got 6"),
    (dict(rotary=Rotary.of(4, 30, device="meta")), ValueError, "rotary: expected tables on cpu, got meta"),
    (dict(rotary=ROTARY, q=torch.zeros(3, 8, 4, D)), ValueError, r"q: expected at most as many .* keys \(7\), got 8"),
])
def test_errors_of_append(arguments, error, message):
    if "packed" in arguments:
        arguments = {"k_new": K[0], "v_new": V[0], "cu_seqlens": arguments["packed"], "q": arguments.get("q")}
    for cache, which in ((contiguous(capacity=9), {}), (paged(), {"sequences": [0, 1, 2]})):
        for _ in which.get("sequences", ()):
            cache.new()
        cache.append(torch.ones(3, 5, H, D), torch.ones(3, 5, H, D_V), **which)
        before = raw(cache)
        with pytest.raises(error, match=message):
            cache.append(**{"k_new": K, "v_new": V} | arguments, **which)
        assert unchanged(cache, before)
        assert which == {} or [cache.length(n) for n in range(3)] == [5, 5, 5]


@pytest.mark.parametrize("call, error, message", [
    (lambda c: c.append(K.repeat(1, 2, 1, 1), V.repeat(1, 2, 1, 1)), ValueError,
     r"k_new: expected at most 3 tokens for sequence 1 \(length 5, capacity 8, left padding not counted\), got 4"),
    (lambda c: c.append(K, V, cache_batch_idx=torch.tensor([0, 1, 3])), ValueError,
     "cache_batch_idx: expected values from 0 to 2, got 3 at index 2"),
    (lambda c: c.append(K, V, cache_batch_idx=torch.tensor([0, -1, 1])), ValueError, "cache_batch_idx: .* got -1 at index 1"),
    (lambda c: c.append(K, V, cache_batch_idx=torch.tensor([0, 1, 0])), ValueError,
     "cache_batch_idx: expected each sequence once, got 0 twice"),
    (lambda c: c.append(K, V, cache_batch_idx=torch.tensor([0.0])), TypeError, "cache_batch_idx: expected int32 or int64, got"),
    (lambda c: c.stored(torch.tensor([3])), ValueError, "cache_batch_idx: expected values from 0 to 2, got 3"),
    (lambda c: c.truncate(ints(5, 6, 5)), ValueError, "lengths: expected values from 0 to 5, got 6 at index 1"),
    (lambda c: c.truncate(ints(5)), ValueError, r"lengths: expected \[3\], got \[1\]"),
    (lambda c: KVCache(3, 0, H, D), ValueError, "capacity: expected an integer >= 1, got 0"),
    (lambda c: KVCache(3, 4, H, D, head_dim_v=1.5), ValueError, "head_dim_v: expected an integer >= 1, got 1.5"),
    (lambda c: KVCache(3, 4, H, D, head_dim_v=8, v_in_k=True), ValueError, "head_dim_v: expected at most head_dim 6"),
    (lambda c: KVCache(3, 4, H, D, dtype=torch.int8), TypeError, "dtype: expected .* or float8_e4m3fn, got torch.int8"),
    (lambda c: KVCache(3, 4, H, D, k_scale=torch.ones(H)), ValueError, "k_scale: expected None: only float8_e4m3fn"),
    (lambda c: KVCache(3, 4, H, D, dtype=FP8, v_scale=torch.ones(3)), ValueError, r"v_scale: expected \[2\], got \[3\]"),
    (lambda c: KVCache(3, 4, H, D, dtype=FP8, v_in_k=True, v_scale=torch.ones(H)), ValueError, "v_scale: expected None where"),
    (lambda c: KVCache(3, 4, H, D, left_padding=ints(0, 5, 0)), ValueError, "left_padding: expected values from 0 to 4, got 5"),
    (lambda c: KVCache(3, 4, H, D, left_padding=[0, 0, 0]), TypeError, "left_padding: expected int32, got list"),
    (lambda c: KVCache.wrap(K, K, ints(0, 0, 0)).append(K, V), ValueError, "v_new: expected None: v is a prefix of k"),
    (lambda c: KVCache.wrap(K, K, ints(0, 0, 0)).append(K, rotary=ROTARY), ValueError, "rotary: expected None where v is"),
    (lambda c: KVCache.wrap(K[0], V, ints(0, 0, 0)), ValueError, r"k: expected \[batch, capacity, H_kv, D\], got \[2, 2, 6\]"),
    (lambda c: KVCache.wrap(K, V[:2], ints(0, 0, 0)), ValueError, r"v: expected \[3, 2, 2, D_v\], got \[2, 2, 2, 4\]"),
    (lambda c: KVCache.wrap(K, V[:, :, :, :0], ints(0, 0, 0)), ValueError, "k, v: expected no dimension of size 0"),
    (lambda c: KVCache.wrap(K, V, ints(0, 0)), ValueError, r"lengths: expected \[3\], got \[2\]"),
    (lambda c: KVCache.wrap(K, V, ints(0, 3, 0)), ValueError, "lengths: expected values from 0 to 2, got 3 at index 1"),
    (lambda c: KVCache.wrap(K, V, ints(0, 2, 0), left_padding=ints(0, 1, 0)), ValueError, "lengths: expected .* 0 to 1"),
    (lambda c: KVCache.wrap(K, V, ints(0, 0), slots=ints(0, 3)), ValueError, "slots: expected values from 0 to 2, got 3"),
    (lambda c: KVCache.wrap(K, V, ints(0, 0), slots=ints(0)), ValueError, r"lengths: expected \[1\], got \[2\]"),
])
def test_errors_of_contiguous_caches(call, error, message):
    cache = contiguous(capacity=9, left_padding=ints(0, 1, 0))
    cache.append(torch.ones(3, 5, H, D), torch.ones(3, 5, H, D_V))
    before = raw(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert unchanged(cache, before)


@pytest.mark.parametrize("call, error, message", [
    (lambda c: c.append(K, V), ValueError, "sequences: expected the numbers of sequences, got None"),
    (lambda c: c.append(K, V, sequences=[0, 1, 5]), ValueError, "sequences: expected numbers of sequences in use, got 5"),
    (lambda c: c.append(K, V, sequences=[0, 1, 0]), ValueError, "sequences: expected each sequence once, got 0 twice"),
    (lambda c: c.append(K, V, sequences=torch.zeros(3)), TypeError, "sequences: expected int32 or int64, got torch.float32"),
    (lambda c: c.append(torch.zeros(1, 5, H, D), torch.zeros(1, 5, H, D_V), sequences=[1]), ValueError,
     r"counts: expected at most 4 tokens for sequence 1 \(length 5, capacity 9\), got 5"),
    (lambda c: c.extend([0], [-1]), ValueError, r"counts: expected 1 numbers of tokens >= 0, got \[-1\]"),
    (lambda c: c.extend([0], [1, 1]), ValueError, r"counts: expected 1 numbers of tokens >= 0, got \[1, 1\]"),
    (lambda c: c.extend([0, 0], [1, 1]), ValueError, "sequences: expected each sequence once, got 0 twice"),
    (lambda c: c.extend([7], [1]), ValueError, "extend: expected the number of a sequence in use, got 7"),
    (lambda c: c.fork(7), ValueError, "fork: expected the number of a sequence in use, got 7"),
    (lambda c: c.free(7), ValueError, "free: expected the number of a sequence in use, got 7"),
    (lambda c: c.truncate(0, 6), ValueError, "length: expected 0 to 5 for sequence 0, got 6"),
    (lambda c: c.truncate(0, -1), ValueError, "length: expected 0 to 5 for sequence 0, got -1"),
    (lambda c: PagedKVCache(4, 0, H, D, max_sequences=1), ValueError, "page_size: expected an integer >= 1, got 0"),
    (lambda c: PagedKVCache(4, 1, H, D, max_sequences=0), ValueError, "max_sequences: expected an integer >= 1, got 0"),
    (lambda c: PagedKVCache.wrap(K, V, ints(0), ints(0)), ValueError, r"block_table: expected \[B, n\], got \[1\]"),
    (lambda c: PagedKVCache.wrap(K[0], V, ints(0), ints(0)), ValueError, r"k: expected \[pages, page_size, H_kv, D\]"),
    (lambda c: PagedKVCache.wrap(K, V, ints(0)[None], ints(0, 0)), ValueError, r"lengths: expected \[1\], got \[2\]"),
    (lambda c: PagedKVCache.wrap(K, V, ints(0)[None], ints(0), left_padding=ints(3)), ValueError, "left_padding: .* 0 to 2"),
    (lambda c: PagedKVCache.wrap(K, V, ints(0)[None], ints(2), left_padding=ints(1)).stored(), ValueError, "lengths: .* to 1"),
    (lambda c: PagedKVCache.wrap(K.transpose(0, 1), V.transpose(0, 1), ints(0)[None], ints(0), left_padding=ints(1)),
     ValueError, "k: expected pages whose rows follow each other in memory"),
])
def test_errors_of_paged_caches(call, error, message):
    cache = paged(max_pages_per_sequence=3)
    numbers = [cache.new() for _ in range(3)]
    cache.append(torch.ones(3, 5, H, D), torch.ones(3, 5, H, D_V), sequences=numbers)
    before = raw(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert unchanged(cache, before)


def test_descriptions():
    assert repr(contiguous()) == "KVCache(batch=3, capacity=20, kv_heads=2, head_dim=6, head_dim_v=4, torch.float32, cpu)"
    assert repr(paged(v_in_k=True)) == ("PagedKVCache(pages=40, page_size=3, max_sequences=8, kv_heads=2, head_dim=6, "
                                        "head_dim_v=4 (a prefix of k), torch.float32, cpu)")
    assert contiguous().nbytes == 3 * 20 * H * (D + D_V) * 4
    assert (contiguous().capacity, paged().page_size) == (20, 3)


# ---- any order of calls ---------------------------------------------------------------------------------------------

class AgainstAModel(RuleBasedStateMachine):
    """A paged cache beside a dictionary of tensors [n]; every token's key and value hold its number."""

    def __init__(self):
        super().__init__()
        self.model, self.tokens = {}, 0

    def pick(self, data, **size):
        return data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, **size))

    @initialize(page_size=st.integers(1, 4), pages=st.integers(3, 12))
    def create(self, page_size, pages):
        self.pages = pages
        self.cache = PagedKVCache(pages, page_size, 1, 1, max_sequences=4, dtype=torch.float64)
        self.new()

    @rule()
    def new(self):
        if len(self.model) == 4:
            with pytest.raises(CacheFull):
                self.cache.new()
        else:
            self.model[self.cache.new()] = torch.empty(0, dtype=torch.float64)

    @precondition(lambda self: 0 < len(self.model) < 4)
    @rule(data=st.data())
    def fork(self, data):
        (parent,) = self.pick(data, min_size=1, max_size=1)
        self.model[self.cache.fork(parent)] = self.model[parent]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        (sequence,) = self.pick(data, min_size=1, max_size=1)
        self.cache.free(sequence)
        del self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        (sequence,) = self.pick(data, min_size=1, max_size=1)
        length = data.draw(st.integers(0, len(self.model[sequence])))
        self.cache.truncate(sequence, length)
        self.model[sequence] = self.model[sequence][:length]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), before=st.booleans())
    def append(self, data, before):
        sequences = self.pick(data, min_size=1)
        counts = data.draw(st.lists(st.integers(0, 6), min_size=len(sequences), max_size=len(sequences)))
        parts = [self.tokens + torch.arange(n, dtype=torch.float64) + 10 * i for i, n in enumerate(counts)]
        self.tokens += 100
        x, cu_seqlens = pack(parts)
        x = x[:, None, None]
        free = self.cache.free_pages
        try:
            if before:
                self.cache.extend(sequences, counts)
            self.cache.append(x, -x, sequences=sequences, cu_seqlens=cu_seqlens, extended=before)
        except (CacheFull, ValueError):
            assert self.cache.free_pages == free
            size, capacity = self.cache.page_size, self.pages * self.cache.page_size
            lengths = [len(self.model[s]) for s in sequences]
            both = list(zip(lengths, counts, strict=True))
            needed = sum(-(-(n + c) // size) - -(-n // size) + (c > 0 and n % size > 0) for n, c in both)
            assert needed > free or max(n + c for n, c in both) > capacity
            return
        for sequence, part in zip(sequences, parts, strict=True):
            self.model[sequence] = torch.cat([self.model[sequence], part])

    @invariant()
    def pages_add_up(self):
        book = self.cache.book
        held = [page for pages in book.pages.values() for page in pages]
        assert book.references == [held.count(page) for page in range(self.pages)]
        assert sorted(book.free_pages + list(set(held))) == list(range(self.pages))
        for sequence, pages in book.pages.items():
            assert self.cache.block_table[sequence].tolist() == pages + [-1] * (self.pages - len(pages))

    @invariant()
    def contents_are_the_models(self):
        self.cache.k[self.cache.book.free_pages] = torch.nan
        sequences = sorted(self.model)
        assert self.cache.lengths.tolist() == [len(self.model.get(s, ())) for s in range(4)]
        for sequence, (k, v) in zip(sequences, dense(self.cache.stored(sequences)), strict=True):
            assert self.cache.length(sequence) == len(self.model[sequence])
            assert torch.equal(k.flatten(), self.model[sequence])
            assert torch.equal(v.flatten(), -self.model[sequence])


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None,
                                      suppress_health_check=[HealthCheck.too_slow])
