"""The native reader of how tensors lie tells apart what Python does (`tilewise/backends/cpu/layouts.py`)."""
import pytest
import torch
from support.backends import AVAILABLE

import tilewise as tw
from tilewise import calls, known
from tilewise.backends.cpu import compiler, layouts

READ = layouts.reader(known.ALIGNED) if "cpu" in AVAILABLE else None
pytestmark = pytest.mark.skipif(READ is None, reason="needs a C++ compiler and PyTorch >= 2.10")

MEMORY = torch.zeros(4096)
TENSORS = {
    "plain": torch.zeros(1, 16, 2, 8),
    "other numbers": torch.ones(1, 16, 2, 8),
    "wants a gradient": torch.zeros(1, 16, 2, 8, requires_grad=True),
    "a view in the middle": MEMORY[64:64 + 256].view(1, 16, 2, 8),
    "not aligned": MEMORY[1:257].view(1, 16, 2, 8),
    "aligned to half": MEMORY[2:258].view(1, 16, 2, 8),
    "longer": torch.zeros(1, 17, 2, 8),
    "heads and rows exchanged": torch.zeros(1, 2, 16, 8),
    "turned": torch.zeros(1, 2, 16, 8).transpose(1, 2),
    "expanded": torch.zeros(1, 16, 1, 8).expand(1, 16, 2, 8),
    "every other row": torch.zeros(1, 32, 2, 8)[:, ::2],
    "three dimensions": torch.zeros(16, 2, 8),
    "empty": torch.zeros(1, 0, 2, 8),
    "no dimensions": torch.zeros(()),
    **{str(dtype): torch.zeros(1, 16, 2, 8, dtype=dtype) for dtype in
       (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.int64,
        torch.bool, torch.complex64)}}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("name", TENSORS)
def test_equal_where_python_finds_them_equal(name, place):
    here = [TENSORS["plain"]] * 3
    here[place] = TENSORS[name]
    for other in TENSORS.values():
        there = [TENSORS["plain"]] * 3
        there[place] = other
        assert (READ(*here) == READ(*there)) == (calls.in_python(*here) == calls.in_python(*there))


@pytest.mark.parametrize("tensor", [torch.zeros(1, 16, 2, 8).to_sparse(), torch.zeros(1, 16, 2, 8, device="meta"), 1.5, None])
def test_what_has_no_layout_raises_and_leaves_nothing_behind(tensor):
    with pytest.raises((TypeError, BufferError, RuntimeError)):
        READ(TENSORS["plain"], tensor, TENSORS["plain"])
    assert READ(*[TENSORS["plain"]] * 3) == READ(*[TENSORS["other numbers"]] * 3)


@pytest.mark.parametrize("missing", ["the exchange", "a compiler", "a compiler that works"])
def test_without_it_python_reads(missing, monkeypatch):
    if missing == "the exchange":
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    elif missing == "a compiler":
        monkeypatch.setattr(compiler, "compiler", tuple)
    else:
        def broken(*_):
            raise RuntimeError("c++ could not compile")
        monkeypatch.setattr(compiler, "library", broken)
    assert layouts.reader(known.ALIGNED) is None


@pytest.mark.parametrize("sparse", range(3))
def test_sparse_tensors_are_refused_by_name(sparse):
    tensors = [torch.zeros(1, 16, 2, 8) for _ in range(3)]
    tensors[sparse] = tensors[sparse].to_sparse()
    with pytest.raises((TypeError, ValueError), match="qkv"[sparse]):
        tw.attention(*tensors)
