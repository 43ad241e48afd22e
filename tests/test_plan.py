"""What explain promises about work and memory."""

import pytest
import torch

import tilewise as tw
from tilewise.plan import percent
from tilewise.problem import make
from tilewise.trace import bounds
from tilewise.trace.bounds import EMPTY, FULL, tile_counts
from tilewise.trace.evaluate import leaf_values, slot_values


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


MASKS = dict(
    full=lambda n: tw.full(), causal=lambda n: tw.causal(), window=lambda n: tw.window(n // 5, n // 9),
    behind=lambda n: tw.causal() & ~tw.window(n // 7, None),
    prefix=lambda n: tw.causal() | tw.prefix(torch.tensor([n // 3, 0])),
    documents=lambda n: tw.documents(torch.arange(n) // 37, torch.arange(n + 70) // 37), nothing=lambda n: ~tw.full(),
    lengths=lambda n: tw.key_lengths(torch.tensor([0, n // 2])), chunked=lambda n: tw.chunked(50) & tw.causal(),
    both=lambda n: ~tw.window(20, 90) | (tw.window(5, 3) & tw.key_lengths(torch.tensor([n, 9]))),
    function=lambda n: tw.mask_mod(lambda b, h, q, k: (q - k) % (h + 2) == 0))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shift", [70, 0, -70])
def test_tiles_are_counted_as_they_are_classified(name, shift):
    """The counts come from intervals, without the grid of classes that they are held to."""
    n, heads = 200, 3
    q, k = torch.empty(2, n, heads, 16), torch.empty(2, n + (70 if name == "documents" else shift), heads, 16)
    mask = MASKS[name](n if shift >= 0 or name == "documents" else n - 70)
    plan = tw.explain(q, k, k, mask=mask, backend="tiled")
    small, lengths = (16, 24), (n, k.shape[1])
    problem, operands = make(q, k, k, mask=mask)
    values = leaf_values(slot_values(operands.captured, operands.ints, operands.floats), 2, heads, *lengths)
    for tile, counted in ((plan.tiles, (plan.visited, plan.full)),
                          (small, tile_counts(problem.graphs.mask, problem.graphs.keys, values, 2, heads, lengths, small))):
        classes = mask.classify(2, heads, *lengths, *tile).expand(2, heads, -1, -1)
        assert counted == (int((classes != EMPTY).sum()), int((classes == FULL).sum()))


def test_counting_tiles_of_intervals_takes_linear_memory(monkeypatch):
    monkeypatch.setattr(bounds, "tile_classes", None)
    n = 2**20
    q = torch.empty(1, 1, 1, 16).expand(1, n, 1, 16)
    plan = tw.explain(q, q, q, mask=tw.causal() & tw.window(n // 2 - 1, None), backend="tiled")
    assert plan.visited / plan.tiles_in_all == pytest.approx(3 / 8, rel=1e-3)
    assert str(plan).count("(38%)") == 1


@pytest.mark.parametrize("part, whole, words", [
    (0, 0, "0%"), (0, 7, "0%"), (1, 1000, "<1%"), (1, 2, "50%"), (999, 1000, ">99%"), (1000, 1000, "100%")])
def test_percentages_round_to_all_or_nothing_only_what_is(part, whole, words):
    assert percent(part, whole) == words


def test_reference_is_one_tile():
    q = torch.empty(1, 40, 1, 8)
    plan = tw.explain(q, q, q, causal=True, backend="reference")
    assert (plan.tiles, plan.visited) == ((40, 40), 1)


def test_explain_says_why_not_the_others():
    q = torch.empty(1, 40, 1, 8, dtype=torch.float64)
    text = str(tw.explain(q, q, q))
    assert "backend       tiled" in text
    assert "not triton: " in text
