"""flash-attn's third and fourth generations against dense attention: dense and packed functions, and what they add."""
from typing import Any, NamedTuple

import pytest
import torch
from support.backends import AVAILABLE
from support.flash import (
    SINKS,
    TABLE,
    Asked,
    H,
    check,
    dense,
    ends,
    judge,
    normal,
    own_slopes,
    packed,
    sequences_of,
    signature,
    standard,
    visible,
)

import tilewise as tw
from tilewise.compat import flash_attn_cute as flash4
from tilewise.compat import flash_attn_interface as flash3

pytestmark = [pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs"),
              pytest.mark.usefixtures("one_thread", "poisoned", "small_tiles")]
LENGTHS = ((21, 33), (33, 21), (5, 0), (0, 4), (1, 7))
FLOAT, HALF = torch.float32, torch.bfloat16


def three(function):
    """As the second generation's, with a third result."""
    return lambda *a, **named: (*function(*a, **named), None)


def four(function):
    def call(*a, return_attn_probs, **named):
        window = named.pop("window_size", None)
        if window is not None:
            named["window_size"] = tuple(None if side == -1 else side for side in window)
        if len(a) > 3:
            q, k, v, *rest = a
            return (*function(q, k, v, None, *rest, **named, return_lse=True), None)
        return (*function(*a, **named, return_lse=True), None)
    return call


@pytest.mark.parametrize("asked", TABLE, ids=str)
@pytest.mark.parametrize("module, adapted", [(flash3, three), (flash4, four)], ids=["third", "fourth"])
def test_every_argument(module, adapted, asked):
    every_argument(module, adapted, asked, "tiled")


def every_argument(module, adapted, asked, backend):
    """Those of all generations work in each."""
    arguments = own_slopes(asked, len(LENGTHS)) | dict(backend=backend)
    form = packed(adapted(module.flash_attn_varlen_func))
    check(asked, sequences_of(LENGTHS), lambda s: form(s, arguments), FLOAT, -torch.inf)
    if asked.name in ("plain", "everything", "window and causal"):
        arguments = own_slopes(asked, 2) | dict(backend=backend)
        for lengths in ((21, 33), (33, 21)):
            check(asked, sequences_of([lengths] * 2), lambda s: dense(adapted(module.flash_attn_func))(s, arguments), FLOAT,
                  -torch.inf)


def test_no_keys_at_all():
    """The third generation's lse is then +inf, otherwise, and the fourth's always, -inf."""
    q, k = normal(2, 3, H, 8), normal(2, 0, H, 8)
    assert (flash3.flash_attn_func(q, k, k, return_attn_probs=True, backend="tiled")[1] == torch.inf).all()
    assert (flash4.flash_attn_func(q, k, k, return_lse=True, backend="tiled")[1] == -torch.inf).all()


def test_qkv_of_grouped_heads():
    q, k, v = (torch.stack(x) for x in zip(*sequences_of([(9, 9)] * 2), strict=True))
    expected = flash3.flash_attn_func(q, k, v, causal=True, backend="tiled")
    found = flash3.flash_attn_qkvpacked_func(torch.cat([q, k, v], 2), causal=True, num_heads_q=H, backend="tiled")
    assert torch.equal(found, expected)
    many = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    found, lse = flash3.flash_attn_qkvpacked_func(torch.stack([q, *many], 2), causal=True, return_attn_probs=True,
                                                  backend="tiled")
    torch.testing.assert_close(found, expected)
    assert lse.shape == (2, H, 9)


@pytest.mark.parametrize("kv_heads, dim, dim_v", [(3, 8, 6), (1, 64, 512)])
@pytest.mark.parametrize("module", [flash3, flash4], ids=["third", "fourth"])
def test_qv(module, kv_heads, dim, dim_v):
    """q k^T + qv v^T, with its gradients, dense and packed."""
    q, qv = normal(1, 5, H, dim), normal(1, 5, H, dim_v, seed=1)
    k, v = normal(1, 9, kv_heads, dim, seed=2), normal(1, 9, kv_heads, dim_v, seed=3)
    last = [x.double().requires_grad_() for x in (q, qv, k, v)]
    truth, truth_lse = standard(torch.cat(last[:2], -1)[0], torch.cat(last[2:], -1)[0], last[3][0], visible(5, 9, causal=True))
    ours = [x.clone().requires_grad_() for x in (q, qv, k, v)]
    options = dict(qv=ours[1], causal=True, backend="tiled")
    again = dict(options, qv=ours[1][0])
    if module is flash3:
        out, lse = module.flash_attn_func(ours[0], *ours[2:], **options, return_attn_probs=True)
        flat = module.flash_attn_varlen_func(ours[0][0], ours[2][0], ours[3][0], ends([5]), ends([9]), 5, 9, **again)
    else:
        out, lse = module.flash_attn_func(ours[0], *ours[2:], **options)
        flat, _ = module.flash_attn_varlen_func(ours[0][0], ours[2][0], ours[3][0], cu_seqlens_q=ends([5]),
                                                cu_seqlens_k=ends([9]), **again)
        lse = lse.mT                                    # [B, S_q, H] with qv
    torch.testing.assert_close(out[0].double(), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse[0].double(), truth_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flat, out[0])
    for found, expected in zip(torch.autograd.grad(out.square().sum(), ours), torch.autograd.grad(truth.square().sum(), last),
                               strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_values_that_are_keys():
    """The fourth generation's q and k None: scores of qv and v alone."""
    qv, v = normal(2, 5, H, 16), normal(2, 9, 1, 16, seed=1)
    out, lse = flash4.flash_attn_func(None, None, v, qv, causal=True, return_lse=True, backend="tiled")
    expected, expected_lse = tw.attention(qv, v, v, causal=True, return_lse=True, backend="tiled")
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse.mT)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_fp8(form):
    q, k, v = (normal(2, n, heads, 16, seed=n).to(torch.float8_e4m3fn) for n, heads in ((7, 4), (9, 2), (9, 2)))
    scales = [torch.rand(2, 2, generator=torch.Generator().manual_seed(s)) + 0.5 for s in range(3)]
    named = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True)) | dict(backend="tiled")
    if form == "dense":
        out, lse = flash3.flash_attn_func(q, k, v, causal=True, **named, return_attn_probs=True)
    else:
        out, lse = flash3.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), ends([7, 7]), ends([9, 9]), 7, 9,
                                                 causal=True, **named, return_attn_probs=True)
        out, lse = out.unflatten(0, (2, 7)), lse.unflatten(1, (2, 7)).transpose(0, 1)
    assert out.dtype == HALF
    for b in range(2):
        wide = [x[b].bfloat16().double() * scale[b].double().repeat_interleave(x.shape[2] // 2)[:, None]
                for x, scale in zip((q, k, v), scales, strict=True)]
        truth, plain = (standard(*(x.to(dtype) for x in wide), visible(7, 9, causal=True)) for dtype in (torch.float64, HALF))
        for name, x, t, p in zip(("out", "lse"), (out[b], lse[b]), truth, plain, strict=True):
            judge(name, x, t, p, eps=torch.finfo(HALF).eps)


def test_rows_in_use():
    """seqused of dense and of packed tensors; rows beyond them may hold anything."""
    sequences = sequences_of([(6, 9), (6, 9)])
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    used_q, used_k = torch.tensor([4, 0], dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32)
    k[0, 5:], v[0, 5:], q[0, 4:] = torch.nan, torch.nan, torch.nan
    expected, expected_lse = standard(q[0, :4], k[0, :5], v[0, :5], visible(4, 5, causal=True))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    found = [flash3.flash_attn_varlen_func(*flat, ends([6, 6]), ends([9, 9]), 6, 9, used_q, used_k, causal=True,
                                           return_attn_probs=True)]
    out, lse = flash4.flash_attn_varlen_func(q, k, v, seqused_q=used_q, seqused_k=used_k, causal=True, return_lse=True)
    assert (out.shape, lse.shape) == (q.shape, (2, H, 6))
    found.append((out.flatten(0, 1), lse.transpose(0, 1).flatten(1)))
    mixed, mixed_lse = flash4.flash_attn_varlen_func(flat[0], k, v, cu_seqlens_q=ends([6, 6]), max_seqlen_q=6, seqused_q=used_q,
                                                     seqused_k=used_k, causal=True, return_lse=True)
    found.append((mixed, mixed_lse))
    for out, lse in found:
        torch.testing.assert_close(out[:4], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, :4], expected_lse, rtol=1e-5, atol=1e-5)
        assert (out[4:] == 0).all()
        assert (lse[:, 4:] == -torch.inf).all()


@pytest.mark.parametrize("window", [(3, -1), (-2, 6), (None, -3), (-1, None), (-1, -1), (None, None), (4, None)], ids=str)
def test_signed_windows(window):
    """Of the fourth generation: a negative bound leaves the query's own neighbourhood out; (-1, -1) is no window."""
    asked = Asked("", seen=dict(window=(None, None) if window == (-1, -1) else window))

    def function(q, k, v, return_attn_probs):
        return *flash4.flash_attn_func(q, k, v, window_size=window, return_lse=True, backend="tiled"), None

    for lengths in ((21, 33), (33, 21)):
        check(asked, sequences_of([lengths] * 2), lambda s: dense(function)(s, {}), FLOAT, -torch.inf)


def test_lse_when_wanted():
    q, k, v = (torch.stack(x) for x in zip(*sequences_of([(9, 9)] * 2), strict=True))
    assert flash4.flash_attn_func(q, k, v, backend="tiled")[1] is None
    assert flash4.flash_attn_func(q.requires_grad_(), k, v, backend="tiled")[1].shape == (2, H, 9)


# ---- functions of the user ----------------------------------------------------------------------------------------------

def levels(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score + aux_tensors[0][h, (q_idx - kv_idx).abs()] * 0.5


def scaled(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars):
    return score * aux_scalars[0]


def parity(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    """Aligned bottom-right by hand, as the fourth generation's examples are."""
    return (kv_idx <= q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q) & ((kv_idx + h) % 2 == 0)


def per_head(i, j, nq, nk):
    return torch.stack([(j <= i + nk - nq) & ((j + h) % 2 == 0) for h in range(H)])


@pytest.mark.parametrize("form", ["dense", "packed", "pages"])
def test_score_and_mask_functions(form):
    lengths = [(21, 33)] * 2 if form == "dense" else [(21, 33), (5, 9)]
    sequences, table = sequences_of(lengths), normal(H, 40, seed=3)
    options = dict(score_mod=levels, mask_mod=parity, aux_tensors=[table], softcap=4.0, return_lse=True, backend="tiled")
    if form == "dense":
        q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
        found = list(zip(*flash4.flash_attn_func(q, k, v, **options), strict=True))
    else:
        q, k, v = (torch.cat(x) for x in zip(*sequences, strict=True))
        where: dict[str, Any] = dict(cu_seqlens_q=ends([21, 5]), max_seqlen_q=21)
        if form == "packed":
            where |= dict(cu_seqlens_k=ends([33, 9]), max_seqlen_k=33)
        else:
            rows = torch.cat([torch.arange(33), torch.full((7,), 41), torch.arange(33, 42), torch.full((1,), 41)])
            where |= dict(page_table=torch.tensor([[0, 1, 2, 3], [4, -1, -1, -1]], dtype=torch.int32),
                          seqused_k=torch.tensor([33, 9], dtype=torch.int32))
            k, v = (x[rows].view(5, 10, *x.shape[1:]) for x in (k, v))
        out, lse = flash4.flash_attn_varlen_func(q, k, v, **where, **options)
        found = list(zip(out.split([21, 5]), lse.split([21, 5], 1), strict=True))
    for (out, lse), (q, k, v), (nq, nk) in zip(found, sequences, lengths, strict=True):
        distance = (torch.arange(nq)[:, None] - torch.arange(nk)).abs()
        seen = visible(nq, nk, mod=lambda i, j, nq=nq, nk=nk: per_head(i, j, nq, nk))
        truth, plain = (standard(*(x.to(dtype) for x in (q, k, v)), seen, softcap=4.0,
                                 mod=lambda s, d=distance: s + table[:, d].to(s.dtype) * 0.5)
                        for dtype in (torch.float64, FLOAT))
        for name, x, t, p in zip(("out", "lse"), (out, lse), truth, plain, strict=True):
            judge(name, x, t, p, eps=torch.finfo(FLOAT).eps)


def test_gradients_of_aux_tensors_and_sinks():
    """No score_mod_bwd is written; tables and sinks learn."""
    q, k, v = (torch.stack(x) for x in zip(*sequences_of([(21, 33)] * 2), strict=True))
    table, sinks = normal(H, 40, seed=3).requires_grad_(), SINKS.clone().requires_grad_()
    out, _ = flash4.flash_attn_func(q, k, v, score_mod=levels, aux_tensors=[table], learnable_sink=sinks, backend="tiled")
    found = torch.autograd.grad(out.square().sum(), (table, sinks))
    wide = [x.detach().double().requires_grad_() for x in (table, sinks)]
    distance = (torch.arange(21)[:, None] - torch.arange(33)).abs()
    loss = sum(standard(q[b].double(), k[b].double(), v[b].double(), visible(21, 33), sink=wide[1],
                        mod=lambda s: s + wide[0][:, distance] * 0.5)[0].square().sum() for b in range(2))
    for x, expected in zip(found, torch.autograd.grad(loss, wide), strict=True):
        torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-5)
    out, _ = flash4.flash_attn_func(q, k, v, score_mod=scaled, aux_scalars=(0.5,), backend="tiled")
    torch.testing.assert_close(out, flash4.flash_attn_func(q, k, v, softmax_scale=8 ** -0.5 / 2, backend="tiled")[0])


def test_masks_and_score_functions_of_tilewise():
    """In the place of functions, and with causal at once: what both show."""
    q, k, v = (torch.stack(x) for x in zip(*sequences_of([(21, 33)] * 2), strict=True))
    out, _ = flash4.flash_attn_func(q, k, v, causal=True, mask_mod=tw.prefix(torch.tensor([9, 33])), score_mod=tw.softcap(2.0),
                                    backend="tiled")
    for b, n in enumerate((9, 33)):
        seen = visible(21, 33, causal=True) & (torch.arange(33) < n)
        torch.testing.assert_close(out[b], standard(q[b], k[b], v[b], seen, softcap=2.0)[0], rtol=1e-5, atol=1e-5)


class Lists(NamedTuple):
    """The fields of BlockSparseTensorsTorch that are read."""
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    block_size: tuple[int, int] | None = (16, 16)


def test_lists_of_blocks():
    q, k, v = (torch.stack(x) for x in zip(*sequences_of([(32, 48)] * 2), strict=True))
    lists = Lists(torch.tensor([[[2, 1]]], dtype=torch.int32), torch.tensor([[[[0, 1, 7], [2, 7, 7]]]]),
                  torch.tensor([[[1, 0]]], dtype=torch.int32), torch.tensor([[[[2, 7, 7], [7, 7, 7]]]]))
    partial = torch.zeros(2, 3, dtype=torch.bool)
    partial[0, :2] = partial[1, 2] = True
    full = torch.zeros_like(partial)
    full[0, 2] = True
    whole, part = (x.repeat_interleave(16, 0).repeat_interleave(16, 1) for x in (full, partial))
    for mod, seen in ((None, whole | part), (parity, whole | (part & per_head(*torch.meshgrid(
            torch.arange(32), torch.arange(48), indexing="ij"), 32, 48)))):
        out, _ = flash4.flash_attn_func(q, k, v, mask_mod=mod, block_sparse_tensors=lists, backend="tiled")
        for b in range(2):
            torch.testing.assert_close(out[b], standard(q[b], k[b], v[b], seen)[0], rtol=1e-5, atol=1e-5)
    kept = lists._replace(full_block_cnt=None, full_block_idx=None)
    out, _ = flash4.flash_attn_func(q, k, v, block_sparse_tensors=kept, backend="tiled")
    torch.testing.assert_close(out[0], standard(q[0], k[0], v[0], part)[0], rtol=1e-5, atol=1e-5)


# ---- the rest -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [flash3, flash4], ids=["third", "fourth"])
@pytest.mark.parametrize("shape", [(2, 5, H), (11, H)], ids=["dense", "packed"])
def test_combine(module, shape):
    out, lse = normal(3, *shape, 8), normal(3, *shape, seed=1)
    lse[0, 0] = lse[:, 1] = -torch.inf
    out[0, 0] = out[:, 1] = 0.0
    weights = torch.where(lse == -torch.inf, 0.0, (lse - lse.amax(0).nan_to_num(neginf=0)).exp())
    expected = (out * weights[..., None]).sum(0) / weights.sum(0).clamp(min=1e-9)[..., None]
    found, total = module.flash_attn_combine(out, lse)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(total, lse.logsumexp(0))
    given = torch.empty(found.shape, dtype=HALF)
    returned, _ = module.flash_attn_combine(out, lse, given)
    assert returned is given
    torch.testing.assert_close(given, expected.bfloat16())
    assert module.flash_attn_combine(out, lse, out_dtype=torch.float16)[0].dtype == torch.float16


def test_metadata_of_schedulers():
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    found = flash3.get_scheduler_metadata(2, 1, 4, H, 3, 8, lengths)
    assert (found.dtype, found.shape) == (torch.int32, (0,))
    k = normal(2, 4, 3, 8)
    flash3.flash_attn_with_kvcache(normal(2, 1, H, 8), k, k.clone(), cache_seqlens=lengths, scheduler_metadata=found)
    assert flash4.get_scheduler_metadata(1, 4, H, 3, 8, 1) is None


# Read from hopper/flash_attn_interface.py and flash_attn/cute/interface.py: names and defaults, in order.
FP8 = "q_descale=None, k_descale=None, v_descale=None, "
LATER = (f"softmax_scale=None, causal=False, qv=None, {FP8}window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
         "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False")
PACKED = "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
MODS = "softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
SHOWN = "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, "
SIGNATURES = [
    (flash3, "flash_attn_func", f"q, k, v, {LATER}"),
    (flash3, "flash_attn_qkvpacked_func", f"qkv, softmax_scale=None, causal=False, {FP8}window_size=(-1, -1), "
     "attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False"),
    (flash3, "flash_attn_varlen_func", f"{PACKED}seqused_q=None, seqused_k=None, {LATER}"),
    (flash3, "flash_attn_with_kvcache", "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
     "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
     f"max_seqlen_q=None, rotary_seqlens=None, {FP8}softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, "
     "softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
     "return_softmax_lse=False"),
    (flash3, "flash_attn_combine", "out_partial, lse_partial, out=None, out_dtype=None"),
    (flash3, "get_scheduler_metadata", "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
     "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, "
     "page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, "
     "num_splits=0, pack_gqa=None, sm_margin=0"),
    (flash4, "flash_attn_func", f"q, k, v, qv=None, gather_kv_indices=None, {SHOWN}{MODS}aux_tensors=None, aux_scalars=None, "
     "block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False"),
    (flash4, "flash_attn_varlen_func", "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
     "max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
     f"{SHOWN}{MODS}block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, "
     "seqlen_k_per_split=None, disable_scheduler_metadata=False"),
    (flash4, "flash_attn_combine", "out_partial, lse_partial, out=None, out_dtype=None, cu_seqlens=None, seqused=None, "
     "virtual_batch_idx=None, return_lse=True"),
]


@pytest.mark.parametrize("module, name, expected", SIGNATURES, ids=lambda x: x if isinstance(x, str) and len(x) < 40 else "")
def test_signatures(module, name, expected):
    assert signature(getattr(module, name)) == expected
    assert name in module.__all__


X, CU = torch.zeros(2, 6, H, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
BLOCKS = Lists(CU[None, None], CU[None, None, None], block_size=None)
REFUSED = [
    (lambda: flash3.flash_attn_func(X, X, X, num_splits=300), ValueError, "num_splits: expected a number from 1 to 256"),
    (lambda: flash3.flash_attn_func(X, X, X, qv=X[..., :5]), ValueError, r"qv: expected \[2, 6, 6, 8\], got \[2, 6, 6, 5\]"),
    (lambda: flash3.flash_attn_func(X, X, X.repeat(1, 1, 1, 64), qv=X.repeat(1, 1, 1, 64)), ValueError,
     "qv: expected head dims of q and qv of at most 512 together"),
    (lambda: flash3.flash_attn_func(*[X.to(torch.float8_e4m3fn)] * 3, qv=X), NotImplementedError, "qv: expected None"),
    (lambda: flash3.flash_attn_func(X, X, X, v_descale=CU), ValueError, "v_descale: expected None: only float8_e4m3fn"),
    (lambda: flash3.flash_attn_func(*[X.to(torch.float8_e4m3fn)] * 3, k_descale=X[0, 0]), ValueError, "k_descale: exp"),
    (lambda: flash3.flash_attn_qkvpacked_func(X), ValueError, "qkv: expected .* with num_heads_q=None"),
    (lambda: flash3.flash_attn_combine(X[..., None], X[..., 0]), ValueError, "lse_partial: expected at least one part"),
    (lambda: flash4.flash_attn_func(X, X, X, score_mod=levels, score_mod_bwd=levels), ValueError, "score_mod_bwd: expected"),
    (lambda: flash4.flash_attn_func(X, X, X, gather_kv_indices=CU), NotImplementedError, "gather_kv_indices: expected None"),
    (lambda: flash4.flash_attn_func(X, X, X, aux_tensors=[CU]), ValueError, "aux_tensors, aux_scalars: expected None without"),
    (lambda: flash4.flash_attn_func(X, X, X, window_size=(5, -10)), ValueError, "window_size: expected left . right >= 0"),
    (lambda: flash4.flash_attn_func(X, X, X, block_sparse_tensors=BLOCKS), ValueError, "block_sparse_tensors: exp"),
    (lambda: flash4.flash_attn_func(None, X, X), ValueError, "q: expected a tensor, or q and k None with qv"),
    (lambda: flash4.flash_attn_func(X, X, X, qv=X), NotImplementedError, "qv: expected k and v to be two tensors"),
    (lambda: flash4.flash_attn_func(X, X, X, learnable_sink=torch.ones(3)), ValueError, r"sinks: expected"),
    (lambda: flash4.flash_attn_varlen_func(X[0], X[0], X[0], cu_seqlens_k=CU), ValueError, "cu_seqlens: expected int32"),
    (lambda: flash4.flash_attn_varlen_func(X, X, X, block_sparse_tensors=BLOCKS), NotImplementedError, "block_sparse_tensors"),
    (lambda: flash4.flash_attn_varlen_func(X, X, X, page_table=CU[None, :1].expand(2, 1), seqused_q=CU[:2]), ValueError,
     "seqused_q: expected None with page_table"),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
