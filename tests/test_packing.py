"""Packed batches: round trips, gradients, batches and sequences without tokens, errors."""
import warnings

import pytest
import torch

import tilewise as tw
from tilewise.packing import cu_seqlens, from_nested, to_nested

pytestmark = pytest.mark.usefixtures("one_thread")

HOLES = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def gradients(loss_of, *inputs):
    """Of a sum that weights every element differently."""
    out = loss_of()
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum(), inputs)


# ---- pack, unpack -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lengths", [[3], [0], [0, 0], [2, 0, 5, 1, 0]], ids=str)
@pytest.mark.parametrize("rest", [(), (2, 3), (0,)], ids=str)
def test_pack_and_unpack(lengths, rest):
    sequences = [rand(n, *rest) for n in lengths]
    packed, offsets = tw.pack(sequences)
    assert packed.shape == (sum(lengths), *rest)
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    parts = tw.unpack(packed, offsets)
    assert len(parts) == len(sequences)
    for part, sequence in zip(parts, sequences, strict=True):
        assert torch.equal(part, sequence)
        assert part.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_gradients_of_pack_and_unpack():
    sequences = [rand(n, 2) for n in (2, 0, 3)]
    offsets = tw.pack(sequences)[1]
    scales = [rand(n, 2) for n in (2, 0, 3)]

    def through():
        parts = tw.unpack(tw.pack(sequences)[0], offsets)
        return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)])

    def plain():
        return torch.cat([x * scale for x, scale in zip(sequences, scales, strict=True)])

    for found, expected in zip(gradients(through, *sequences), gradients(plain, *sequences), strict=True):
        assert torch.equal(found, expected)


def test_unpack_without_sequences():
    assert tw.unpack(torch.zeros(0, 3), torch.zeros(1, dtype=torch.int32)) == ()


def test_offsets_of_lengths():
    assert cu_seqlens(torch.tensor([], dtype=torch.int64)).tolist() == [0]
    assert cu_seqlens(torch.tensor([4, 0, 2])).tolist() == [0, 4, 4, 6]
    assert cu_seqlens(torch.tensor([4, 0, 2], dtype=torch.int32)).dtype == torch.int32


# ---- unpad, pad ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rest", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("tokens", [HOLES, HOLES.bool(), HOLES.to(torch.uint8), torch.tensor([2, 5, 0, 4])],
                         ids=["integers", "booleans", "bytes", "lengths"])
def test_unpad_and_pad_are_plain_indexing(tokens, rest):
    x = rand(4, 5, *rest)
    mask = torch.arange(5) < tokens[:, None] if tokens.dim() == 1 else tokens.bool()
    packed, indices, offsets, longest = tw.unpad(x, tokens)
    assert torch.equal(packed, x[mask])
    assert torch.equal(indices, mask.flatten().nonzero()[:, 0])
    assert offsets.dtype == torch.int32
    assert offsets.diff().tolist() == mask.sum(1).tolist()
    assert longest == 5
    back = tw.pad(packed, indices, 4, 5)
    assert torch.equal(back, torch.where(mask.view(4, 5, *[1] * len(rest)), x, 0.0))


def test_gradients_of_unpad_and_pad():
    x, mask = rand(4, 5, 3), HOLES.bool()
    packed, indices, _, _ = tw.unpad(x, mask)
    assert torch.equal(*(gradients(f, x)[0] for f in (lambda: tw.unpad(x, mask).packed, lambda: x[mask])))
    tokens = packed.detach().requires_grad_()

    def plain():
        out = torch.zeros(4, 5, 3, dtype=torch.float64)
        out[mask] = tokens
        return out

    assert torch.equal(*(gradients(f, tokens)[0] for f in (lambda: tw.pad(tokens, indices, 4, 5), plain)))
    assert torch.autograd.gradgradcheck(lambda t: tw.unpad(tw.pad(t.square(), indices, 4, 5), mask).packed, tokens)


def test_unpad_takes_any_strides_and_nothing_from_padding():
    x = rand(3, 5, 4).detach().transpose(0, 1)              # [5, 3, 4]
    lengths = torch.tensor([3, 0, 1, 2, 3])
    mask = torch.arange(3) < lengths[:, None]
    x = torch.where(mask[..., None], x, torch.nan)
    packed, indices, _, longest = tw.unpad(x, lengths)
    assert longest == 3
    assert torch.equal(tw.pad(packed, indices, 5, 3), x.nan_to_num())


@pytest.mark.parametrize("batch, seqlen", [(0, 5), (3, 0), (2, 4)])
def test_batches_without_tokens(batch, seqlen):
    x = rand(batch, seqlen, 2)
    for tokens in (torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, seqlen, dtype=torch.bool)):
        packed, indices, offsets, longest = tw.unpad(x, tokens)
        assert packed.shape == (0, 2)
        assert offsets.tolist() == [0] * (batch + 1)
        assert longest == 0
        assert torch.equal(tw.pad(packed, indices, batch, seqlen), torch.zeros_like(x))


def test_attention_within_the_mask_is_attention_of_each_sequence():
    x = rand(4, 5, 2, 8)
    packed, _, offsets, _ = tw.unpad(x, HOLES)
    sequences = [s[None] for s in tw.unpack(packed, offsets)]
    each = torch.cat([tw.attention(s, s, s) for s in sequences], 1)[0]
    visible = HOLES.bool()[:, None, None] & HOLES.bool()[:, None, :, None]
    whole = tw.unpad(tw.attention(x, x, x, mask=visible), HOLES).packed
    torch.testing.assert_close(each, whole, rtol=1e-12, atol=1e-12)


# ---- nested tensors -----------------------------------------------------------------------------------------------------

def nested(*lengths):
    sequences = [rand(n, 2, 3) for n in lengths]
    return sequences, torch.nested.as_nested_tensor(sequences, layout=torch.jagged)


def test_nested_tensors_in_and_out_without_a_copy():
    sequences, x = nested(3, 0, 4)
    packed, offsets, longest = from_nested(x)
    assert torch.equal(packed, torch.cat(sequences))
    assert packed.data_ptr() == x.values().data_ptr()
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [0, 3, 3, 7]
    assert longest == 4
    back = to_nested(packed[..., :1], x)
    assert back.values().data_ptr() == packed.data_ptr()
    assert back.shape == (3, x.shape[1], 2, 1)              # of the same j: they may be added
    assert torch.equal((x * back).values(), packed * packed[..., :1])


def test_gradients_through_nested_tensors():
    sequences, _ = nested(3, 0, 4)

    def through():
        x = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
        packed, _, _ = from_nested(x)
        return (to_nested(packed.square(), x) * x).values()

    for found, x in zip(gradients(through, *sequences), gradients(lambda: torch.cat(sequences)**3, *sequences), strict=True):
        torch.testing.assert_close(found, x)


def test_nested_tensors_of_a_tensor_and_of_no_sequences():
    batch = torch.nested.as_nested_tensor(torch.zeros(2, 3, 1, 4), layout=torch.jagged)
    assert from_nested(batch)[2] == 3
    none = torch.nested.nested_tensor_from_jagged(torch.zeros(0, 1, 4), torch.tensor([0]))
    packed, offsets, longest = from_nested(none)
    assert (packed.shape, offsets.tolist(), longest) == ((0, 1, 4), [0], 0)


def test_errors_of_nested_tensors_say_what_to_call():
    _, x = nested(3, 1)
    with pytest.raises(ValueError, match=r"x: expected sequences along dimension 1, .* got 2: call x.transpose\(1, 2\)"):
        from_nested(x.transpose(1, 2))
    assert torch.equal(from_nested(x.transpose(1, 2).transpose(1, 2))[0], x.values())
    padded = rand(2, 5, 2, 3)
    x = torch.nested.narrow(padded, 1, torch.tensor([0, 2]), torch.tensor([3, 2]), layout=torch.jagged)
    call = r"x: .* got lengths, as of torch.nested.narrow: call torch.nested.as_nested_tensor\(list\(x.unbind\(\)\), "
    with pytest.raises(ValueError, match=call):
        from_nested(x)
    with pytest.raises(ValueError, match="v: expected sequences along dimension 1"):
        from_nested(x.transpose(1, 2), "v")
    packed, offsets, _ = from_nested(torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged))
    assert torch.equal(packed, torch.cat([padded[0, :3], padded[1, 2:4]]))
    assert offsets.tolist() == [0, 3, 5]
    assert gradients(lambda: packed, padded)[0].count_nonzero() == packed.numel()
    with warnings.catch_warnings():     # of a prototype, once in a process
        warnings.simplefilter("ignore", UserWarning)
        x = torch.nested.nested_tensor([torch.zeros(2, 2, 3), torch.zeros(1, 2, 3)], layout=torch.strided)
    with pytest.raises(ValueError, match=r"x: expected a nested tensor of torch.jagged layout, got torch.strided: call"):
        from_nested(x)


# ---- errors -------------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize("make, error, words", [
    (lambda: tw.pack([]), ValueError, "sequences: expected at least one tensor, got none"),
    (lambda: tw.pack([1.0]), TypeError, r"sequences\[0\]: expected \[S_b, ...\], got float"),
    (lambda: tw.pack([X[0], X]), ValueError,
     r"sequences\[1\]: expected torch.float32 \[S_b, 4\] as the first, got torch.float32 \[2, 3, 4\]"),
    (lambda: tw.pack([X, X.half()]), ValueError, r"sequences\[1\]: expected torch.float32 .* got torch.float16"),
    (lambda: tw.unpack(X, torch.zeros(3)), ValueError, r"cu_seqlens: .* int64 \[B \+ 1\], got torch.float32 \[3\]"),
    (lambda: tw.unpack(X, torch.tensor([0, 1])), ValueError, "cu_seqlens: expected offsets that rise from 0 to 2, got 0 to 1"),
    (lambda: tw.unpack(X, torch.tensor([0, 2, 1, 2])), ValueError, "cu_seqlens: .* 0 to 2 with a least step of -1"),
    (lambda: tw.unpack(X, torch.tensor([], dtype=torch.int32)), ValueError, r"cu_seqlens: expected .* got torch.int32 \[0\]"),
    (lambda: cu_seqlens([1, 2]), TypeError, r"lengths: expected int32 or int64 \[B\], got list"),
    (lambda: cu_seqlens(torch.tensor([1, -2])), ValueError, "lengths: expected values >= 0, got -2"),
    (lambda: tw.unpad(X[0, 0], torch.tensor([1])), ValueError, r"x: expected \[B, S, ...\], got torch.float32 \[4\]"),
    (lambda: tw.unpad(X, torch.ones(2, 3)), ValueError,
     r"tokens: expected lengths, int32 or int64 \[2\], or a mask, boolean or integer \[2, 3\], got torch.float32 \[2, 3\]"),
    (lambda: tw.unpad(X, torch.ones(2, dtype=torch.bool)), ValueError, r"tokens: expected lengths, .* got torch.bool \[2\]"),
    (lambda: tw.unpad(X, torch.ones(3, dtype=torch.int32)), ValueError, r"tokens: expected lengths, .* got torch.int32 \[3\]"),
    (lambda: tw.unpad(X, torch.tensor([1, 4])), ValueError, "tokens: expected values from 0 to 3, got values from 1 to 4"),
    (lambda: tw.unpad(X, torch.tensor([[1, 2, 0], [0, 0, 0]])), ValueError, "tokens: expected values from 0 to 1, .* 0 to 2"),
    (lambda: tw.pad(X, torch.tensor([0, 1, 2]), 2, 3), ValueError, r"indices: expected int64 \[2\], got torch.int64 \[3\]"),
    (lambda: tw.pad(X, torch.tensor([0, 1]).int(), 2, 3), ValueError, "indices: expected int64 .* got torch.int32"),
    (lambda: tw.pad(X, torch.tensor([0, 6]), 2, 3), ValueError, "indices: .* in 2 sequences of 3, 0 to 5, got 0 to 6"),
    (lambda: from_nested(X), ValueError, r"x: expected a nested tensor of torch.jagged layout, got torch.float32 \[2, 3, 4\]"),
    (lambda: to_nested(X, [X]), TypeError, "like: expected a nested tensor of torch.jagged layout, got list"),
    (lambda: to_nested(X, nested(3, 1)[1]), ValueError, r"values: expected \[4, ...\], .* got .* \[2, 3, 4\]"),
])
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
