"""Rotary embedding against complex numbers, in which it is a multiplication by exp(i m θ)."""
import pytest
import torch

from tilewise.rotary import Rotary

BASE = 10000.0


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_complex_numbers(x, positions, rotary_dim, interleaved):
    """eq. 34 in fp64: entries paired to complex numbers and multiplied by exp(i m base^(-2 i / rotary_dim))."""
    x = x.double()
    head, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    angles = positions.double()[..., None] * BASE ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim, rotary_dim", [(8, 8), (12, 6), (5, 2), (64, 64)])
def test_equals_the_formula(dim, rotary_dim, interleaved):
    x = random(2, 3, 7, dim)
    rotary = Rotary.of(rotary_dim, 100, interleaved=interleaved, dtype=torch.float64)
    assert (rotary.rotary_dim, rotary.max_position) == (rotary_dim, 100)
    for positions in (torch.arange(7) + 90, torch.randint(100, (2, 1, 7)), torch.tensor([[[5]], [[0]]]), torch.tensor(99)):
        expected = by_complex_numbers(x, positions, rotary_dim, interleaved)
        torch.testing.assert_close(rotary.rotate(x, positions), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(rotary.rotate(x, positions.int()), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_difference_of_positions(interleaved):
    q, k = random(1, 16, seed=1), random(1, 16, seed=2)
    rotary = Rotary.of(16, 3000, interleaved=interleaved, dtype=torch.float64)

    def product(m, n):
        return (rotary.rotate(q, torch.tensor([m])) * rotary.rotate(k, torch.tensor([n]))).sum()

    for distance in (0, 1, 17, 500):
        torch.testing.assert_close(product(distance, 0), product(2400 + distance, 2400), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(rotary.rotate(q, torch.tensor([2999])).norm(), q.norm())
    assert torch.equal(rotary.rotate(q, torch.tensor([0])), q)


def test_the_pairings_differ_by_the_order_of_entries():
    x, positions = random(4, 10), torch.arange(4)
    halves, pairs = (Rotary.of(10, 4, interleaved=i, dtype=torch.float64) for i in (False, True))
    order = torch.arange(10).view(2, 5).T.flatten()
    assert torch.equal(pairs.rotate(x[:, order], positions), halves.rotate(x, positions)[:, order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_is_rounded_once(dtype):
    x, positions = random(3, 5, 8, dtype=dtype), torch.arange(5) + 1000
    rotary = Rotary.of(8, 2000)
    exact = rotary.rotate(x.float(), positions)
    assert rotary.rotate(x, positions).dtype == dtype
    assert torch.equal(rotary.rotate(x, positions), exact.to(dtype))
    torch.testing.assert_close(exact.double(), by_complex_numbers(x, positions, 8, False), rtol=0, atol=1e-6)


def test_leaves_its_input_and_keeps_the_order_of_memory():
    x = random(2, 5, 3, 8)
    before = x.clone()
    turned = Rotary.of(8, 10).rotate(x.transpose(1, 2), torch.arange(5))
    assert torch.equal(x, before)
    assert turned.transpose(1, 2).is_contiguous()
    assert Rotary.of(8, 10).rotate(x[:, :0], torch.zeros(3, dtype=torch.int64)).shape == (2, 0, 3, 8)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient(interleaved):
    x = random(2, 3, 6).requires_grad_()
    rotary = Rotary.of(4, 10, interleaved=interleaved, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotary.rotate(x, torch.tensor([3, 0, 9])), x)


TABLE = torch.zeros(4, 3)


@pytest.mark.parametrize("make, error, message", [
    (lambda: Rotary(TABLE.int(), TABLE), TypeError, "cos: expected a floating tensor, got torch.int32"),
    (lambda: Rotary(TABLE, None), TypeError, "sin: expected a floating tensor, got NoneType"),
    (lambda: Rotary(TABLE[0], TABLE[0]), ValueError, r"cos: expected \[max_position, rotary_dim / 2\], got \[3\]"),
    (lambda: Rotary(TABLE, TABLE[:2]), ValueError, "sin: expected cos's shape"),
    (lambda: Rotary(TABLE, TABLE.double()), ValueError, "sin: expected cos's dtype torch.float32, got torch.float64"),
    (lambda: Rotary.of(7, 10), ValueError, "rotary_dim: expected an even number >= 2, got 7"),
    (lambda: Rotary.of(8, 0), ValueError, "max_position: expected a number of positions >= 1, got 0"),
    (lambda: Rotary.of(8, 10).rotate(torch.zeros(3, 6), torch.arange(3)), ValueError, r"x: .* D >= rotary_dim 8, got \[3, 6\]"),
    (lambda: Rotary.of(8, 10).rotate(torch.zeros(3, 8).int(), torch.arange(3)), TypeError, "x: expected a floating tensor"),
    (lambda: Rotary.of(8, 10).rotate(torch.zeros(3, 8), torch.zeros(3)), TypeError, "positions: expected int32 or int64"),
    (lambda: Rotary.of(8, 10).rotate(torch.zeros(3, 8), torch.arange(2)), ValueError, r"positions: .* to \[3\], got \[2\]"),
    (lambda: Rotary.of(8, 10, device="meta").rotate(torch.zeros(3, 8), torch.arange(3)), ValueError, "x: .* meta, got cpu"),
    (lambda: Rotary.of(8, 10).rotate(torch.zeros(3, 8), torch.arange(3) + 8), IndexError, "from 0 to 9, got .* from 8 to 10"),
    (lambda: Rotary.of(8, 10).rotate(torch.zeros(3, 8), torch.arange(3) - 1), IndexError, "from 0 to 9, got .* from -1 to 1"),
])
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
