"""Tiles of user masks, by interval arithmetic: never wrong, seldom undecided, and decided without looking at every score."""
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tilewise.trace import bounds
from tilewise.trace.bounds import EMPTY, FULL, PARTIAL, tile_classes
from tilewise.trace.capture import mask_graph
from tilewise.trace.evaluate import evaluate, leaf_values, slot_values
from tilewise.trace.graph import OF_FLOATS, lower, parse

BATCH, HEADS = 2, 3

pytestmark = pytest.mark.usefixtures("one_thread")


def lowered(fn, nq, nk, batch=BATCH, heads=HEADS):
    program = lower([[mask_graph(fn)]])
    ((node,),) = parse(program.text)
    return node, leaf_values(slot_values(program.captured, program.ints, program.floats), batch, heads, nq, nk)


def classes_of(fn, lengths, tile, batch=BATCH, heads=HEADS):
    node, values = lowered(fn, *lengths, batch, heads)
    return tile_classes(node, (), values, batch, heads, lengths, tile)


def dense(fn, nq, nk, batch=BATCH, heads=HEADS):
    node, values = lowered(fn, nq, nk, batch, heads)
    value = torch.as_tensor(evaluate(node, values | dict(q=torch.arange(nq)[:, None], k=torch.arange(nk))))
    return value.expand(batch, heads, nq, nk)


def true_classes(visible, tile):
    """The classes that looking at every score gives: each tile reduced, short tiles at the ends too."""
    def tiles(x, reduce):
        for dim, size in ((-2, tile[0]), (-1, tile[1])):
            x = torch.stack([reduce(part, dim) for part in x.split(size, dim)], dim)
        return x
    return tiles(visible, torch.all).byte() + tiles(visible, torch.any).byte()


def assert_sound(fn, lengths, tile):
    found, true = classes_of(fn, lengths, tile), true_classes(dense(fn, *lengths), tile)
    assert found.shape[2:] == true.shape[2:]
    wrong = ((found != PARTIAL) & (found != true)).nonzero()
    assert len(wrong) == 0, f"tile {wrong[0].tolist()} of {tile}: said {found[tuple(wrong[0] % torch.tensor(found.shape))]}, " \
                            f"but it is {true[tuple(wrong[0])]} (0 empty, 1 partial, 2 full)"


# ---- random expressions -------------------------------------------------------------------------------------------------
# A random expression is text, so that a failure shows a function that can be pasted. Integers stay inside 32 bits: factors
# are constants, or remainders. What becomes an integer is a finite number: no other has a defined value as one.

G = torch.Generator().manual_seed(0)
TABLES = dict(
    I1=torch.randint(-9, 30, (11,), generator=G), J1=torch.randint(0, 11, (11,), generator=G, dtype=torch.int32),
    I2=torch.randint(-9, 30, (11, 11), generator=G), S1=torch.arange(11) * 3, F1=torch.randn(11, generator=G) * 9,
    F2=(torch.randn(11, 11, generator=G) * 9).half(), N1=torch.tensor([torch.inf, -torch.inf, torch.nan, *range(8)]),
    B1=torch.rand(11, generator=G) < 0.5, B2=torch.rand(11, 11, generator=G) < 0.5,
    PER_HEAD=torch.tensor([1, 5, 12]), PER_BATCH=torch.tensor([7, 20]))


def whole(x):
    return torch.where(x == x, torch.clamp(x, -99, 99), 0.0).int()


def function(source):
    return eval(f"lambda b, h, q, k: {source}", {"torch": torch, "whole": whole, **TABLES})


LEAVES = {
    "i": ["{v}", "{v}", "{n}", "I1[{v} % 11]", "PER_HEAD[h]", "PER_BATCH[b]", "S1[torch.clamp({v}, 0, 10)]"],
    "f": ["{v}.float()", "({r} * {v})", "F1[{v} % 11]", "F2[q % 11, k // 3 % 11]", "N1[{v} % 11]"],
    "b": ["({v} < {n})", "(q >= k)", "B1[{v} % 11]", "B2[q % 11, k % 11]"],
}
INNER = {  # names are parts: i, j integers, f, g floats, a, c booleans, m factors, v indices, n and r numbers, o comparisons
    "i": ["({i} + {j})", "({i} - {j})", "({i} * {m})", "(({i} % 7) * ({j} % 5))", "({i} // {m})", "({i} % {m})", "(-{i})", "abs({i})",
          "({i} // (abs({j}) + 1))", "({i} % (abs({j}) + 1))", "torch.minimum({i}, {j})", "torch.maximum({i}, {j})", "(~{i})",
          "torch.clamp({i}, -3, 9)", "torch.where({a}, {i}, {j})", "{a}.int()", "({a} + {c} * 2)", "({i} & {j})", "({i} | {j})",
          "({i} ^ {j})", "I1[{i} % 11]", "J1[{i} % 11]", "I2[{i} % 11, {j} % 11]", "torch.square({i} % 50)", "whole({f})"],
    "f": ["({f} + {g})", "({f} - {g})", "({f} * {g})", "({f} / {g})", "({i} * {r})", "{i}.float()", "({i} / {m})", "({f} // 2.5)",
          "({f} % 2.5)", "({f} % -2.5)", "(-{f})", "abs({f})", "torch.minimum({f}, {g})", "torch.maximum({f}, {g})", "F1[{i} % 11]",
          "torch.where({a}, {f}, {g})", "{f}.half().float()", "{f}.bfloat16().float()", "abs({f}) ** 1.5", "({f} ** {g})",
          *(f"torch.{name}({{f}})" for name in OF_FLOATS)],
    "b": ["({i} {o} {j})", "({i} {o} {j})", "({f} {o} {g})", "({i} {o} {r})", "({a} & {c})", "({a} | {c})", "({a} ^ {c})", "(~{a})",
          "torch.where({a}, {c}, {i} > {j})", "({a} == {c})", "{i}.bool()", "{f}.bool()", "B1[{i} % 11]", "B2[{i} % 11, {j} % 11]"],
}
CHOICES = dict(n=[str(n) for n in (-9, -1, 0, 1, 2, 5, 12, 31)], m=["-7", "-3", "-2", "2", "3", "5", "16"],
               r=["-2.5", "-1.0", "0.0", "0.3", "1.5", "7.0"], v=["q", "k", "q", "k", "b", "h"], o=["<", "<=", ">", ">=", "==", "!="])


@st.composite
def expressions(draw, kind, depth, floats):
    """An expression of kind "i", "f" or "b"; without `floats` it is made of integers and booleans only."""
    templates = INNER[kind] if depth else LEAVES[kind]
    if not floats:
        templates = [t for t in templates if not any(part in t for part in ("{f}", "{g}", "{r}"))]
    template = draw(st.sampled_from(templates))
    parts = {}
    for name in re.findall(r"{(\w)}", template):
        if name in CHOICES:
            parts[name] = draw(st.sampled_from(CHOICES[name]))
        else:
            inner = {"i": "i", "j": "i", "f": "f", "g": "f", "a": "b", "c": "b"}[name]
            parts[name] = draw(expressions(inner, draw(st.integers(0, depth - 1)), floats))
    return template.format(**parts)


TILES = st.sampled_from([(1, 1), (2, 3), (4, 4), (7, 16), (64, 64)])
LENGTHS = st.tuples(st.integers(1, 40), st.integers(1, 40))
QUICK = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("floats", [False, True], ids=["integers", "floats"])
@settings(max_examples=250, **QUICK)
@given(st.data(), LENGTHS, TILES)
def test_tiles_of_random_masks_are_what_they_are_said_to_be(floats, data, lengths, tile):
    source = data.draw(expressions("b", 3, floats))
    assert_sound(function(source), lengths, tile)


@pytest.mark.parametrize("floats", [False, True], ids=["integers", "floats"])
@settings(max_examples=60, **QUICK)
@given(st.data(), LENGTHS)
def test_coarse_tiles_first_give_tiles_as_sound(floats, data, lengths):
    """Many levels of coarse tiles, each of 2 x 2."""
    source = data.draw(expressions("b", 2, floats))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "COARSE", 2)
        assert_sound(function(source), lengths, (2, 1))


@settings(max_examples=12, **QUICK)
@given(st.data(), st.tuples(st.integers(257, 300), st.integers(257, 300)))
def test_a_grid_beyond_the_first_level_is_sound(data, lengths):
    source = data.draw(expressions("b", 2, False))
    assert_sound(function(source), lengths, (1, 1))


@settings(max_examples=25, **QUICK)
@given(st.data(), st.tuples(st.integers(257, 300), st.integers(257, 300)))
def test_coarse_tiles_lose_nothing_but_what_lies_inside_them(data, lengths):
    """Where coarse tiles come first, the tiles found are those that would be found without them."""
    fn = function(data.draw(expressions("b", 2, False)))
    coarse = classes_of(fn, lengths, (1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "COARSE", 1000)
        at_once = classes_of(fn, lengths, (1, 1))
    assert coarse.shape == at_once.shape
    decided = at_once != PARTIAL
    assert torch.equal(coarse[decided], at_once[decided])  # bounds of a part lie inside the bounds of the whole
