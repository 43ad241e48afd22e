"""flash_attn.bert_padding and flash_attn.layers.rotary, against their definitions."""
import pytest
import torch
from support.backends import AVAILABLE
from support.flash import ends, normal

from tilewise.compat.flash_attn import bert_padding as padding
from tilewise.compat.flash_attn.layers import rotary

pytestmark = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32])
def test_unpad_and_pad(dtype):
    x = normal(3, 4, 2, 5).requires_grad_()
    tokens, indices, cu_seqlens, longest, used = padding.unpad_input(x, MASK.to(dtype))
    assert indices.tolist() == [0, 1, 2, 9, 10, 11]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest, used.tolist()) == ([0, 3, 3, 6], torch.int32, 3, [3, 0, 3])
    assert torch.equal(tokens, x[MASK.bool()])
    back = padding.pad_input(tokens, indices, 3, 4)
    assert torch.equal(back, x * MASK[..., None, None])
    back.sum().backward()
    assert torch.equal(x.grad, MASK[..., None, None].expand_as(x).float())


def test_places_that_are_kept_without_a_token():
    unused = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest, used = padding.unpad_input(normal(3, 4, 5), MASK, unused)
    assert indices.tolist() == [0, 1, 2, 3, 4, 9, 10, 11]
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 4, 5, 8], 4, [3, 0, 3])
    assert (used.dtype, tokens.shape) == (torch.int32, (8, 5))


def test_concatenated_sequences():
    x, lengths = normal(3, 6, 5), torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert (longest, cu_seqlens.dtype) == (6, torch.int32)
    assert torch.equal(tokens, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert torch.equal(padding.pad_input(tokens, indices, 3, 6)[2], x[2])


def test_indexing_the_first_dimension():
    x, indices = normal(7, 3).requires_grad_(), torch.tensor([5, 0, 2])
    taken = padding.index_first_axis(x, indices)
    assert torch.equal(taken, x[indices])
    put = padding.index_put_first_axis(taken, indices, 9)
    assert torch.equal(put[indices], taken)
    assert put.count_nonzero() == taken.numel()
    taken, residual = padding.index_first_axis_residual(x, indices)
    (taken.sum() + 2 * residual.sum()).backward()
    assert torch.equal(x.grad[:, 0], torch.tensor([3.0, 2, 3, 2, 2, 3, 2]))


def angles(positions, rotary_dim, base):
    return positions.double()[..., None] * base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def turned(x, positions, rotary_dim, interleaved, base=10000.0):
    """By complex numbers: x [..., S, H, D] in fp64."""
    turns = torch.exp(1j * angles(positions, rotary_dim, base))[..., None, :]
    own, rest = x.double().split([rotary_dim, x.shape[-1] - rotary_dim], -1)
    pairs = own.unflatten(-1, (-1, 2)) if interleaved else own.unflatten(-1, (2, -1)).mT
    result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    return torch.cat([result.flatten(-2) if interleaved else result.mT.flatten(-2), rest], -1)


def tables(rotary_dim, positions=40, base=10000.0):
    found = angles(torch.arange(positions), rotary_dim, base)
    return found.cos().float(), found.sin().float()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([0, 7], dtype=torch.int32)], ids=str)
def test_apply_rotary(offsets, inplace, interleaved):
    x, (cos, sin) = normal(2, 5, 3, 16).requires_grad_(), tables(12)
    before = x.detach().clone()
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets)
    first = offsets[:, None] if isinstance(offsets, torch.Tensor) else offsets
    positions = (torch.arange(5) + first).expand(2, 5)
    wide = before.double().requires_grad_()
    expected = turned(wide, positions, 12, interleaved)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x.detach(), out.detach() if inplace else before)
    upstream = normal(*x.shape, seed=1)
    found, = torch.autograd.grad(out, x, upstream)
    wanted, = torch.autograd.grad(expected, wide, upstream.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offsets", [2, torch.tensor([4, 0, 9])], ids=str)
def test_apply_rotary_to_packed_sequences(offsets):
    x, (cos, sin) = normal(9, 3, 16), tables(16)
    out = rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, cu_seqlens=ends([3, 0, 4]), max_seqlen=4)
    first = offsets.tolist() if isinstance(offsets, torch.Tensor) else [2] * 3
    positions = torch.cat([torch.arange(n) + start for n, start in zip((3, 0, 4), first, strict=True)])
    torch.testing.assert_close(out[:7].double(), turned(x[:7], positions, 16, False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["three", "grouped", "kv"])
@pytest.mark.parametrize("leaf", [False, True], ids=["computed", "leaf"])
def test_in_place(form, leaf):
    """Into the argument, which is returned; gradients are those of turning, for leaves too."""
    (cos, sin), (cos_k, sin_k) = tables(8), tables(8, base=50.0)
    shape = {"three": (2, 5, 3, 4, 8), "grouped": (2, 5, 8, 8), "kv": (2, 5, 2, 4, 8)}[form]
    source = normal(*shape).requires_grad_()
    x = source if leaf else source * 1
    if form == "kv":
        out = rotary.apply_rotary_emb_kv_(x, cos, sin, True, 2)
    else:
        out = rotary.apply_rotary_emb_qkv_(x, cos, sin, cos_k, sin_k, True, 2, num_heads_q=4 if form == "grouped" else None)
    wide = normal(*shape).double().requires_grad_()
    positions = torch.arange(5) + 2
    if form == "kv":
        expected = torch.stack([turned(wide[:, :, 0], positions, 8, True), wide[:, :, 1]], 2)
    elif form == "three":
        q, k, v = wide.unbind(2)
        expected = torch.stack([turned(q, positions, 8, True), turned(k, positions, 8, True, 50.0), v], 2)
    else:
        q, k, v = wide.split([4, 2, 2], 2)
        expected = torch.cat([turned(q, positions, 8, True), turned(k, positions, 8, True, 50.0), v], 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x.detach(), out.detach())
    upstream = normal(*shape, seed=1)
    torch.testing.assert_close(torch.autograd.grad(out, source, upstream)[0].double(),
                               torch.autograd.grad(expected, wide, upstream.double())[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_torch_operations(interleaved):
    x, (cos, sin) = normal(2, 5, 3, 16), tables(12, 5)
    expected = turned(x, torch.arange(5), 12, interleaved)
    for table in (cos, sin), (cos.expand(2, -1, -1), sin.expand(2, -1, -1)):
        out = rotary.apply_rotary_emb_torch(x, *table, interleaved)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_base", [None, 512])
def test_the_module(scale_base):
    """Tables grow; with XPos what q gains, k loses, by position."""
    module = rotary.RotaryEmbedding(8, base=100.0, scale_base=scale_base)
    qkv = normal(2, 6, 3, 4, 8)
    out = module(qkv.clone(), seqlen_offset=3)
    power = torch.zeros(9, 4, dtype=torch.float64)
    if scale_base is not None:
        power = (torch.arange(9).double() - 9 // 2)[:, None] / scale_base
    scale = ((torch.arange(0, 8, 2).double() + 3.2) / 11.2) ** power
    scale = torch.cat([scale, scale], 1)[3:, None]
    for part, factor in ((0, scale), (1, 1 / scale), (2, None)):
        expected = qkv[:, :, part].double()
        if factor is not None:
            expected = turned(expected, torch.arange(6) + 3, 8, False, 100.0) * factor
        torch.testing.assert_close(out[:, :, part].double(), expected, rtol=1e-5, atol=1e-6)
    q, kv = module(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=torch.tensor([3, 3]), max_seqlen=9)
    torch.testing.assert_close(torch.cat([q[:, :, None], kv], 2), out)
    assert module(qkv.clone(), seqlen_offset=torch.tensor([0, 20]), max_seqlen=30).shape == qkv.shape
    assert module._cos_cached.shape == (30, 4)
    assert not module.state_dict()


def test_refusals():
    x, (cos, sin) = normal(2, 5, 3, 16), tables(12, 5)
    with pytest.raises(IndexError, match="positions: expected values from 0 to 4"):
        rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=1)
    with pytest.raises(ValueError, match=r"x: expected .* rotary_dim 12"):
        rotary.apply_rotary_emb(x[..., :8], cos, sin)
    with pytest.raises(ValueError, match=r"qkv: expected .* with num_heads_q=None"):
        rotary.apply_rotary_emb_qkv_(x, cos, sin)
    with pytest.raises(ValueError, match="max_seqlen: expected a number of positions where seqlen_offset is a tensor"):
        rotary.RotaryEmbedding(8)(x, seqlen_offset=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="tokens: expected"):
        padding.unpad_input(x, MASK)
