"""NaN and infinities: a row that sees one becomes non-finite; a row that shares no tile with it stays as it was."""
import pytest
import torch
from support.backends import AVAILABLE, DEVICE

import tilewise as tw


def inputs():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 96, 1, 16, generator=g).to(DEVICE) for _ in range(3)]


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_sees_a_non_finite_input(which, value, backend, small_tiles):
    q, k, v = inputs()
    clean = tw.attention(q, k, v, causal=True, backend=backend)
    {"q": q, "k": k, "v": v}[which][0, 70, 0] = value
    out = tw.attention(q, k, v, causal=True, backend=backend)
    sees = slice(70, 71) if which == "q" else slice(70, 96)
    assert (~out[0, sees].isfinite()).any(-1).all()
    if backend != "reference":  # whose one tile is the whole matrix
        rows = tw.explain(q, k, v, causal=True, backend=backend).tiles[0]
        earlier = 70 // rows * rows     # rows of earlier tiles
        assert torch.equal(out[0, :earlier], clean[0, :earlier])


@pytest.mark.parametrize("backend", AVAILABLE)
def test_hidden_infinities_do_not_count(backend, small_tiles):
    """A score of +-inf behind the mask is selected away, not multiplied by zero."""
    q, k, v = inputs()
    bias = torch.zeros(96, 96, device=DEVICE)
    bias[:, 50] = torch.inf
    hidden = torch.ones(96, 96, dtype=torch.bool, device=DEVICE)
    hidden[:, 50] = False
    out = tw.attention(q, k, v, bias=bias, mask=hidden, backend=backend)
    assert torch.equal(out, tw.attention(q, k, v, mask=hidden, bias=torch.zeros_like(bias), backend=backend))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_large_scores_do_not_overflow(backend, small_tiles):
    q, k, v = inputs()
    out, lse = tw.attention(1e4 * q, 1e4 * k, v, causal=True, return_lse=True, backend=backend)
    assert out.isfinite().all()
    assert lse.isfinite().all()


PADDED = {
    "key lengths": lambda: (tw.key_lengths(torch.tensor([50], device=DEVICE)), slice(0, 96), slice(0, 50)),
    "causal key lengths": lambda: (tw.causal() & tw.key_lengths(torch.tensor([50], device=DEVICE)), slice(0, 96), slice(0, 50)),
    "documents": lambda: (tw.documents(torch.tensor([-1] * 9 + [0] * 30 + [1] * 20 + [-1] * 37, device=DEVICE)),
                          slice(9, 59), slice(9, 59)),
}


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("score_mod", [None, tw.softcap(3.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", PADDED)
def test_padding_never_contributes(name, score_mod, backend, small_tiles):
    """Keys that no query may see and queries that see no key may hold anything, forward and backward."""
    mask, rows, cols = PADDED[name]()
    results = []
    for filler in (0.0, torch.nan):
        q, k, v = inputs()
        dout = torch.randn(1, 96, 1, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for x, seen in ((q, rows), (k, cols), (v, cols), (dout, rows)):
            kept = x[:, seen].clone()
            x.fill_(filler)[:, seen] = kept
        tensors = [x.requires_grad_() for x in (q, k, v)]
        out = tw.attention(*tensors, mask=mask, score_mod=score_mod, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, dout)])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
