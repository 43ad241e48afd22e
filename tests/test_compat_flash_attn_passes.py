"""flash-attn's forward and backward apart: ring attention in one process is attention to all keys."""
import inspect

import pytest
import torch
from support.backends import AVAILABLE
from support.flash import normal

import tilewise as tw
from tilewise.compat.flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

pytestmark = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
BACKENDS = [name for name in ("cpu", "tiled") if name in AVAILABLE]
S, H, H_KV, D, BLOCK = 60, 4, 2, 16, 20


def whole(q, k, v, dout, **options):
    """out, lse and gradients of attention to all keys, in fp64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = tw.attention(*leaves, return_lse=True, backend="reference", **options)
    return out, lse, *torch.autograd.grad(out, leaves, dout.double())


def close(found, truth):
    torch.testing.assert_close(found.double(), truth.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_keys_and_queries_in_turn(backend):
    """Causal ring attention: each block of queries meets its own keys causally, those before wholly; buffers are slices."""
    q, k, v, dout = (normal(2, S, h, D, seed=i) for i, h in enumerate((H, H_KV, H_KV, H)))
    truth = whole(q, k, v, dout, causal=True)
    blocks = [slice(first, first + BLOCK) for first in range(0, S, BLOCK)]
    fixed = dict(dropout_p=0.0, softmax_scale=D ** -0.5, window_size_left=-1, window_size_right=-1, softcap=0.0,
                 alibi_slopes=None, backend=backend)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for i, rows in enumerate(blocks):
        states = []
        for keys in blocks[:i + 1]:
            out, lse, shown, _ = _flash_attn_forward(q[:, rows], k[:, keys], v[:, keys], causal=rows == keys,
                                                     return_softmax=False, **fixed)
            assert shown.numel() == 0
            states.append(tw.AttentionState(out.transpose(1, 2), lse))
        state = tw.merge_states(states)
        out = state.out.transpose(1, 2)
        close(out, truth[0][:, rows])
        close(state.lse, truth[1][..., rows])
        for keys in blocks[:i + 1]:
            parts = [torch.full_like(x, torch.nan) for x in (q[:, rows], k[:, keys], v[:, keys])]
            delta = _flash_attn_backward(dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out, state.lse, *parts,
                                         causal=rows == keys, deterministic=False, rng_state=None, **fixed)
            close(delta, (dout[:, rows] * out).sum(-1).transpose(1, 2))
            dq[:, rows] += parts[0]
            dk[:, keys] += parts[1]
            dv[:, keys] += parts[2]
    for found, true in zip((dq, dk, dv), truth[2:], strict=True):
        close(found, true)


EVERYTHING = 0.2, 0.3, True, 20, 0, 15.0, torch.rand(H, generator=torch.Generator().manual_seed(0))
CAUSAL = 0.0, 0.3, True, -1, -1, 0.0, None


@pytest.mark.parametrize("backend, asked", [("tiled", EVERYTHING), *((name, CAUSAL) for name in BACKENDS)],
                         ids=["everything", *BACKENDS])
def test_packed(backend, asked):
    """Dropout's bits come back by rng_state; a row that sees no key has lse +inf and gradient 0."""
    lengths_q, lengths_k = (9, 0, 30), (5, 4, 33)
    ends_q, ends_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q, dout = normal(39, H, D), normal(39, H, D, seed=3)
    k, v = normal(42, H_KV, D, seed=1), normal(42, H_KV, D, seed=2)
    ends = (ends_q, ends_k, 30, 33)
    torch.manual_seed(5)
    out, lse, _, state = _flash_attn_varlen_forward(q, k, v, *ends, *asked, backend=backend)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    true_out, true_lse = tw.attention_varlen(
        *leaves, ends_q, ends_k, causal=True, mask=None if asked is CAUSAL else tw.window(20, 0), scale=0.3, dropout_p=asked[0],
        score_mod=None if asked is CAUSAL else [tw.softcap(asked[5]), tw.alibi(asked[6])], rng=tw.Rng(*state.tolist()),
        return_lse=True, backend="tiled")
    close(out, true_out)
    assert (lse[:, :4] == torch.inf).all()
    close(lse[:, 4:], true_lse[:, 4:])
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    _flash_attn_varlen_backward(dout, q, k, v, out, lse, *found, *ends, *asked, True, state, backend=backend)
    for x, true in zip(found, torch.autograd.grad(true_out, leaves, dout.double()), strict=True):
        close(x, true)
    assert (found[0][:4] == 0).all()


def test_libraries_can_read_the_arguments():
    mask = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    given = "dout q k v out softmax_lse dq dk dv"
    for function, names in (
            (_flash_attn_forward, f"q k v {mask} return_softmax"),
            (_flash_attn_backward, f"{given} {mask} deterministic rng_state"),
            (_flash_attn_varlen_forward, f"q k v {lengths} {mask} return_softmax block_table leftpad_k seqused_k zero_tensors"),
            (_flash_attn_varlen_backward, f"{given} {lengths} {mask} deterministic rng_state zero_tensors")):
        assert inspect.getfullargspec(function).args == names.split()


def test_refusals():
    q = torch.zeros(1, 6, 2, 8)
    lse, fixed = torch.zeros(1, 2, 6), (None, False, -1, -1, 0.0, None)
    with pytest.raises(TypeError, match="dk: expected float32, got NoneType"):
        _flash_attn_backward(q, q, q, q, q, lse, q.clone(), None, q.clone(), 0.0, *fixed, False)
    with pytest.raises(ValueError, match=r"softmax_lse: expected \[1, 2, 6\]"):
        _flash_attn_backward(q, q, q, q, q, lse.mT, *[q.clone()] * 3, 0.0, *fixed, False)
    with pytest.raises(TypeError, match="rng_state: expected int64, got NoneType"):
        _flash_attn_backward(q, q, q, q, q, lse, *[q.clone()] * 3, 0.1, *fixed, False)
    with pytest.raises(NotImplementedError, match="return_softmax: expected False"):
        _flash_attn_forward(q, q, q, 0.0, *fixed, True)
