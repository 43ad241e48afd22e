"""User functions as graphs: the graph means what the function says, and what cannot be a graph says so."""
import contextlib
import itertools
import linecache
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewise.problem import make
from tilewise.trace import capture
from tilewise.trace.capture import INDICES, CaptureError, mask_graph, score_graph
from tilewise.trace.derive import derivative
from tilewise.trace.evaluate import evaluate, leaf_values, slot_values
from tilewise.trace.graph import GROUPS, lower, parse

SIZES = B, H, Q, K = 2, 3, 4, 5
G = torch.Generator().manual_seed(0)


def table(dtype, *shape):
    """A captured tensor: numbers that every dtype holds exactly, negative ones too."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=G) < 0.5
    return (torch.randint(-7, 8, shape, generator=G) / (1 if not dtype.is_floating_point else 4)).to(dtype)


PLACES = list(itertools.product(*map(range, SIZES)))
SCORES = torch.randn(SIZES, generator=G)
T0, T1, T2, T3, T4 = (table(torch.float32, *SIZES[4 - n:]) for n in range(5))  # [], [K], [Q, K], [H, Q, K], [B, H, Q, K]
I0, I1, I2, I3, I4 = (table(torch.int64, *SIZES[4 - n:]) for n in range(5))
B0, B1, B2 = (table(torch.bool, *SIZES[4 - n:]) for n in range(3))
DTYPES = ("bool", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")
PER_HEAD = {getattr(torch, name): table(getattr(torch, name), H) for name in DTYPES}
PER_KEY = table(torch.int32, K).abs() % K                                             # a table of indices
STRIDED = table(torch.float32, K, Q).T[:, ::2]
LENGTHS = torch.tensor([5, 2])
WRITTEN = torch.arange(K) * 1.0


def indices():
    """b, h, q, k as tensors that broadcast to [B, H, Q, K]."""
    return [torch.arange(n).reshape([-1 if d == axis else 1 for d in range(4)]) for axis, n in enumerate(SIZES)]


def graph_of(fn):
    """The graph of what a function of (s, b, h, q, k) returns, of whatever kind."""
    return capture.run(fn, ("s", *INDICES), "(s, b, h, q, k)")


def value_of(expr, scores=SCORES):
    program = lower([[expr]])
    ((node,),) = parse(program.text)
    slots = slot_values(program.captured, program.ints, program.floats, scores.dtype)
    leaves = dict(zip("bhqk", indices(), strict=True)) | {"s": scores}
    value = evaluate(node, leaf_values(slots, B, H, Q, K) | leaves)
    return (torch.tensor(value, dtype=slots["float"]) if isinstance(value, float) else torch.as_tensor(value)).expand(SIZES)


def plain(fn):
    """What the function gives on tensors without dimensions, one score at a time."""
    return torch.stack([torch.as_tensor(fn(SCORES[at], *map(torch.tensor, at))) for at in PLACES]).reshape(SIZES)


def kind_of(x):
    return "b" if x.dtype == torch.bool else "f" if x.is_floating_point() else "i"


def assert_same_meaning(fn):
    expr, expected = graph_of(fn), plain(fn)
    value = value_of(expr)
    assert expr.kind == kind_of(expected) == kind_of(value)
    if expr.kind == "f":
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-6, equal_nan=True)
    else:
        assert torch.equal(value.long(), expected.long())


def function(source):
    return eval(f"lambda s, b, h, q, k: {source}", globals())


def cases(table):
    return [pytest.param(source, id=source) for sources in table.values() for source in sources]


# Torch's spellings of each operation; s: score, a float; b, h, q, k: integers.
OPERATIONS = {
    "add": ["s + q", "2 + q", "2.5 + q", "torch.add(s, k)", "q.add(k)", "T0 + q", "torch.add(s, q, alpha=3)",
        "s.add(q, alpha=-0.5)"],
    "sub": ["q - k", "2 - k", "0.5 - s", "torch.sub(s, k, alpha=2)", "torch.subtract(s, k)", "torch.rsub(s, 3)", "I0 - s"],
    "mul": ["s * q", "-3 * k", "torch.mul(q, k)", "s.multiply(2)", "(q < k) * s", "(q < k) * q"],
    "div": ["s / (k + 1)", "q / (k + 1)", "2 / (q + 1)", "torch.div(q - 3, 2)", "torch.divide(s, 3)", "T0 / (k + 1)",
        "torch.true_divide(q, 4)", "q / 0.3", "(q < k) / (b + 1)", 'torch.div(q - 4, 3, rounding_mode="floor")', "1 / q"],
    "floor division": ["(q - k) // 2", "(q - k) // -3", "-7 // (k + 1)", "torch.floor_divide(q - k, 2)", "s // 0.3",
        "s // (q - 7)", "(q - k).floor_divide(4)", "I0 // (k + 1)", "(q - k) // 2.0"],
    "remainder": ["(q - k) % 3", "(q - k) % -3", "-7 % (k + 1)", "torch.remainder(q - k, 4)", "s % 0.7", "s.remainder(-0.7)",
        "I0 % (k - 9)", "(q - k) % 2.5"],
    "pow": ["s ** 2", "(q - k) ** 3", "s ** 2.0", "(q - k) ** 2.0", "s ** (-1)", "torch.abs(s) ** 0.5", "torch.pow(s, 3)",
        "2.0 ** s", "0.5 ** (h + 1)", "s ** h", "torch.abs(s).pow(q / 2)", "torch.pow(2.0, -h)", "s ** 0", "s ** 11",
        "torch.abs(T0) ** s", 'abs(s) ** float("inf")'],
    "pow of integers": ["q ** 1", "2 ** h", "(q - 2) ** 0", "k ** 9", "torch.pow(2, h) & 2", "k ** h",
        "(q < k) ** 2 + (k < 9) ** 2"],
    "square": ["torch.square(s)", "(q - k).square()"],
    "comparisons": ["q < k", "q <= k", "q > k", "q >= k", "q == k", "q != k", "2 < k", "2 >= s", "0.5 > s", "q < 1.5",
        "s <= q", "I0 == q - 2", "torch.lt(q, k)", "torch.le(q, 2)", "q.gt(k)", "torch.ge(q, k)", "torch.eq(q, k)",
        "q.ne(k)", "torch.less(q, k)", "torch.less_equal(q, k)", "q.greater(k)", "torch.greater_equal(q, k)",
        "torch.not_equal(q, k)", "(q < k) == (k < 3)", "(q < k) < (k < 3)", "(q < k) == 1"],
    "bits": ["(q < k) & (k < 3)", "(q < k) | (k < 3)", "(q < k) ^ (k < 3)", "q - 2 & k", "q | 2", "5 ^ q - k", "1 & k",
        "4 | q", "True & (q < k)", "(q < k) & k", "~q", "~(q < k)", "torch.bitwise_and(q, k)", "torch.bitwise_or(q, k)",
        "q.bitwise_xor(k)", "torch.bitwise_not(k)", "I0 | k", "B0 ^ (q < k)"],
    "logic": ["torch.logical_and(q < k, k < 3)", "torch.logical_or(q, k)", "(q < k).logical_xor(k < 3)",
        "torch.logical_not(q < k)", "torch.logical_not(q)", "torch.logical_and(s, q)"],
    "where": ["torch.where(q < k, s, 2.0)", 'torch.where(q < k, s, float("-inf"))', "torch.where(q < k, q, -1)",
        "torch.where(q < k, q, s)", "torch.where(q < k, 1, 0)", "torch.where(q < k, k < 3, h < 1)",
        "torch.where(q < k, q < 3, k)", "torch.where(B0, s, q)", "torch.where(condition=q < k, input=s, other=T0)",
        "torch.where(q < k, 0.25, 0.5)"],
    "masked_fill": ['s.masked_fill(q < k, float("-inf"))', "torch.masked_fill(s, q < k, 0.0)", "q.masked_fill(q < k, -1)"],
    "where as a method": ["s.where(q < k, 0.0)", "(q < 3).where(q < k, k < 3)"],
    "clamp": ["torch.clamp(s, -0.5, 0.5)", "s.clamp(min=-0.5)", "s.clamp(max=0.25)", "torch.clip(q, 1, 3)",
        "torch.clamp(s, 0.5, -0.5)", "k.clip(q, q + 1)", "torch.clamp_min(q, 2)", "s.clamp_max(0.5)", "q.clamp(min=1.5)",
        "s.clamp(T0 - 4, T0 + 4)", "s.clamp_min(min=0.0)"],
    "extremes": ["torch.minimum(q, k)", "torch.maximum(s, q)", "torch.min(s, k)", "q.max(k)", "torch.maximum(T0, s)",
        "q.minimum(I0)", "torch.minimum(q < k, k < 3)"],
    "signs": ["-s", "-q", "torch.neg(q)", "s.negative()", "abs(q - k)", "torch.abs(s)", "(q - k).absolute()",
        "torch.relu(s)", "(q - k).relu()", "F.relu(s)", "torch.sign(s)", "(q - k).sign()"],
    "functions": ["torch.exp(s)", "torch.exp2(-q)", "torch.log(s.abs() + 0.1)", "torch.log2(q + 1)", "torch.sqrt(k)",
        "(k + 1).rsqrt()", "torch.sin(s)", "q.cos()", "torch.erf(s)", "20 * torch.tanh(s / 20)", "torch.sigmoid(s)",
        "F.sigmoid(s)", "F.tanh(q - 2)", "torch.reciprocal(s)", "(q + 1).reciprocal()", "torch.sqrt(s)", "torch.sqrt(q < k)"],
    "floor and ceil": ["torch.floor(3 * s)", "s.ceil()", "torch.floor(q)", "(q / 2).ceil()", "(q - 2).ceil()"],
    "casts": ["q.float()", "(3 * s).int()", "(3 * s).long()", "q.bool()", "s.bool()", "(q < k).int()", "s.half().float()",
        "s.bfloat16().float()", "q.to(torch.float32)", "(3 * s).to(torch.int32)", "s.to(dtype=torch.float16).float()",
        "(q < k).float() * s", "q.type(torch.bool)", "s.type_as(q)", "q.to(s)", "q.to(s.dtype) / 3", "s.to(I0)",
        's.to("cpu")', 's.to("cpu", torch.int32)', "s.clone() + q.contiguous()", "(2 * s).type_as(T1)",
        "s.to(q.device)"],
    "half precision of integers": ["q.half().float()", "(1001 * q).bfloat16().float()", "(q < k).half() + (k < 3).half()",
        "(q < k).bfloat16()"],
    "constants like another": ["torch.zeros_like(s) + q", "torch.ones_like(s)", "s.new_ones(())", "s.new_zeros(()) - k",
        "torch.zeros_like(q)", "torch.ones_like(q < k)", "torch.ones_like(q, dtype=torch.bool)",
        "torch.zeros_like(s, dtype=torch.int64)", "q.new_ones(())", "T1[torch.zeros_like(q)]", "torch.full_like(s, 2.5)",
        "torch.full_like(q, 3) & k", "q.new_full((), 2)", "s.new_full((), 2) / 3"],
    "promotion": ["(q < k) + (k < 3)", "(q < k) * (k < 3)", "(q < k) + 1", "(q < k) + 0.5", "True + q", "(q < k) + s",
        "B0 + q", "(q < k) // 2", "q * 1.0", "(q < k) * 2 + (k < 3)", "s * 0.0 * q + k",
        "abs(s) * 0.0 + 1 / (abs(s) * -0.0)"],
}


@pytest.mark.parametrize("source", cases(OPERATIONS))
def test_an_operation_means_what_torch_means(source):
    assert_same_meaning(function(source))


def test_every_rule_has_a_case(monkeypatch):
    """A rule without a case above could mean anything."""
    used = set()

    class Watched(dict):
        def get(self, name):
            used.add(name)
            return super().get(name)

    monkeypatch.setattr(capture, "RULES", Watched(capture.RULES))
    for source in itertools.chain(*OPERATIONS.values()):
        with contextlib.suppress(TypeError, CaptureError, OverflowError):  # for which the test above fails
            graph_of(function(source))
    assert set(capture.RULES) - used == set()


CAPTURED = {
    "dimensions": ["s + T0", "s + T1[k]", "s + T2[q, k]", "s + T3[h, q, k]", "s + T4[b, h, q, k]", "I4[b, h, q, k]",
        "B2[q, k]"],
    "permuted indices": ["T2[q, q] + T2[k % Q, h]", "T4[b, 0, q, -1]"],
    "index arithmetic": ["T1[(q - k) % K]", "T1[torch.clamp(q - k, 0, K - 1)]", "T1[q // 2 + 1]",
        "I1[torch.where(q < k, q, 0)]", "T1[(q / 2).floor().int()]", "T1[I0 % K + 0 * q]"],
    "index from a table": ["T1[PER_KEY[k].long()]", "T2[PER_KEY[k] % Q, PER_KEY[q]]"],
    "one index after another": ["T3[h][q, k]", "T3[h][q][k]", "T4[b, h][q, k]", "T4[b][h, q][k]"],
    "constant index": ["T2[-1, k]", "T2[0, k]", "T2[0][k]", "T3[h, -2][k]", "T2[q][-1]", "I1[-2] + q", "s + T2[1, -1]"],
    "tensor made before indexing": ["(2 * T1)[k]", "T2[:, 1:][q, k % (K - 1)]", "T2.T[k, q]", "T1.sum() * s",
        "STRIDED[q, k % STRIDED.shape[1]]", "torch.tensor([1, 4, 2])[h]", "T1[None].expand(Q, K)[q, k]"],
    "dtypes": [f"PER_HEAD[torch.{name}][h] * s" for name in DTYPES],
    "integers and booleans stay": [f"PER_HEAD[torch.{name}][h]" for name in ("bool", "int32", "int64")],
    "small integers do not wrap": ["PER_HEAD[torch.int32][h] * 1000 + LENGTHS[b]"],
    "numbers without dimensions": ["s * T0 + I0", "torch.where(B0, q, I0)", "T0 < s", "T0 * 2 - q", "I0 * (q < k)"],
    "masks": ["k < LENGTHS[b]", "(q >= k) & (PER_KEY[q] == PER_KEY[k])", "B1[k] & ~B2[q, k]",
        "(q - k).abs() <= torch.where(h == 0, 2, I0.abs())"],
}


@pytest.mark.parametrize("source", cases(CAPTURED))
def test_a_captured_tensor_is_read_where_torch_reads_it(source):
    assert_same_meaning(function(source))


def test_methods_objects_and_default_arguments_are_functions_too():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("slopes", T1[:H])

        def score(self, s, b, h, q, k, scale=2.0):
            return s - self.slopes[h] * (q - k).abs() * scale

        forward = score

    bias = Bias()
    for fn in (bias.score, bias):
        torch.testing.assert_close(value_of(score_graph(fn)), bias.score(SCORES, *indices()))


def test_helpers_and_loops_of_python_are_followed():
    def near(a, b, width=2):
        return abs(a - b) <= width

    def fn(s, b, h, q, k):
        total = s
        for n in range(3):
            if n % 2 == 0:  # known now: an ordinary if
                total = total + near(q, k, n)
        return total

    assert_same_meaning(fn)


@pytest.mark.parametrize("visible", [True, False])
def test_a_mask_may_be_constant(visible):
    assert (value_of(mask_graph(lambda b, h, q, k: visible)) == visible).all()


@pytest.mark.parametrize("fn, expected", [
    (lambda s, b, h, q, k: 2, 2.0), (lambda s, b, h, q, k: -0.5, -0.5), (lambda s, b, h, q, k: q // 2 * 0 + 3, 3.0),
    (lambda s, b, h, q, k: T0, float(T0))], ids=["int", "float", "graph", "tensor"])
def test_a_score_is_a_float_whatever_is_returned(fn, expected):
    value = value_of(score_graph(fn))
    assert value.dtype == torch.float32
    assert (value == expected).all()


# ---- derivatives --------------------------------------------------------------------------------------------------------

DERIVED = {
    "linear": ["3 * s - q", "q - s", "-s / 3", "s * T1[k]"],
    "rational": ["s * s * s", "1 / s", "(s + q) / (s * s + 1)", "torch.square(s) - s", "s.reciprocal()"],
    "pow": ["s ** 3", "s ** (-2)", "s.abs() ** 1.5", "3.0 ** s", "s.abs() ** s", "s ** 12", "s.abs() ** T1[k]",
        "s ** (h + 1)"],
    "functions": ["torch.exp(s)", "torch.exp2(2 * s)", "torch.log(s.abs())", "torch.log2(s * s)", "torch.sqrt(s.abs())",
        "torch.rsqrt(s * s + q)", "s.sin() * s.cos()", "torch.erf(s)", "5 * torch.tanh(s / 5)", "s * torch.sigmoid(1.7 * s)"],
    "pieces": ["torch.where(q < k, s, 2 * s)", "torch.where(s > 0, s, 0.01 * s)", "s.abs()", "torch.relu(s)",
        "s.clamp(-0.5, 0.5)", "torch.maximum(s, 0.3 * s)", "torch.minimum(s, T0 * s)", "torch.where(q < k, s, -math.inf)",
        "s.where(q < k, s * s)", "s.masked_fill(q < k, 0.0)"],
    "steps": ["s * torch.floor(3 * s)", "s - torch.ceil(s)", "s * (s > 0)", "s * s.int()", "s % 0.7",
        "s * s.sign()", "s + s.floor()", "T1[s.int() % K] * s"],
    "chains": ["torch.tanh(torch.exp(s) * s) / (1 + s * s)", "torch.where(s > q - 2, torch.sin(s), T1[k] * s) ** 2",
        "s.half().float() * 0.5", "(s * 2).bfloat16().float()"],
}


@pytest.mark.parametrize("source", cases(DERIVED))
def test_derivatives_equal_autograd(source):
    fn = function(source)
    scores = (SCORES.double() * 2).requires_grad_()
    (expected,) = torch.autograd.grad(fn(scores, *indices()).sum(), scores)
    value = value_of(derivative(score_graph(fn)), scores.detach())
    torch.testing.assert_close(value, expected.expand(SIZES), rtol=1e-12, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("source", cases(DERIVED))
def test_second_derivatives_of_a_program_equal_autograd(source):
    fn = function(source)
    scores = (SCORES.double() * 2).requires_grad_()
    (first,) = torch.autograd.grad(fn(scores, *indices()).sum(), scores, create_graph=True)
    second = torch.autograd.grad(first.sum(), scores)[0] if first.requires_grad else torch.zeros(SIZES)
    q = torch.zeros(B, Q, H, 8)
    problem, x = make(q, torch.zeros(B, K, H, 8), torch.zeros(B, K, H, 8), score_mod=fn)
    longer, y = problem.curved(x)
    (lines, *groups), (longer_lines, *longer_groups) = (p.program.split("|") for p in (problem, longer))
    place = GROUPS.index("score_curvature")
    assert (longer_lines.startswith(lines), groups[place]) == (True, "")
    assert [*longer_groups[:place], "", *longer_groups[place + 1:]] == groups  # all else stays
    assert y.floats[:len(x.floats)] == list(x.floats)
    curvature = longer.graphs.score_curvature
    leaves = dict(zip("bhqk", indices(), strict=True)) | {"s": scores.detach()}
    values = leaf_values(slot_values(y.captured, y.ints, y.floats, torch.float64), B, H, Q, K) | leaves
    value = torch.as_tensor(0.0 if curvature is None else evaluate(curvature, values))
    torch.testing.assert_close(value.expand(SIZES), second.expand(SIZES), rtol=1e-11, atol=1e-11, check_dtype=False)


@pytest.mark.parametrize("source, expected", [("2.5 % s", -torch.floor(2.5 / SCORES)), ("s % T0", torch.ones(SIZES)),
                                              ("s + s // 0.3", torch.ones(SIZES))])
def test_derivatives_that_autograd_does_not_have(source, expected):
    torch.testing.assert_close(value_of(derivative(score_graph(function(source)))), expected)


@pytest.mark.parametrize("source", ["q * 2.0", "T1[k]", "1.0", "(s > 0).float()", "s.floor()", "s // 0.3", "T1[s.int() % K]"])
def test_what_does_not_follow_the_score_has_no_derivative(source):
    assert derivative(score_graph(function(source))) is None


def test_a_branch_not_taken_does_not_reach_the_derivative():
    """0 * inf: autograd gives NaN here, the branch that counts has a derivative."""
    gradient = derivative(score_graph(lambda s, b, h, q, k: torch.where(s > 0, torch.sqrt(s), 0.0)))
    value = value_of(gradient)
    torch.testing.assert_close(value, torch.where(SCORES > 0, 0.5 / SCORES.abs().sqrt(), 0.0))


# ---- the programs -------------------------------------------------------------------------------------------------------

def text(*exprs):
    return lower([exprs]).text


def lines(expr):
    return text(expr).split("|")[0].split(";")


@pytest.mark.parametrize("source, length", [
    ("(q - k) * (q - k)", 2), ("T1[k] * T1[k]", 2), ("T3[h][q, k] - T3[h, q, k]", 2), ("T1[k + b].exp() + T1[k + b].exp()", 4),
    ("s.relu() * s.relu()", 2), ("s.reciprocal() + s.reciprocal()", 2), ("(T0 + s) * (T0 + s)", 3),
    ("q.float() * s + q.float()", 3)])
def test_equal_operations_are_computed_once(source, length):
    assert len(lines(graph_of(function(source)))) == length


def test_sharing_survives_lowering_and_differentiation():
    """Written out, these expressions have 2^60 terms."""
    def doubled(s, b, h, q, k):
        for _ in range(60):
            s = s + s
        return s

    def nested(s, b, h, q, k):
        for _ in range(60):
            s = torch.sin(s) * s
        return s

    expr = score_graph(doubled)
    assert len(lines(expr)) == 60
    assert torch.equal(value_of(expr), SCORES * 2.0**60)
    assert (value_of(derivative(expr)) == 2.0**60).all()
    assert len(lines(score_graph(nested))) == 120
    assert len(lines(derivative(score_graph(nested)))) <= 60 * 7


def windowed(bias, width, cap):
    def fn(s, b, h, q, k):
        return torch.where((q - k).abs() < width, cap * torch.tanh(s / cap), bias[h][q, k]) + bias[-1, q, 0]
    return fn


def test_the_text_knows_neither_numbers_nor_sizes():
    one, other = (score_graph(windowed(*x)) for x in [(torch.zeros(3, 5, 7), 2, 0.5), (torch.zeros(8, 64, 32).mT, 4096, 30.0)])
    assert text(one) == text(other)
    assert text(derivative(one)) == text(derivative(other))
    for number in ("4096", "30", "0.5", "64", "32"):
        assert number not in text(other)


def test_the_text_does_not_know_that_two_numbers_are_equal():
    """Or a window whose sides happen to be equal would compile again."""
    def between(left, right):
        return mask_graph(lambda b, h, q, k: (q - k <= left) & (k - q <= right))
    assert text(between(3, 5)) == text(between(4, 4))


def test_two_captures_of_one_function_are_one_program():
    fn = windowed(T3, 3, 2.0)
    one, other = (lower([[score_graph(fn)]]) for _ in range(2))
    assert one.text == other.text
    assert (one.ints, one.floats) == (other.ints, other.floats)
    assert [id(t) for t in one.captured] == [id(t) for t in other.captured] == [id(T3)]


def test_the_text_knows_what_needs_other_code():
    """Kinds of tensors and the order of operations are in the text: otherwise a kernel would be taken for another."""
    sources = [f"s * PER_HEAD[torch.{name}][h]" for name in ("int32", "int64", "bool", "float32")]
    sources += ["s - q", "q - s", "s - k", "s - q // 2", "s - q % 2", "s.half() - q"]
    assert len({text(score_graph(function(source))) for source in sources}) == len(sources)


# ---- errors -------------------------------------------------------------------------------------------------------------

def data_dependent_if(s, b, h, q, k):
    if q < k:
        return s
    return -s


def data_dependent_while(s, b, h, q, k):
    while q < k:
        q = q + 1
    return s


def item_is_set(s, b, h, q, k):
    WRITTEN[0] = 5.0
    return s


def item_is_set_at_an_index(s, b, h, q, k):
    WRITTEN[k] = s
    return s


def item_is_added_to(s, b, h, q, k):
    WRITTEN[k] += 1.0
    return s


def tensor_is_added_to(s, b, h, q, k):
    global WRITTEN
    WRITTEN += 1.0
    return s


def tensor_is_raised(s, b, h, q, k):
    global WRITTEN
    WRITTEN **= 2.0
    return s


def score_is_set(s, b, h, q, k):
    s[0] = 1.0
    return s


SCORE_ERRORS = {
    "if": (data_dependent_if, "torch.where.* instead of if", "if q < k:"),
    "while": (data_dependent_while, "torch.where.* instead of if", "while q < k:"),
    "and": (lambda s, b, h, q, k: torch.where(q < k and k < 3, s, 0), "& | ~ instead of and", ""),
    "or": (lambda s, b, h, q, k: q or k, "& | ~ instead of and, or, not", ""),
    "not": (lambda s, b, h, q, k: torch.where(not q, s, 0), "& | ~ instead of and, or, not", ""),
    "chained comparison": (lambda s, b, h, q, k: torch.where(1 < q < 3, s, 0), "& | ~ instead of and", ""),
    "Python's min": (lambda s, b, h, q, k: s + min(q, k), "value .* is not known", ""),
    "int()": (lambda s, b, h, q, k: s + int(q), "value .* is not known", ""),
    "math": (lambda s, b, h, q, k: math.exp(s), "value .* is not known", ""),
    "range": (lambda s, b, h, q, k: sum(range(q)), "value .* is not known", ""),
    "item": (lambda s, b, h, q, k: s.item(), "item is not supported", ""),
    "set": (item_is_set, "setitem.*: writing into tensors", "WRITTEN[0] = 5.0"),
    "set at an index": (item_is_set_at_an_index, "setitem.*: writing into tensors", "WRITTEN[k] = s"),
    "item +=": (item_is_added_to, "setitem.*: writing into tensors", "WRITTEN[k] += 1.0"),
    "tensor +=": (tensor_is_added_to, "add.*: writing into tensors", "WRITTEN += 1.0"),
    "tensor **=": (tensor_is_raised, "pow.*: writing into tensors", "WRITTEN **= 2.0"),
    "set of the score": (score_is_set, "writing into tensors", "s[0] = 1.0"),
    "score.add_": (lambda s, b, h, q, k: s.add_(1.0), "add: writing into tensors", ""),
    "tensor.add_": (lambda s, b, h, q, k: s + WRITTEN.mul_(2.0)[k], "mul_: writing into tensors", ""),
    "tensor.add_ of the score": (lambda s, b, h, q, k: WRITTEN.add_(s), "add: writing into tensors", ""),
    "out=": (lambda s, b, h, q, k: s + torch.mul(WRITTEN, 2.0, out=WRITTEN)[k], "mul.*writing into tensors|mul.*out", ""),
    "out= of the score": (lambda s, b, h, q, k: torch.mul(s, 2.0, out=WRITTEN), "mul.*writing into tensors|mul.*out", ""),
    "rand": (lambda s, b, h, q, k: s + torch.rand(()), "rand: random numbers", ""),
    "rand_like": (lambda s, b, h, q, k: s + torch.rand_like(s), "rand_like: random numbers", ""),
    "bernoulli": (lambda s, b, h, q, k: s.bernoulli(), "bernoulli: random numbers", ""),
    "dropout": (lambda s, b, h, q, k: F.dropout(s), "dropout: random numbers", ""),
    "filled at random": (lambda s, b, h, q, k: s + WRITTEN.uniform_()[k], "uniform_: ", ""),
    "sort": (lambda s, b, h, q, k: torch.sort(s), "sort is not supported", ""),
    "softmax": (lambda s, b, h, q, k: s.softmax(-1), "softmax is not supported", ""),
    "stack": (lambda s, b, h, q, k: torch.stack([s, s]), "stack is not supported", ""),
    "sum": (lambda s, b, h, q, k: s.sum(), "sum is not supported", ""),
    "atan": (lambda s, b, h, q, k: torch.atan(s), "atan is not supported", ""),
    "shift": (lambda s, b, h, q, k: s + (q >> 1), "shift is not supported", ""),
    "reflected shift": (lambda s, b, h, q, k: s + (1 << q), "shift is not supported", ""),
    "matmul": (lambda s, b, h, q, k: s @ s, "matmul is not supported", ""),
    "round": (lambda s, b, h, q, k: round(s), "round", ""),
    "reduction by max": (lambda s, b, h, q, k: torch.max(s), "max: a reduction is not supported", ""),
    "reduction by max along": (lambda s, b, h, q, k: s.max(dim=0), "max: ", ""),
    "reduction by max along 0": (lambda s, b, h, q, k: s.max(0), "max: ", ""),
    "slice": (lambda s, b, h, q, k: T2[q, :], "slices", ""),
    "slice to an index": (lambda s, b, h, q, k: T1[:k].sum(), "slice|is not known", ""),
    "ellipsis": (lambda s, b, h, q, k: T2[..., k], r"None or \.\.\.", ""),
    "new dimension": (lambda s, b, h, q, k: T1[None, k], r"None or \.\.\.", ""),
    "list": (lambda s, b, h, q, k: T2[[0, 1], k], "lists", ""),
    "float index": (lambda s, b, h, q, k: T1[q / 2], "an index must be a whole number", ""),
    "boolean index": (lambda s, b, h, q, k: T1[q < k], "an index must be a whole number", ""),
    "too many indices": (lambda s, b, h, q, k: T1[q, k], "too many indices for a tensor of 1 dimensions", ""),
    "too many indices one by one": (lambda s, b, h, q, k: T1[k][q], "an index expression cannot be indexed", ""),
    "index of a number": (lambda s, b, h, q, k: T0[q], "too many indices for a tensor of 0 dimensions", ""),
    "index of the score": (lambda s, b, h, q, k: s[q], "an index expression cannot be indexed", ""),
    "tensor for an index": (lambda s, b, h, q, k: T2[LENGTHS, k], "a tensor of 1 dimensions", ""),
    "five dimensions": (lambda s, b, h, q, k: T4[None][0 * q, b, h, q, k], "at most 4 dimensions", ""),
    "arithmetic of rows": (lambda s, b, h, q, k: s + T2[q], "a tensor of 1 dimensions.*index it", ""),
    "rows times number": (lambda s, b, h, q, k: (T2[q] * 2)[k], "whole row", ""),
    "rows plus rows": (lambda s, b, h, q, k: (T2[q] + T2[h])[k], "whole row", ""),
    "sum of rows": (lambda s, b, h, q, k: torch.sum(T2[q]), "sum.*", ""),
    "method of rows": (lambda s, b, h, q, k: T2[q].sum(), "sum of a whole row", ""),
    "whole tensor": (lambda s, b, h, q, k: s + T1, "a tensor of 1 dimensions.*index it", ""),
    "complex": (lambda s, b, h, q, k: s + COMPLEX[k], "complex64", ""),
    "sparse": (lambda s, b, h, q, k: s + SPARSE[k], "torch.sparse_coo", ""),
    "integer beyond 32 bits": (lambda s, b, h, q, k: s + (q - 2**31), "2147483648 is beyond 32 bits", ""),
    "string": (lambda s, b, h, q, k: s + "x", "str among index expressions", ""),
    "float64": (lambda s, b, h, q, k: s.to(torch.float64), "torch.float64 is not supported", ""),
    "device": (lambda s, b, h, q, k: torch.zeros((), device=s.device), "device: ", ""),
    "bits of floats": (lambda s, b, h, q, k: s & 1, "and: .*floating", ""),
    "inverted float": (lambda s, b, h, q, k: ~s, "invert: ", ""),
    "negated boolean": (lambda s, b, h, q, k: s * -(q < k), "neg: ", ""),
    "absolute boolean": (lambda s, b, h, q, k: s * abs(q < k), "abs: ", ""),
    "difference of booleans": (lambda s, b, h, q, k: (q < k) - (k < 3), "sub: sub of two booleans", ""),
    "condition that is a number": (lambda s, b, h, q, k: torch.where(q, s, 0), "where: expected a boolean condition", ""),
    "rounding mode": (lambda s, b, h, q, k: torch.div(q, 2, rounding_mode="trunc"), "div: rounding_mode='trunc'", ""),
    "unknown argument": (lambda s, b, h, q, k: s.add(q, beta=2), "add: .*beta", ""),
    "attribute": (lambda s, b, h, q, k: s.T + 1, "T ", ""),
}
COMPLEX = torch.zeros(K, dtype=torch.complex64)
SPARSE = torch.zeros(K).to_sparse()


@pytest.mark.parametrize("fn, words, source", SCORE_ERRORS.values(), ids=SCORE_ERRORS)
def test_what_cannot_be_a_graph_says_where_and_why(fn, words, source):
    before = WRITTEN.clone()
    with pytest.raises(CaptureError, match=words) as caught:
        score_graph(fn)
    # the function, the line that is at fault and its source
    code = fn.__code__
    source = source or linecache.getline(code.co_filename, code.co_firstlineno).strip()
    assert fn.__qualname__.replace("<locals>.", "") in str(caught.value)
    assert source in str(caught.value)
    assert f"line {_line_of(code, source)}:" in str(caught.value)
    assert torch.equal(WRITTEN, before)  # refused, not done


def _line_of(code, source):
    """The line of the file, from the function's first on, that holds `source`."""
    line = code.co_firstlineno
    while linecache.getline(code.co_filename, line).strip() != source:
        line += 1
    return line


@pytest.mark.parametrize("graph, fn, words", [
    (mask_graph, lambda b, h, q, k: q - k, "a mask_mod returns a boolean for each score, got a whole number"),
    (mask_graph, lambda b, h, q, k: q / 2, "a mask_mod returns a boolean .* got a floating number"),
    (mask_graph, lambda b, h, q, k: None, "a mask_mod returns a boolean .* got NoneType"),
    (mask_graph, lambda b, h, q, k: (q < k, q > k), "a mask_mod returns a boolean .* got tuple"),
    (mask_graph, lambda b, h, q, k: 1, "a mask_mod returns a boolean .* got int"),
    (mask_graph, lambda b, h, q, k: B1, "a tensor of 1 dimensions"),
    (score_graph, lambda s, b, h, q, k: q < k, "a score_mod returns a score, a number, got a boolean"),
    (score_graph, lambda s, b, h, q, k: True, "a score_mod returns a score, a number, got bool"),
    (score_graph, lambda s, b, h, q, k: None, "a score_mod returns a score, a number, got NoneType"),
    (score_graph, lambda s, b, h, q, k: T2[q], "a score_mod returns a score, a number"),
    (score_graph, lambda s, b, h, q, k: T2, "a tensor of 2 dimensions"),
    (mask_graph, lambda q, k: q < k, r"expected mask_mod\(b, h, q_idx, kv_idx\): too many"),
    (mask_graph, lambda s, b, h, q, k: q < k, r"expected mask_mod\(b, h, q_idx, kv_idx\): missing .*'k'"),
    (score_graph, lambda b, h, q, k: q, r"expected score_mod\(score, b, h, q_idx, kv_idx\): too many"),
    (score_graph, lambda s, b, h, q, k, *, w: s, "missing a required .*'w'"),
    (mask_graph, 3, r"expected a function mask_mod\(b, h, q_idx, kv_idx\), got 3"),
    (score_graph, None, r"expected a function score_mod\(.*\), got None"),
])
def test_wrong_results_and_arguments(graph, fn, words):
    with pytest.raises(CaptureError, match=words) as caught:
        graph(fn)
    assert not callable(fn) or "<lambda>" in str(caught.value)


def test_what_came_back_wrong_is_not_blamed_on_a_line_of_the_caller():
    def returns_rows(s, b, h, q, k):
        return T2

    with pytest.raises(CaptureError) as caught:
        score_graph(returns_rows)
    assert "score_graph(returns_rows)" not in str(caught.value)


def test_errors_of_the_function_itself_pass_through():
    def broken(b, h, q, k):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        mask_graph(broken)


def test_a_captured_tensor_is_named_in_errors_by_the_function_s_own_name():
    def fn(s, b, h, q, k):
        return s + T1[k] + local[h]

    local = torch.zeros(H)
    names = [load.args[0].value.name for load in lower([[score_graph(fn)]]).loads]
    assert [name.split(": ")[-1] for name in names] == ["T1", "local"]
    assert all("fn" in name for name in names)


def test_a_closure_not_yet_filled_does_not_matter():
    def fn(s, b, h, q, k):
        return s + T1[k] if h is not None else later

    assert score_graph(fn).kind == "f"
    later = None
