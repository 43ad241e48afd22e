"""Dense attention as flash-attn's own tests define it, in any precision, and the rule by which they judge.

    max|x - truth| <= m * max|standard - truth| + a      m = 2 for out and lse, 3 for gradients

truth: in fp64; standard: the same matrices in the inputs' dtype; a: their rounding floor, 4 eps max(1, max|truth|).
Indices are written down here once more, independent of the library: query i of S_q stands at p = i + S_k - S_q.
"""
import inspect

import torch

from tilewise import rng


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


# ---- a table of calls ---------------------------------------------------------------------------------------------------

H, H_KV, D = 6, 3, 8


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Asked:
    """One row of the table: arguments as a program gives them, and what they mean to `support.flash`."""

    def __init__(self, name, means=None, *, seen=None, p=0.0, cpu=False, **arguments):
        self.name, self.arguments, self.means, self.seen, self.p, self.cpu = name, arguments, means or {}, seen or {}, p, cpu

    def __repr__(self):
        return self.name


HEAD_SLOPES, ROW_SLOPES = normal(H, seed=5), normal(8, H, seed=6)
SINKS = normal(H, seed=7)
TABLE = [
    Asked("plain"),
    Asked("scale", dict(scale=0.9), softmax_scale=0.9),
    Asked("causal", seen=dict(causal=True), causal=True),
    Asked("window", seen=dict(window=(5, 3)), window_size=(5, 3), cpu=True),
    Asked("window of tensors", seen=dict(window=(4, 0)), window_size=(torch.tensor(4), torch.tensor(0))),
    Asked("window and causal", seen=dict(window=(6, 0)), causal=True, window_size=(6, 9)),
    Asked("no window but causal", seen=dict(causal=True), causal=True, window_size=(-1, -1)),
    Asked("left", seen=dict(window=(7, None)), window_size=(7, -1)),
    Asked("right", seen=dict(window=(None, 2)), window_size=(-1, 2)),
    Asked("window longer than the keys", seen=dict(window=(40, 25)), window_size=(40, 25)),
    Asked("window longer than everything", seen=dict(window=(99, 99)), window_size=(99, 99)),
    Asked("softcap", dict(softcap=2.0), softcap=2.0),
    Asked("slopes", dict(slopes=HEAD_SLOPES), seen=dict(causal=True), alibi_slopes=HEAD_SLOPES, causal=True),
    Asked("slopes of each sequence", dict(slopes=ROW_SLOPES), alibi_slopes=ROW_SLOPES),
    Asked("deterministic", seen=dict(causal=True), causal=True, deterministic=True),
    Asked("dropout", dropout_p=0.3, p=0.3),
    Asked("chunks", seen=dict(chunk=8), attention_chunk=8),
    Asked("sinks", dict(sink=SINKS), learnable_sink=SINKS),
    Asked("everything", dict(scale=0.5, softcap=3.0, slopes=ROW_SLOPES, sink=SINKS), dropout_p=0.17, p=0.17, cpu=True,
          seen=dict(window=(12, 1), chunk=16), softmax_scale=0.5, softcap=3.0, alibi_slopes=ROW_SLOPES, learnable_sink=SINKS,
          window_size=(12, 1), attention_chunk=16, deterministic=True),
]


def own_slopes(asked, batch):
    """The arguments, slopes per sequence cut to the batch."""
    slopes = asked.arguments.get("alibi_slopes")
    return asked.arguments | ({} if slopes is None or slopes.dim() == 1 else {"alibi_slopes": slopes[:batch]})


def drawn(asked, b, nq, nk, heads=H, first=0, device="cpu"):
    """What a call on a device keeps after torch.manual_seed(0), of sequence b, rows counted from `first`: [heads, nq, nk]."""
    if not asked.p:
        return None
    torch.manual_seed(0)
    bits = rng.draw(torch.device(device)).cpu()
    head, row, column = torch.meshgrid(torch.arange(heads), torch.arange(nq) + first, torch.arange(nk), indexing="ij")
    return rng.keep(bits, rng.threshold(asked.p), torch.tensor(b), head, heads, row, column)


def expected(asked, sequences, dtype, device):
    """(out, lse) of each sequence (q, k, v)."""
    found = []
    for b, (q, k, v) in enumerate(sequences):
        nq, nk = len(q), len(k)
        means = dict(asked.means)
        if means.get("slopes") is not None and means["slopes"].dim() == 2:
            means["slopes"] = means["slopes"][b]
        t = round(asked.p * 65536)
        found.append(standard(q.to(dtype), k.to(dtype), v.to(dtype), visible(nq, nk, **asked.seen), p=t / 65536,
                              keep=drawn(asked, b, nq, nk, device=device), **means))
    return found


def run(sequences, calculate, dtype):
    """out, lse and the gradients of all tensors of the sequences, from fresh leaves, one row after another."""
    leaves = [[x.detach().to(dtype).requires_grad_() for x in sequence] for sequence in sequences]
    found = calculate(leaves)
    out, lse = torch.cat([o for o, _ in found]), torch.cat([x.mT for _, x in found])
    loss = (out * normal(*out.shape, seed=8).bfloat16().to(out.dtype)).sum()
    loss = loss + (torch.where(lse.isinf(), 0.0, lse) * normal(*lse.shape, seed=9)).sum()
    gradients = torch.autograd.grad(loss, [x for sequence in leaves for x in sequence])
    names = [f"d{name}{b}" for b in range(len(sequences)) for name in "qkv"]
    return {"out": out, "lse": lse, **dict(zip(names, gradients, strict=True))}


def check(asked, sequences, ours, dtype, empty=torch.inf, device="cpu"):
    """ours(sequences) -> [(out, lse)], on the CPU, computed on a device, against dense attention."""
    torch.manual_seed(0)
    found = run(sequences, ours, dtype)
    truth, plain = (run(sequences, lambda s, kind=kind: expected(asked, s, kind, device), kind)
                    for kind in (torch.float64, dtype))
    for results in (truth, plain):
        if asked.means.get("sink") is None:
            results["lse"] = torch.where(results["lse"] == -torch.inf, empty, results["lse"])
    for name, x in found.items():
        kind = torch.float32 if name == "lse" else dtype
        judge(name, x, truth[name], plain[name], 3 if name[0] == "d" else 2, torch.finfo(kind).eps)


# ---- the functions: from sequences to what they take, and back --------------------------------------------------------

def dense(function):
    def call(sequences, arguments):
        q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
        out, lse, _ = function(q, k, v, **arguments, return_attn_probs=True)
        return list(zip(out, lse, strict=True))
    return call


def ends(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def packed(function):
    def call(sequences, arguments):
        q, k, v = (torch.cat(x) for x in zip(*sequences, strict=True))
        of_q, of_k = ([len(s[n]) for s in sequences] for n in (0, 1))
        out, lse, _ = function(q, k, v, ends(of_q), ends(of_k), max(of_q), max(of_k), **arguments, return_attn_probs=True)
        return list(zip(out.split(of_q), lse.split(of_q, 1), strict=True))
    return call


def sequences_of(lengths, heads_kv=H_KV, dim_v=D):
    return [(normal(nq, H, D, seed=b), normal(nk, heads_kv, D, seed=50 + b), normal(nk, heads_kv, dim_v, seed=90 + b))
            for b, (nq, nk) in enumerate(lengths)]


def signature(function):
    """Names and defaults in order, without what is more."""
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}"
                     for p in inspect.signature(function).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD)
