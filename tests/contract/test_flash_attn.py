"""flash-attn's functions on every backend: everything at once, dense, packed, and from a paged cache with left padding.

All of their arguments one by one, on `tiled` and `cpu`: tests/test_compat_flash_attn*.py.
"""
import pytest
import torch
from support.backends import AVAILABLE, DEVICE
from support.flash import TABLE, check, dense, normal, own_slopes, packed, sequences_of, standard, visible

from tilewise import Rotary
from tilewise.compat import flash_attn, flash_attn_cute, flash_attn_interface

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned", "small_tiles")
EVERYTHING = TABLE[-1]
every_backend = pytest.mark.parametrize("backend", AVAILABLE)


def there(x):
    """On the device, if it is a tensor."""
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


@every_backend
@pytest.mark.parametrize("lengths", [[(21, 33)] * 2, [(33, 21), (5, 0), (1, 7)]], ids=["dense", "packed"])
def test_everything_at_once(lengths, backend):
    form = dense(flash_attn.flash_attn_func) if lengths[0] == lengths[1] else packed(flash_attn.flash_attn_varlen_func)
    arguments = {name: there(x) for name, x in own_slopes(EVERYTHING, len(lengths)).items()}

    def ours(sequences):
        found = form([list(map(there, sequence)) for sequence in sequences], arguments | dict(backend=backend))
        return [(out.cpu(), lse.cpu()) for out, lse in found]

    check(EVERYTHING, sequences_of(lengths), ours, torch.float32, device=DEVICE)


@every_backend
def test_a_cache_in_padded_pages(backend):
    """Keys are turned, appended behind what is stored, in place, and attended to."""
    keys, values = ([normal(n, 2, 16, seed=seed + n) for n in (11, 3)] for seed in (0, 50))
    padding, size = (3, 8), 4
    table = torch.tensor([[4, 1, 6, 9, 2], [0, 3, 7, 8, 5]], dtype=torch.int32)
    k_cache, v_cache = (torch.full((10, size, 2, 16), torch.nan) for _ in "kv")
    rows = table.repeat_interleave(size, 1) * size + torch.arange(size).repeat(5)
    for b, first in enumerate(padding):
        own = rows[b, first:first + len(keys[b])].long()
        k_cache.view(-1, 2, 16)[own], v_cache.view(-1, 2, 16)[own] = keys[b], values[b]
    q, k, v = normal(2, 2, 4, 16, seed=1), normal(2, 2, 2, 16, seed=2), normal(2, 2, 2, 16, seed=3)
    rotary, slopes, sinks = Rotary.of(16, 32), normal(2, 4, seed=4), normal(4, seed=5)
    seqlens = torch.tensor([p + len(x) for p, x in zip(padding, keys, strict=True)], dtype=torch.int32)
    k_there, v_there = there(k_cache), there(v_cache)
    out, lse, *_ = flash_attn_interface.flash_attn_with_kvcache(
        there(q), k_there, v_there, there(k), there(v), rotary_cos=there(rotary.cos), rotary_sin=there(rotary.sin),
        rotary_interleaved=False, cache_seqlens=there(seqlens), cache_leftpad=there(torch.tensor(padding, dtype=torch.int32)),
        page_table=there(table), causal=True, softcap=3.0, alibi_slopes=there(slopes), learnable_sink=there(sinks),
        return_softmax_lse=True, backend=backend)
    out, lse, k_cache = out.cpu(), lse.cpu(), k_there.cpu()
    for b, start in enumerate(seqlens.tolist()):
        turned_q, turned_k = (rotary.rotate(x[b].transpose(0, 1), torch.arange(2) + start).transpose(0, 1) for x in (q, k))
        whole_k, whole_v = torch.cat([keys[b], turned_k]), torch.cat([values[b], v[b]])
        expected, expected_lse = standard(turned_q, whole_k, whole_v, visible(2, len(whole_k), causal=True), softcap=3.0,
                                          slopes=slopes[b], sink=sinks)
        torch.testing.assert_close(out[b], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b], expected_lse, rtol=1e-5, atol=1e-5)
        stored = k_cache.view(-1, 2, 16)[rows[b].long()]
        torch.testing.assert_close(stored[padding[b]:padding[b] + len(whole_k)], whole_k, rtol=0, atol=1e-6)
        assert stored[:padding[b]].isnan().all()
        assert stored[padding[b] + len(whole_k):].isnan().all()


def below(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return kv_idx <= q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q


def lifted(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score + aux_tensors[0][h, q_idx]


@every_backend
def test_functions_of_the_user(backend):
    """Query indices count from the sequence's first query, from pages too."""
    q, k, v, levels = normal(2, 3, 4, 16), normal(4, 8, 2, 16, seed=1), normal(4, 8, 2, 16, seed=2), normal(4, 3, seed=3)
    table, used = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32), torch.tensor([13, 5], dtype=torch.int32)
    out, _ = flash_attn_cute.flash_attn_varlen_func(
        there(q), there(k), there(v), page_table=there(table), seqused_k=there(used), mask_mod=below, score_mod=lifted,
        aux_tensors=[there(levels)], backend=backend)
    out = out.cpu()
    for b, (pages, n) in enumerate((([2, 0], 13), ([1], 5))):
        own_k, own_v = (x[pages].flatten(0, 1)[:n] for x in (k, v))
        expected, _ = standard(q[b], own_k, own_v, visible(3, n, causal=True), mod=lambda s: s + levels[:, :, None])
        torch.testing.assert_close(out[b], expected, rtol=1e-5, atol=1e-5)
