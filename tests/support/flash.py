"""Dense attention as flash-attn's own tests define it, in any precision, and the rule by which they judge.

    max|x - truth| <= m * max|standard - truth| + a      m = 2 for out and lse, 3 for gradients

truth: in fp64; standard: the same matrices in the inputs' dtype; a: their rounding floor, 4 eps max(1, max|truth|).
Indices are written down here once more, independent of the library: query i of S_q stands at p = i + S_k - S_q.
"""
import torch


def visible(nq, nk, causal=False, window=(None, None), chunk=0, mod=None):
    """Boolean [S_q, S_k], or with mod(h, i, j) [H, S_q, S_k]."""
    i, j = torch.arange(nq)[:, None], torch.arange(nk)
    p = i + nk - nq
    seen = (j <= p) if causal else torch.ones(nq, nk, dtype=torch.bool)
    left, right = window
    if left is not None:
        seen = seen & (j >= p - left)
    if right is not None:
        seen = seen & (j <= p + right)
    if chunk:
        seen = seen & (j // chunk == p.div(chunk, rounding_mode="floor"))
    return seen if mod is None else seen & mod(i, j)


def standard(q, k, v, seen, *, scale=None, softcap=0.0, slopes=None, mod=None, sink=None, keep=None, p=0.0):
    """(out [S_q, H, D_v], lse [H, S_q]) of one sequence q [S_q, H, D], k [S_k, H_kv, D], v; keep: boolean [H, S_q, S_k]."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    nq, nk = s.shape[1:]
    if slopes is not None:
        distance = (torch.arange(nq)[:, None] + nk - nq - torch.arange(nk)).abs()
        s = (s - slopes.to(wide)[:, None, None] * distance).to(dtype)
    if mod is not None:
        s = mod(s).to(dtype)
    s = torch.where(seen, s.to(wide), -torch.inf)
    columns = s if sink is None else torch.cat([s, sink.to(wide)[:, None, None].expand(-1, nq, 1)], -1)
    empty = (columns == -torch.inf).all(-1)
    safe = torch.where(empty[..., None], 0.0, columns)
    lse = torch.where(empty, -torch.inf, safe.logsumexp(-1)) if columns.shape[-1] else s.new_full((len(s), nq), -torch.inf)
    weights = torch.where(empty[..., None], 0.0, safe.softmax(-1))[..., :nk] if columns.shape[-1] else s
    if keep is not None:
        weights = torch.where(keep, weights, 0.0) / (1 - p)
    return torch.einsum("hqk,khd->qhd", weights.to(dtype), v), lse


def judge(name, x, truth, standard, m=2, eps=None):
    """Asserts the rule; infinities must agree."""
    x, standard = x.detach().double(), standard.detach().double()
    assert x.shape == truth.shape, (name, x.shape, truth.shape)
    finite = truth.isfinite()
    assert torch.equal(x[~finite], truth[~finite].double()), name
    if finite.any():
        error, allowed = ((a - truth)[finite].abs().max().item() for a in (x, standard))
        allowed = m * allowed + 4 * eps * max(1.0, truth[finite].abs().max().item())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
