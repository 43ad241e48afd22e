"""Run me first: the basic behaviours, in seconds."""
import torch

import tilewise as tw


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_equals_softmax_of_the_scores():
    q, k, v = rand(1, 5, 2, 8), rand(1, 7, 2, 8), rand(1, 7, 2, 4)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    torch.testing.assert_close(tw.attention(q, k, v), expected)


def test_returns_the_log_sum_exp():
    q, k = rand(2, 5, 3, 8), rand(2, 7, 3, 8)
    _, lse = tw.attention(q, k, k, scale=1.0, return_lse=True)
    torch.testing.assert_close(lse, torch.einsum("bihd,bjhd->bhij", q, k).logsumexp(-1))


def test_causal_is_aligned_at_the_end():
    q, k = rand(1, 2, 1, 8), rand(1, 4, 1, 8)
    out = tw.attention(q, k, k, causal=True)
    torch.testing.assert_close(out[:, 0], tw.attention(q[:, :1], k[:, :3], k[:, :3])[:, 0])
    torch.testing.assert_close(out[:, 1], tw.attention(q[:, 1:], k, k)[:, 0])


def test_masks_combine():
    mask = tw.causal() & tw.window(1, None) | tw.prefix(torch.tensor([1]))
    assert mask.draw(4) == "■ · · ·\n■ ■ · ·\n■ ■ ■ ·\n■ · ■ ■"


def test_gradients_flow_to_every_input():
    q, k, v = rand(2, 6, 4, 8).requires_grad_(), rand(2, 6, 2, 8).requires_grad_(), rand(2, 6, 2, 8).requires_grad_()
    bias, sinks = rand(4, 6, 6).requires_grad_(), rand(4).requires_grad_()
    tw.attention(q, k, v, causal=True, bias=bias, sinks=sinks).square().sum().backward()
    for x in (q, k, v, bias, sinks):
        assert x.grad.abs().sum() > 0


def test_same_rng_same_dropout():
    q = rand(1, 40, 1, 8)
    a, b, c = (tw.attention(q, q, q, dropout_p=0.5, rng=tw.Rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_explain_says_what_runs():
    q = rand(1, 40, 1, 8)
    assert "backend       tiled" in str(tw.explain(q, q, q, backend="tiled"))
    assert "not triton: inputs are on cpu" in str(tw.explain(q, q, q))
