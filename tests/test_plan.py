"""What explain promises about work and memory."""

import torch

import tilewise as tw


def test_work_of_full_and_causal_attention():
    q, k = torch.empty(2, 1024, 8, 64), torch.empty(2, 1024, 2, 64)
    full, causal = tw.explain(q, k, k, backend="tiled"), tw.explain(q, k, k, causal=True, backend="tiled")
    assert full.flops[0] == 4 * 2 * 8 * 1024**2 * 64
    assert full.visited == full.full == full.tiles_in_all
    n = 1024 // full.tiles[0]
    assert causal.visited == 2 * 8 * n * (n + 1) // 2
    assert causal.full == 2 * 8 * n * (n - 1) // 2
    assert causal.flops[0] == full.flops[0] * (n + 1) // (2 * n)
    assert full.standard_workspace == 2 * 2 * 8 * 1024**2 * 4


def test_workspace_is_linear_and_standard_attention_quadratic():
    plans = [tw.explain(*[torch.empty(1, n, 4, 64)] * 3, backend="tiled") for n in (2**14, 2**15)]
    assert plans[1].workspace[1] < 2.1 * plans[0].workspace[1]
    assert plans[1].standard_workspace == 4 * plans[0].standard_workspace


def test_masks_per_sequence_are_counted():
    q = torch.empty(2, 512, 1, 64)
    plan = tw.explain(q, q, q, mask=tw.key_lengths(torch.tensor([512, 0])), backend="tiled")
    assert plan.visited == plan.tiles_in_all // 2


def test_reference_is_one_tile():
    q = torch.empty(1, 40, 1, 8)
    plan = tw.explain(q, q, q, causal=True, backend="reference")
    assert (plan.tiles, plan.visited) == ((40, 40), 1)


def test_explain_says_why_not_the_others():
    q = torch.empty(1, 40, 1, 8, dtype=torch.float64)
    text = str(tw.explain(q, q, q))
    assert "backend       tiled" in text
    assert "not triton: " in text
