"""Code written for FlexAttention runs with a changed import."""
import pytest
import torch
from support.backends import AVAILABLE
from torch.nn.attention import flex_attention as theirs

import tilewise as tw
from tilewise.compat import flex

pytestmark = [pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs"),
              pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
              pytest.mark.filterwarnings("ignore:return_lse is deprecated")]
B, H, N, D = 2, 4, 100, 16
IDS = torch.arange(N) // 30


def inputs(kv_heads=H):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, heads, N, D, generator=g) for heads in (H, kv_heads, kv_heads)]


def documents(b, h, q_idx, kv_idx):
    return (IDS[q_idx] == IDS[kv_idx]) & (q_idx >= kv_idx)


def per_head(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx).abs() <= 10 * (h + 1)


def cap(score, b, h, q_idx, kv_idx):
    return 5 * torch.tanh(score / 5)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("mask, batch, heads", [(documents, None, None), (per_head, None, H), (per_head, B, H)])
def test_a_block_mask_of_torch(mask, batch, heads, separate):
    block_mask = theirs.create_block_mask(mask, batch, heads, N, N, device="cpu", BLOCK_SIZE=32, separate_full_blocks=separate)
    q, k, v = inputs()
    out, lse = flex.flex_attention(q, k, v, score_mod=cap, block_mask=block_mask, return_lse=True)
    expected, expected_lse = theirs.flex_attention(q, k, v, score_mod=cap, block_mask=block_mask, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_blocks_that_torch_drops_stay_dropped():
    """A BlockMask says which blocks its function is asked about; outside them nothing is visible."""
    block_mask = theirs.create_block_mask(lambda b, h, q, k: q >= k, None, None, 96, 96, device="cpu", BLOCK_SIZE=32)
    block_mask.kv_num_blocks.clamp_(max=0)
    q, k, v = (x[:, :, :96] for x in inputs())
    out = flex.flex_attention(q, k, v, block_mask=block_mask)
    whole_blocks = tw.block_mask(torch.ones(3, 3, dtype=torch.bool).tril(-1), block_size=32)
    torch.testing.assert_close(out, flex.flex_attention(q, k, v, block_mask=whole_blocks))
    assert (out[:, :, :32] == 0).all()


def test_ours_is_like_theirs():
    n = 96  # to torch a block that the sequence does not fill is partial
    q, k, v = (x[:, :, :n] for x in inputs(kv_heads=2))
    ours = flex.create_block_mask(per_head, None, H, n, n, device="cpu", BLOCK_SIZE=(16, 32))
    mask = theirs.create_block_mask(per_head, None, H, n, n, device="cpu", BLOCK_SIZE=(16, 32))
    assert torch.equal(ours.lists()["full"][0], mask.full_kv_num_blocks)
    assert torch.equal(ours.lists()["partial"][0], mask.kv_num_blocks)
    assert torch.equal(ours.lists(transposed=True)["partial"][0], mask.q_num_blocks)
    assert torch.equal(flex.create_mask(per_head, None, H, N, N), theirs.create_mask(per_head, 1, H, N, N, device="cpu"))
    out, expected = (module.flex_attention(q, k, v, block_mask=blocks, scale=0.2, enable_gqa=True)
                     for module, blocks in ((flex, ours), (theirs, mask)))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["and_masks", "or_masks"])
def test_joined_functions(name):
    mine, other = (getattr(module, name)(documents, per_head, flex.noop_mask) for module in (flex, theirs))
    expected = theirs.create_mask(other, 1, H, N, N, device="cpu")
    for joined in (mine, other):  # torch's joined functions are captured as well
        assert torch.equal(tw.mask_mod(joined).dense(1, H, N, N), expected)


def test_trains_on_a_cpu():
    q, k, v = (x.requires_grad_() for x in inputs())
    flex.flex_attention(q, k, v, score_mod=cap, block_mask=flex.create_block_mask(documents, None, None, N, N)).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_refusals():
    q, k, v = inputs(kv_heads=2)
    with pytest.raises(ValueError, match="enable_gqa: expected True"):
        flex.flex_attention(q, k, v)
    with pytest.raises(ValueError, match="kernel_options: expected None"):
        flex.flex_attention(q, q, q, kernel_options={"BLOCK_M": 64})


@pytest.mark.skipif(not hasattr(theirs, "AuxRequest"), reason="torch 2.10 and newer")
def test_auxiliary_outputs():
    q, k, v = inputs()
    assert (flex.AuxRequest, flex.AuxOutput) == (theirs.AuxRequest, theirs.AuxOutput)
    _, aux = flex.flex_attention(q, k, v, return_aux=theirs.AuxRequest(lse=True))
    torch.testing.assert_close(aux.lse, flex.flex_attention(q, k, v, return_lse=True)[1])
    assert aux.max_scores is None
    _, aux = flex.flex_attention(q, k, v, score_mod=cap, return_aux=theirs.AuxRequest(max_scores=True))
    assert aux.lse is None      # torch computes max_scores on GPUs only
    torch.testing.assert_close(aux.max_scores, cap(q @ k.mT * q.shape[-1] ** -0.5, 0, 0, 0, 0).amax(-1))
