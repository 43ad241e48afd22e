"""Tiles of user masks, by interval arithmetic: never wrong, seldom undecided, and decided without looking at every score."""
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tilewise.trace import bounds, intervals
from tilewise.trace.bounds import EMPTY, FULL, PARTIAL, tile_classes
from tilewise.trace.capture import mask_graph
from tilewise.trace.evaluate import evaluate, leaf_values, slot_values
from tilewise.trace.graph import OF_FLOATS, lower, parse
from tilewise.trace.intervals import Bounds

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
    "i": ["{v}", "{v}", "torch.tensor({n})", "I1[{v} % 11]", "PER_HEAD[h]", "PER_BATCH[b]", "S1[torch.clamp({v}, 0, 10)]"],
    "f": ["{v}.float()", "({r} * {v})", "F1[{v} % 11]", "F2[q % 11, k // 3 % 11]", "N1[{v} % 11]"],
    "b": ["({v} < {n})", "(q >= k)", "B1[{v} % 11]", "B2[q % 11, k % 11]"],
}
# names are parts: i, j integers, f, g floats, a, c booleans, m factors, v indices, n and r numbers, o comparisons
INNER = {
    "i": ["({i} + {j})", "({i} - {j})", "({n} - {i})", "({i} * {m})", "(({i} % 7) * ({j} % 5))", "({i} // {m})", "({i} % {m})",
          "({i} // (abs({j}) + 1))", "({i} % (abs({j}) + 1))", "(-{i})", "abs({i})", "torch.minimum({i}, {j})", "(~{i})",
          "torch.maximum({i}, {j})", "torch.clamp({i}, -3, 9)", "torch.where({a}, {i}, {j})", "{a}.int()", "({a} + {c} * 2)",
          "({i} & {j})", "({i} | {j})", "({i} ^ {j})", "I1[{i} % 11]", "J1[{i} % 11]", "I2[{i} % 11, {j} % 11]",
          "torch.square({i} % 50)", "whole({f})"],
    "f": ["({f} + {g})", "({f} - {g})", "({f} * {g})", "({f} / {g})", "({i} * {r})", "{i}.float()", "({i} / {m})",
          "({f} // 2.5)", "({f} % 2.5)", "({f} % -2.5)", "(-{f})", "abs({f})", "torch.minimum({f}, {g})", "F1[{i} % 11]",
          "torch.maximum({f}, {g})", "torch.where({a}, {f}, {g})", "{f}.half().float()", "{f}.bfloat16().float()",
          "(abs({f}) ** 1.5)", "({f} ** {g})", *(f"torch.{name}({{f}})" for name in OF_FLOATS)],
    "b": ["({i} {o} {j})", "({i} {o} {n})", "({f} {o} {g})", "({i} {o} {r})", "({a} & {c})", "({a} | {c})", "({a} ^ {c})",
          "(~{a})", "torch.where({a}, {c}, {i} > {j})", "({a} == {c})", "{i}.bool()", "{f}.bool()", "B1[{i} % 11]",
          "B2[{i} % 11, {j} % 11]"],
}
CHOICES = dict(n=[str(n) for n in (-9, -1, 0, 1, 2, 5, 12, 31)], m=["-7", "-3", "-2", "2", "3", "5", "16"],
               r=["-2.5", "-1.0", "0.0", "0.3", "1.5", "7.0"], v=["q", "k", "q", "k", "b", "h"],
               o=["<", "<=", ">", ">=", "==", "!="])


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


# ---- what must not be wrong even where it is rare ------------------------------------------------------------------------

@pytest.mark.parametrize("source", [
    "torch.sqrt((q - k).float()) <= 3", "torch.log((q - k).float()) < 2", "torch.rsqrt((q - k).float()) > 0.2",
    "(k / (q - 5)) <= 2", "((k - 3) / (q - 5)).abs() >= 0", "(q - k).float() ** 0.5 <= 3", "(k % (q - 5.0)).abs() < 100",
    "torch.maximum(torch.sqrt((q - k).float()), q.float()) >= 0", "torch.sin(torch.log(q - 5.0)) <= 1.5",
    "((q - k) * (1.0 / (k - 4.0))) == ((q - k) * (1.0 / (k - 4.0)))"])
def test_where_a_value_is_not_a_number_no_comparison_holds(source):
    for tile in ((1, 1), (4, 4), (3, 16)):
        assert_sound(function(source), (12, 14), tile)


def test_a_value_that_does_not_count_may_be_anything():
    """An infinite quotient has no defined integer; the branch not taken must not decide for the others."""
    for tile in ((1, 1), (4, 4), (16, 16)):
        assert_sound(function("torch.where(q == 5, 0, (100.0 / (q - 5)).int()) > k"), (16, 16), tile)


def test_indices_beyond_a_table_under_a_condition():
    """Only entries inside the table count."""
    for source in ("torch.where(k >= 1, I1[torch.clamp(k - 1, 0, 10)], 5) > 3", "B1[torch.clamp(q - k, 0, 10)] & (q >= k)",
                   "torch.where(q >= k, S1[torch.clamp(q - k, 0, 10)], S1[torch.clamp(k - q, 0, 10)]) <= 12"):
        assert_sound(function(source), (11, 11), (3, 2))


def test_masks_of_nothing_and_of_everything():
    for visible, expected in ((True, FULL), (False, EMPTY)):
        for lengths in ((5, 7), (300, 290)):
            classes = classes_of(lambda b, h, q, k, visible=visible: visible, lengths, (1, 1))
            assert classes.shape[2:] == lengths
            assert (classes == expected).all()
    assert classes_of(lambda b, h, q, k: q < k, (0, 7), (2, 2)).shape[2:] == (0, 4)
    assert classes_of(lambda b, h, q, k: q < k, (7, 0), (2, 2)).shape[2:] == (4, 0)


@pytest.mark.parametrize("source, shape", [
    ("q < k", (1, 1)), ("k < PER_BATCH[b]", (BATCH, 1)), ("q - k < PER_HEAD[h]", (1, HEADS)),
    ("(q - k) * (b + 1) < PER_HEAD[h]", (BATCH, HEADS))])
@pytest.mark.parametrize("coarse", [2, 16])
def test_sequences_and_heads_have_their_own_tiles_where_the_mask_knows_them(source, shape, coarse, monkeypatch):
    monkeypatch.setattr(bounds, "COARSE", coarse)
    fn = function(source)
    assert classes_of(fn, (30, 26), (2, 3)).shape[:2] == shape
    assert_sound(fn, (30, 26), (2, 3))


# ---- tightness ----------------------------------------------------------------------------------------------------------

N, TILE = 512, 16
IDS = (torch.rand(N, generator=G) < 0.02).cumsum(0)                              # documents of about 50 tokens
PREFIX = torch.tensor([100])
STARTS, ENDS = torch.tensor([40, 200, 330]), torch.tensor([104, 290, 331])        # images in a text
SPAN_START, SPAN_END = torch.arange(N), torch.arange(N) + 1                       # and for each token its image's
for _start, _end in zip(STARTS.tolist(), ENDS.tolist(), strict=True):
    SPAN_START[_start:_end], SPAN_END[_start:_end] = _start, _end
BLOCKS = torch.rand(22, 22, generator=G) < 0.4
LABELS = torch.randint(0, 3, (32,), generator=G).repeat_interleave(16).roll(40)    # documents that come back
GLOBAL = torch.arange(N) % 200 == 7
LEFT, WIDE = torch.tensor([20, 90]), torch.tensor([3, 40])


def subtrees(n):
    """For a random tree in depth-first order: where the descendants of each node end."""
    depth, end = [0], [n] * n
    for i in range(1, n):
        depth.append(1 + int(torch.randint(0, depth[-1] + 1, (), generator=G)) if i % 60 == 0 else depth[-1] + 1)
        for j in range(i):
            if end[j] == n and depth[j] >= depth[i]:
                end[j] = i
    return torch.tensor(end)


TREE = subtrees(N)


def images(b, h, q, k):
    visible = q >= k
    for n in range(len(STARTS)):
        visible = visible | ((q >= STARTS[n]) & (q < ENDS[n]) & (k >= STARTS[n]) & (k < ENDS[n]))
    return visible


def neighbourhood(side, radius=3):
    """NATTEN: on a grid of `side` columns; the window of a token at the border is moved inside."""
    def visible(b, h, q, k):
        row = (q // side).clamp(radius, N // side - 1 - radius)
        column = (q % side).clamp(radius, side - 1 - radius)
        return ((row - k // side).abs() <= radius) & ((column - k % side).abs() <= radius)
    return visible


def rounded_distance(b, h, q, k):
    distance = torch.where(q >= k, q - k, 2 * (k - q))
    return torch.log2(distance + 1.0).floor() <= 6


# mask -> how many tiles in a hundred may be said PARTIAL beyond those that are; most are decided exactly
MASKS = {
    "causal": (lambda b, h, q, k: q >= k, 0),
    "window": (lambda b, h, q, k: (q >= k) & (q - k <= 100), 0),
    "window of a head": (lambda b, h, q, k: (q - k <= LEFT[h]) & (k - q <= WIDE[h]), 0),
    "prefix": (lambda b, h, q, k: (q >= k) | (k < PREFIX[b]), 0),
    "documents": (lambda b, h, q, k: (IDS[q] == IDS[k]) & (q >= k), 0),
    "documents, both ways": (lambda b, h, q, k: IDS[q] == IDS[k], 0),
    "dilated window": (lambda b, h, q, k: (q >= k) & (q - k < 200) & ((q - k) % 4 == 0), 0),
    "dilated blocks": (lambda b, h, q, k: (q >= k) & ((q // TILE - k // TILE) % 4 == 0), 0),
    "chunked": (lambda b, h, q, k: (q // 64 == k // 64) & (q >= k), 0),
    "odd chunks": (lambda b, h, q, k: q // 50 == k // 50, 0),
    "Longformer": (lambda b, h, q, k: ((q - k).abs() <= 40) | GLOBAL[q] | GLOBAL[k], 0),
    "Transfusion, spans": (images, 0),
    "Transfusion, per token": (lambda b, h, q, k: (q >= k) | ((SPAN_START[q] <= k) & (k < SPAN_END[q])), 0),
    "tree": (lambda b, h, q, k: (k <= q) & (q < TREE[k]), 0),
    "neighbourhood": (neighbourhood(32), 0),
    "neighbourhood, odd grid": (neighbourhood(23), 2.5),
    "far dilation": (lambda b, h, q, k: (q >= k) & ((q - k) % 100 < 40), 0),
    "blocks of a table": (lambda b, h, q, k: BLOCKS[q // 32, k // 32], 0),
    "odd blocks of a table": (lambda b, h, q, k: BLOCKS[q // 24, k // 24] & (q >= k), 0.2),
    "two labels": (lambda b, h, q, k: LABELS[q] == LABELS[k], 0),
    "rounded distance": (rounded_distance, 0),
}


def test_few_tiles_are_undecided():
    rows, within = [f"{'mask':24} partial, %  found  allowed"], True
    for name, (fn, allowance) in MASKS.items():
        found = classes_of(fn, (N, N), (TILE, TILE), 1, len(LEFT))
        true = true_classes(dense(fn, N, N, 1, len(LEFT)), (TILE, TILE))
        assert ((found == PARTIAL) | (found == true)).all(), name
        share, needed = (100 * (x == PARTIAL).double().mean().item() for x in (found, true))
        within &= share <= needed + allowance
        rows.append(f"{name:24} {needed:10.2f} {share:6.2f}  {needed + allowance:7.2f}")
    assert within, "\n" + "\n".join(rows)


# ---- cost ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def asked(monkeypatch):
    """How many tiles each question to `Bounds` was about."""
    counts = []
    ask = Bounds.of

    def counted(self, graph, leaves):
        counts.append(torch.broadcast_shapes(leaves["q"].lo.shape, leaves["k"].lo.shape).numel())
        return ask(self, graph, leaves)

    monkeypatch.setattr(Bounds, "of", counted)
    return counts


def test_a_long_sequence_of_documents_costs_its_boundary(asked):
    """128k tokens in documents of 5000: 1024 x 1024 tiles, of which the diagonal and the documents' edges are undecided."""
    n, size, tile = 131_072, 5000, 128
    ids = torch.arange(n) // size
    classes = classes_of(lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k), (n, n), (tile, tile), 1, 1)[0, 0]
    # closed form: a tile shows something where its last query sees its last possible key, everything where all do
    first = torch.arange(0, n, tile)
    last = first + tile - 1
    document = lambda x: x // size  # noqa: E731
    q_first, q_last, k_first, k_last = first[:, None], last[:, None], first, last
    full = (q_first >= k_last) & (document(q_last) == document(k_first))
    empty = (q_last < k_first) | (document(q_first) > document(k_last))
    assert torch.equal(classes == FULL, full)
    assert torch.equal(classes == EMPTY, empty)
    assert sum(asked) < 0.1 * classes.numel()


def test_a_chain_of_choices_costs_its_length(monkeypatch):
    """Each `where` reads the one before on both sides: written out there would be 2^40 of them."""
    def staircase(b, h, q, k):
        level = k
        for n in range(40):
            level = torch.where(q > 3 * n, level + 1, level)
        return level < 30

    calls = 0
    apply = intervals._apply

    def counted(*args):
        nonlocal calls
        calls += 1
        assert calls < 10_000, "each choice doubles the work"
        return apply(*args)

    monkeypatch.setattr(intervals, "_apply", counted)
    assert_sound(staircase, (40, 30), (4, 4))
