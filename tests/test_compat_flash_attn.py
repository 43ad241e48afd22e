"""Every argument of flash-attn 2's functions against dense attention, forward and backward, by flash-attn's own rule."""
import pytest
import torch
from support.backends import AVAILABLE
from support.flash import (
    H_KV,
    HEAD_SLOPES,
    TABLE,
    Asked,
    D,
    H,
    check,
    dense,
    drawn,
    ends,
    normal,
    own_slopes,
    packed,
    sequences_of,
    signature,
    standard,
    visible,
)

import tilewise as tw
from tilewise.compat import flash_attn as flash2

pytestmark = [pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs"),
              pytest.mark.usefixtures("one_thread", "poisoned", "small_tiles")]
LENGTHS = ((21, 33), (33, 21), (5, 0), (0, 4), (1, 7))     # queries and keys of each packed sequence
# every row on `tiled`; on `cpu`, which compiles a kernel for each kind of mask and score function, a few
CALLS = [(asked, name) for asked in TABLE for name in AVAILABLE if name == "tiled" or (name == "cpu" and asked.cpu)]


@pytest.mark.parametrize("lengths", [(21, 33), (33, 21)], ids=str)
@pytest.mark.parametrize("asked, backend", CALLS, ids=str)
def test_dense(asked, lengths, backend):
    arguments = own_slopes(asked, 2) | dict(backend=backend)
    check(asked, sequences_of([lengths] * 2), lambda s: dense(flash2.flash_attn_func)(s, arguments), torch.float32)


@pytest.mark.parametrize("asked", TABLE, ids=str)
def test_no_keys(asked):
    arguments = own_slopes(asked, 2) | dict(backend="tiled")
    check(asked, sequences_of([(4, 0)] * 2), lambda s: dense(flash2.flash_attn_func)(s, arguments), torch.float32)


@pytest.mark.parametrize("asked, backend", CALLS, ids=str)
def test_packed(asked, backend):
    arguments = own_slopes(asked, len(LENGTHS)) | dict(backend=backend)
    check(asked, sequences_of(LENGTHS), lambda s: packed(flash2.flash_attn_varlen_func)(s, arguments), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [TABLE[0], TABLE[2], TABLE[-1]], ids=str)
def test_half_precision(asked, dtype):
    arguments = own_slopes(asked, 2) | dict(backend="tiled")
    sequences = [[x.to(dtype) for x in s] for s in sequences_of([(21, 33)] * 2, heads_kv=H)]
    check(asked, sequences, lambda s: dense(flash2.flash_attn_func)(s, arguments), dtype)
    check(asked, sequences, lambda s: packed(flash2.flash_attn_varlen_func)(s, arguments), dtype)


@pytest.mark.parametrize("asked", [TABLE[0], TABLE[7], TABLE[-1]], ids=str)
def test_packed_tensors(asked):
    """q, k and v in one tensor, or k and v: the same results and gradients."""
    same = sequences_of([(19, 19)] * 2, heads_kv=H)
    arguments = own_slopes(asked, 2) | dict(backend="tiled")
    for form in (dense(lambda q, k, v, **a: flash2.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **a)),
                 dense(lambda q, k, v, **a: flash2.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **a)),
                 packed(lambda q, k, v, cu, _, n, __, **a: flash2.flash_attn_varlen_qkvpacked_func(
                     torch.stack([q, k, v], 1), cu, n, **a)),
                 packed(lambda q, k, v, *where, **a: flash2.flash_attn_varlen_kvpacked_func(
                     q, torch.stack([k, v], 1), *where, **a))):
        check(asked, same, lambda s, form=form: form(s, arguments), torch.float32)


# Read from flash-attn 2.8's flash_attn_interface.py: names and defaults, in order.
SHARED = ("dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
          "deterministic=False, return_attn_probs=False")
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {SHARED}",
    "flash_attn_kvpacked_func": f"q, kv, {SHARED}",
    "flash_attn_qkvpacked_func": f"qkv, {SHARED}",
    "flash_attn_varlen_func": f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {SHARED}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {SHARED}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {SHARED}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
                               "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
                               "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
                               "return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert signature(getattr(flash2, name)) == SIGNATURES[name]
    assert name in flash2.__all__


def test_arguments_by_position():
    """As programs pass them, flash-attn's own tests among them."""
    q, k, v = (torch.stack(x) for x in zip(*sequences_of([(9, 9)] * 2), strict=True))
    found = flash2.flash_attn_func(q, k, v, 0.0, 0.3, True, (4, 0), 2.0, HEAD_SLOPES, True, True, backend="tiled")
    named = flash2.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, window_size=(4, 0), softcap=2.0,
                                   alibi_slopes=HEAD_SLOPES, return_attn_probs=True, backend="tiled")
    assert all(torch.equal(a, b) for a, b in zip(found, named, strict=True))


def test_results():
    """out alone, or three; lse in fp32, S_dmask empty without dropout."""
    q, k, v = (torch.stack(x).bfloat16() for x in zip(*sequences_of([(9, 5)] * 2), strict=True))
    out, lse, shown = flash2.flash_attn_func(q, k, v, return_attn_probs=True, backend="tiled")
    assert torch.equal(out, flash2.flash_attn_func(q, k, v, backend="tiled"))
    assert (out.shape, lse.shape, lse.dtype, shown.shape, shown.dtype) == (q.shape, (2, H, 9), torch.float32, (0,), q.dtype)
    out, lse, _ = flash2.flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends([9, 9]), ends([5, 5]),
                                                torch.tensor(9), torch.tensor(5), causal=True, return_attn_probs=True,
                                                backend="tiled")
    assert (out.shape, lse.shape) == ((18, H, D), (H, 18))
    assert (lse[:, :4] == torch.inf).all()
    assert (out[:4] == 0).all()


@pytest.mark.parametrize("lengths", [[(40, 150)] * 2, [(3, 9), (150, 20), (0, 2)]], ids=["dense", "packed"])
def test_s_dmask(lengths):
    """Probabilities, negative where dropped; padded with zeros to multiples of 128. The same bits as without asking."""
    asked = Asked("dropout", p=0.25)
    sequences = sequences_of(lengths)
    torch.manual_seed(0)
    arguments = dict(dropout_p=0.25, window_size=(30, 60), backend="tiled")
    if len({nq for nq, _ in lengths}) == 1:
        q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
        out, _, shown = flash2.flash_attn_func(q, k, v, **arguments, return_attn_probs=True)
        torch.manual_seed(0)
        assert torch.equal(out, flash2.flash_attn_func(q, k, v, **arguments))
    else:
        q, k, v = (torch.cat(x) for x in zip(*sequences, strict=True))
        where = [ends(n) for n in zip(*lengths, strict=True)], [max(n) for n in zip(*lengths, strict=True)]
        _, _, shown = flash2.flash_attn_varlen_func(q, k, v, *where[0], *where[1], **arguments, return_attn_probs=True)
    most = [-(-max(n) // 128) * 128 for n in zip(*lengths, strict=True)]
    assert shown.shape == (len(lengths), H, *most)
    for b, (q, k, _) in enumerate(sequences):
        nq, nk = lengths[b]
        seen, unit = visible(nq, nk, window=(30, 60)), torch.eye(nk)[:, None].expand(-1, H_KV, -1)
        weights, _ = standard(q.double(), k.double(), unit.double(), seen)
        keep = drawn(asked, b, nq, nk)
        weights = weights.transpose(0, 1)
        own = shown[b, :, :nq, :nk].double()
        torch.testing.assert_close(own, torch.where(keep, weights, -weights), rtol=1e-5, atol=1e-6)
        assert (shown[b, :, nq:] == 0).all()
        assert (shown[b, :, :, nk:] == 0).all()


def test_gradients_of_lse():
    """lse is differentiable, also where it is +inf for rows that see no key."""
    q, k, v = (torch.stack(x).requires_grad_() for x in zip(*sequences_of([(9, 5)] * 2), strict=True))
    _, lse, _ = flash2.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, backend="tiled")
    lse[..., 4:].sum().backward()
    assert q.grad.isfinite().all()
    assert (q.grad[:, :4] == 0).all()
    assert (q.grad[:, 4:] != 0).any()


def test_any_strides():
    """A last dimension that is not contiguous is copied, as flash-attn does."""
    q, k, v = (torch.stack(x) for x in zip(*sequences_of([(9, 5)] * 2), strict=True))
    strided = [x.mT.contiguous().mT for x in (q, k, v)]
    assert strided[0].stride(-1) != 1
    expected = flash2.flash_attn_func(q, k, v, causal=True, backend="tiled")
    assert torch.equal(flash2.flash_attn_func(*strided, causal=True, backend="tiled"), expected)


def test_dtypes_and_head_dims_beyond_flash_attn():
    q, k, v = (normal(1, *shape, dtype=torch.float64) for shape in ((4, 2, 300), (6, 1, 300), (6, 1, 20)))
    out, _ = standard(q[0], k[0], v[0], visible(4, 6))
    torch.testing.assert_close(flash2.flash_attn_func(q, k, v)[0], out)


def test_compiles():
    """No graph breaks in training functions."""
    q, k, v = (torch.stack(x).requires_grad_() for x in zip(*sequences_of([(9, 9)] * 2), strict=True))

    def call(q, k, v):
        return flash2.flash_attn_func(q, k, v, causal=True, window_size=(4, 0), softcap=3.0, backend="tiled")

    out, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q), torch.autograd.grad(expected.sum(), q))


X, CU = torch.zeros(2, 6, H, D), torch.tensor([0, 2, 6], dtype=torch.int32)
REFUSED = [
    (lambda: flash2.flash_attn_func(X, X[:, :, :4], X[:, :, :4]), ValueError, "k: expected a number of heads that divides"),
    (lambda: flash2.flash_attn_func(X, X, X, window_size=3), TypeError, r"window_size: expected \(left, right\)"),
    (lambda: flash2.flash_attn_func(X, X, X, window_size=(1.5, 0)), TypeError, r"window_size: expected .* got \(1.5, 0\)"),
    (lambda: flash2.flash_attn_func(X, X, X, softcap=-1.0), ValueError, "softcap: expected a number > 0, or 0 for none"),
    (lambda: flash2.flash_attn_func(X, X, X, dropout_p=1.0), ValueError, r"dropout_p: expected a number in \[0, 1\)"),
    (lambda: flash2.flash_attn_func(X, X, X, alibi_slopes=torch.ones(H - 1)), ValueError, "slopes: expected size 6"),
    (lambda: flash2.flash_attn_func(X, X, X, alibi_slopes=torch.ones(3, H)), ValueError, "slopes: expected size 2"),
    (lambda: flash2.flash_attn_func(X, X, X, attention_chunk=-2), ValueError, "attention_chunk: expected a number"),
    (lambda: flash2.flash_attn_func(X, X, X, block_size=3), TypeError, "block_size"),
    (lambda: flash2.flash_attn_func(X, X, X[:1]), ValueError, "v: expected q's batch size 2"),
    (lambda: flash2.flash_attn_func(X.int(), X.int(), X.int()), TypeError, "q: expected float16, bfloat16"),
    (lambda: flash2.flash_attn_func(X[0], X[0], X[0]), ValueError, "q: expected .batch, seqlen, heads, head_dim"),
    (lambda: flash2.flash_attn_qkvpacked_func(X), ValueError, r"qkv: expected \[B, S, 3, heads, head_dim\]"),
    (lambda: flash2.flash_attn_kvpacked_func(X, X[:, :, None]), ValueError, r"kv: expected \[B, S, 2, heads, head_dim\]"),
    (lambda: flash2.flash_attn_varlen_qkvpacked_func(X, CU, 4), ValueError, r"qkv: expected \[total, 3, heads"),
    (lambda: flash2.flash_attn_varlen_func(X[0], X[0], X[0], CU, CU, 3, 4), ValueError, "max_seqlen_q: expected at least"),
    (lambda: flash2.flash_attn_varlen_func(X[0], X[0], X[0], CU.float(), CU, 4, 4), TypeError, "cu_seqlens_q: expected"),
    (lambda: flash2.flash_attn_varlen_func(X[0], X[0], X[0], CU[:2], CU, 4, 4), ValueError, "cu_seqlens_k: expected as many"),
    (lambda: flash2.flash_attn_varlen_func(X[0], X, X, CU, CU, 4, 4, 0.1, block_table=CU[None, :1].expand(2, 1),
                                           return_attn_probs=True), NotImplementedError, "return_attn_probs: expected False"),
    (lambda: flash2.flash_attn_varlen_func(X[0].clone().requires_grad_(), X, X, CU, CU, 4, 4, block_table=CU[:2, None]),
     ValueError, "q: expected no gradient"),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_version():
    numbers, local = flash2.__version__.split("+")
    assert tuple(map(int, numbers.split("."))) >= (2, 8, 0)
    assert local == f"tilewise.{tw.__version__}"
