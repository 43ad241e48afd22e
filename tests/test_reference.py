"""The specification itself, against one score at a time in plain Python."""
import math

import pytest
import torch

import tilewise as tw
from tilewise import rng as philox
from tilewise.bench.cases import CASES, draw


def one_by_one(call):
    """out and lse of a call, score by score, from the pinned meanings alone."""
    case, o = call.case, call.options
    q, k, v = (x.double() if case.layout == "bhsd" else x.double().transpose(1, 2) for x in (call.q, call.k, call.v))
    batch, heads, nq, _ = q.shape
    nk = k.shape[2]
    mask = o.get("mask", tw.full())
    mask = tw.masks.from_tensor(mask) if torch.is_tensor(mask) else mask
    visible = (mask & tw.causal() if o.get("causal") else mask).dense(batch, heads, nq, nk)
    scale = o["scale"] if "scale" in o else q.shape[3] ** -0.5
    p_drop = o.get("dropout_p", 0.0)
    bias = o["bias"].double().expand(batch, heads, nq, nk) if "bias" in o else None
    out, lse = torch.zeros(*q.shape[:3], v.shape[3]).double(), torch.full(q.shape[:3], -math.inf).double()
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for i in range(nq):
                scores = {j: scale * float(q[b, h, i] @ k[b, g, j]) for j in range(nk) if visible[b, h, i, j]}
                for j in scores:
                    for mod in as_list(o.get("score_mod")):
                        scores[j] = apply(mod, scores[j], o, b, h, i, j, nq, nk)
                    scores[j] += float(bias[b, h, i, j]) if bias is not None else 0.0
                terms = [*scores.values(), *([float(o["sinks"][h])] if "sinks" in o else [])]
                if not terms or max(terms) == -math.inf:
                    continue
                lse[b, h, i] = total = max(terms) + math.log(sum(math.exp(s - max(terms)) for s in terms))
                for j, s in scores.items():
                    weight = math.exp(s - total)
                    if p_drop:
                        t = philox.threshold(p_drop)
                        weight *= kept(o["rng"], t, b, h, heads, i, j) * 65536 / (65536 - t)
                    out[b, h, i] += weight * v[b, g, j]
    return out if case.layout == "bhsd" else out.transpose(1, 2), lse


def as_list(mods):
    return [] if mods is None else mods if isinstance(mods, list) else [mods]


def apply(mod, s, options, b, h, i, j, nq, nk):
    if mod.name.startswith("softcap"):
        cap = float(mod.name[8:-1])
        return cap * math.tanh(s / cap)
    slopes = mod.expr.args[1].args[0].args[0].value.tensor.double()  # alibi: s - load(slopes, ...) * |p - j|
    return s - float(slopes[h] if slopes.dim() == 1 else slopes[b, h]) * abs(i + nk - nq - j)


def kept(source, t, b, h, heads, i, j):
    as_tensor = torch.tensor
    return bool(philox.keep(source.tensor("cpu"), t, as_tensor(b), as_tensor(h), heads, as_tensor(i), as_tensor(j)))


SMALL = [c for c in CASES if c.name in (
    "causal more keys", "causal more queries", "window", "prefix lm", "documents", "chunked", "not window", "softcap", "alibi",
    "alibi per sequence", "bias with -inf", "sinks rows without keys", "dropout", "one key head", "scale negative",
    "values wider", "no keys", "everything")]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_pinned_meaning(case):
    call = draw(case, torch.float64)
    out, lse = call.run(call.differentiable, "reference")
    expected_out, expected_lse = one_by_one(call)
    torch.testing.assert_close(out, expected_out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)


def test_equals_torch():
    q, k, v = (torch.randn(2, 4, 33, 16, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(33, 33, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    out = tw.attention(q, k, v, bias=bias, layout="bhsd", backend="reference")
    torch.testing.assert_close(out, expected)
