"""Linear memory, and tensors beyond 2^31 elements."""
import sys

import pytest
import torch
from support.backends import AVAILABLE, DEVICE
from support.memory import peak_growth

import tilewise as tw
from tilewise.backends.cpu import compiler


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forward_and_backward_at_most_double():
    growth = peak_growth("backward", (8192, 16384, 32768))
    assert all(ratio <= 2.2 for ratio in growth), growth


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_double_backward_at_most_doubles():
    growth = peak_growth("double_backward", (4096, 8192, 16384))
    assert all(ratio <= 2.2 for ratio in growth), growth


@pytest.mark.skipif(sys.platform != "linux" or not compiler.compiler(), reason="reads /proc, needs a C++ compiler")
def test_double_backward_by_kernels_at_most_doubles():
    """Beside them is a forward and a tangent; N² numbers of a head would be more than all these."""
    growth = peak_growth("native_double_backward", (4096, 8192))
    assert all(ratio <= 2.2 for ratio in growth), growth


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_statistics_at_most_double():
    growth = peak_growth("statistics", (2048, 4096, 8192))
    assert all(ratio <= 2.2 for ratio in growth), growth


@pytest.mark.parametrize("backend", AVAILABLE)
def test_offsets_beyond_32_bits(backend):
    """Views whose second sequence starts 2^31 elements after the first; only touched pages are real memory."""
    stride, shape = 2**31 + 64, (2, 40, 2, 16)
    big = torch.empty(stride + 40 * 2 * 16, dtype=torch.float16, device=DEVICE)
    small = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    far = big.as_strided(shape, (stride, 32, 16, 1))
    far.copy_(small)
    outs = []
    for x in (far, small):
        x = x.detach().requires_grad_()
        out = tw.attention(x, x, x, causal=True, backend=backend)
        outs.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)
