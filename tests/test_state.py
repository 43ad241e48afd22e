"""The algebra of partial results."""
import itertools

import pytest
import torch

import tilewise as tw
from tilewise.state import AttentionState, merge_states


def parts(cuts, empty_rows=True):
    """States over consecutive ranges of keys, and the state over all of them, fp64."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 12, 8, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(12, 12, generator=g) < 0.4
    if empty_rows:
        mask[3] = False
        mask[4, :6] = False

    def over(keys):
        out, lse = tw.attention(q, k[:, :, keys], v[:, :, keys], mask=mask[:, keys], layout="bhsd", return_lse=True)
        return AttentionState(out, lse)

    return [over(slice(a, b)) for a, b in itertools.pairwise(cuts)], over(slice(0, 12))


def close(a, b):
    torch.testing.assert_close(a.out, b.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-12, atol=1e-12)


def test_merging_parts_gives_the_whole():
    states, whole = parts([0, 1, 6, 6, 12])
    close(merge_states(states), whole)
    close(states[3].merge(states[0]).merge(states[2]).merge(states[1]), whole)
    close(states[0].merge(states[1].merge(states[2].merge(states[3]))), whole)


def test_empty_state_is_neutral():
    (state,), _ = parts([0, 12])
    empty = AttentionState.empty(2, 2, 12, 8, dtype=torch.float64)
    close(empty.merge(state), state)
    close(state.merge(empty), state)
    assert (empty.merge(empty).out == 0).all()
    assert (empty.merge(empty).lse == -torch.inf).all()


def test_sink_after_the_last_merge():
    states, whole = parts([0, 5, 12])
    sinks = torch.tensor([0.3, -torch.inf], dtype=torch.float64)
    merged = merge_states(states).with_sink(sinks)
    close(merged, whole.with_sink(sinks))
    close(AttentionState(whole.out[:, 1:], whole.lse[:, 1:]), AttentionState(merged.out[:, 1:], merged.lse[:, 1:]))
    for misuse in (lambda: merged.with_sink(sinks), lambda: merged.merge(states[0])):
        with pytest.raises(ValueError, match="sink"):
            misuse()


def test_gradients_of_a_merge_are_finite_and_right():
    states, _ = parts([0, 5, 12], empty_rows=False)
    leaves = [x.detach().requires_grad_() for s in states for x in (s.out, s.lse)]
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)

    def merged(o1, l1, o2, l2, sinks):
        state = AttentionState(o1, l1).merge(AttentionState(o2, l2)).with_sink(sinks)
        return state.out, state.lse

    assert torch.autograd.gradcheck(merged, (*(x[:1, :, :2].detach().requires_grad_() for x in leaves), sinks))
    states, _ = parts([0, 5, 12])
    leaves = [x.detach().requires_grad_() for s in states for x in (s.out, s.lse)]
    state = AttentionState(*leaves[:2]).merge(AttentionState(*leaves[2:]))
    (state.out.sum() + state.lse[state.lse.isfinite()].sum()).backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_errors():
    with pytest.raises(ValueError, match="lse: expected shape"):
        AttentionState(torch.zeros(2, 3, 4), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at least one"):
        merge_states([])
    with pytest.raises(ValueError, match="equal shapes"):
        AttentionState.empty(2, 3, 4).merge(AttentionState.empty(2, 2, 4))
