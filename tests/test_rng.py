"""Dropout's random bits: the published generator, and a mask that depends on nothing but its definition."""
import pytest
import torch
from support.backends import AVAILABLE, DEVICE

import tilewise as tw
from tilewise import rng


@pytest.mark.parametrize("counter, key, expected", [  # Random123's known answers for philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_known_answers(counter, key, expected):
    words = rng.philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == expected


def kept(source, t, rows, cols, heads=2, sequence=0, head=0):
    i = torch.arange(rows)[:, None]
    return rng.keep(source.tensor("cpu"), t, torch.tensor(sequence), torch.tensor(head), heads, i, torch.arange(cols))


def test_rate_and_independence():
    mask = kept(tw.Rng(5), rng.threshold(0.3), 512, 1024).float()
    assert abs(mask.mean() - 0.7) < 4 * (0.21 / mask.numel()) ** 0.5
    for shift, dim in ((1, 0), (1, 1), (2, 1), (8, 1), (32, 1)):  # neighbours in every way the bits are shared out
        together = (mask * mask.roll(shift, dim)).mean()
        assert abs(together - 0.49) < 0.005, (shift, dim)
    other = kept(tw.Rng(5, offset=1), rng.threshold(0.3), 512, 1024).float()
    assert abs((mask * other).mean() - 0.49) < 0.005


def test_first_sequence_continues_a_batch():
    whole = kept(tw.Rng(9), 20000, 40, 70, sequence=3)
    part = kept(tw.Rng(9, first_sequence=2), 20000, 40, 70, sequence=1)
    assert torch.equal(whole, part)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_every_backend_drops_the_same_elements(backend, small_tiles):
    """Equal scores and v = identity show the mask: out[i, j] is 0 where (i, j) is dropped."""
    n, heads = 90, 2
    q = torch.zeros(2, n, heads, 16, device=DEVICE)
    v = torch.eye(n, device=DEVICE)[None, :, None].expand(2, n, heads, n).contiguous()
    source = tw.Rng(2**40 + 3, offset=2**33 + 1, first_sequence=5)
    out = tw.attention(q, q, v, dropout_p=0.4, rng=source, backend=backend).cpu()
    for b in range(2):
        for h in range(heads):
            assert torch.equal(out[b, :, h] != 0, kept(source, rng.threshold(0.4), n, n, sequence=b, head=h))


def test_default_draws_from_the_generator():
    q = torch.randn(1, 32, 1, 8)
    torch.manual_seed(1)
    first, second = (tw.attention(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = tw.attention(q, q, q, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
