"""Random problems: every combination of features, shapes, strides and dtypes keeps the tolerance rule."""
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import AVAILABLE, DEVICE

import tilewise as tw
from tilewise.bench import tolerance
from tilewise.bench.cases import Case, draw


def random_function(step, width, ids):
    return tw.mask_mod(lambda b, h, q, k: ((q - k) % step == 0) | ((q - k).abs() <= width) & (ids[q] >= h - 1))


def masks(nq, nk):
    lengths = st.lists(st.integers(0, nk), min_size=2, max_size=2)
    ids = lambda n: st.lists(st.integers(-1, 2), min_size=n, max_size=n)  # noqa: E731
    leaf = st.one_of(
        st.just(lambda m: tw.causal()),
        st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)).map(lambda w: lambda m: tw.window(*w)),
        lengths.map(lambda n: lambda m: tw.key_lengths(m.values(n))), lengths.map(lambda n: lambda m: tw.prefix(m.values(n))),
        st.integers(1, 40).map(lambda c: lambda m: tw.chunked(c)),
        st.tuples(ids(nq), ids(nk)).map(lambda x: lambda m: tw.documents(
            torch.tensor(x[0], dtype=torch.int64, device=m.device), torch.tensor(x[1], dtype=torch.int64, device=m.device))))
    function = st.tuples(st.integers(1, 9), st.integers(0, 40), ids(nq)).map(lambda x: lambda m: random_function(
        *x[:2], torch.tensor(x[2] or [0], device=m.device)))
    leaf = st.one_of(leaf, function)
    return st.recursive(leaf, lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda ab: lambda m: ab[0](m) & ab[1](m)),
        st.tuples(inner, inner).map(lambda ab: lambda m: ab[0](m) | ab[1](m)), inner.map(lambda a: lambda m: ~a(m))),
        max_leaves=3)


@st.composite
def problems(draw_from):
    nq, nk = draw_from(st.integers(0, 50)), draw_from(st.integers(0, 50))
    kv_heads, group = draw_from(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    heads = kv_heads * group
    bias = draw_from(st.none() | st.sampled_from(
        [(2, heads, nq, nk), (heads, nq, nk), (nq, nk), (2, 1, 1, nk), (nq, 1), (nk,)]))
    mask = draw_from(st.none() | masks(nq, nk))
    mods = draw_from(st.lists(st.sampled_from(["softcap", "alibi", "alibi2", "function"]), max_size=2))
    plain = draw_from(st.fixed_dictionaries({}, optional=dict(
        causal=st.booleans(), scale=st.sampled_from([0.0, -0.2, 0.7]), dropout_p=st.sampled_from([0.1, 0.5]),
        batch_invariant=st.booleans())))
    sinks = draw_from(st.booleans())

    def options(m):
        made = dict(plain)
        if "dropout_p" in plain:
            made["rng"] = tw.Rng(nq * 100 + nk)
        if mask is not None:
            made["mask"] = mask(m)
        if mods:
            named = {"softcap": lambda: tw.softcap(2.0), "alibi": lambda: tw.alibi(m.uniform(heads)),
                     "alibi2": lambda: tw.alibi(m.normal(2, heads)),
                     "function": lambda: lambda s, b, h, q, k: s * torch.sigmoid(0.1 * (q - 2 * k) + h) + b}
            made["score_mod"] = [named[mod]() for mod in mods]
        if bias is not None:
            made["bias"] = m.normal(*bias)
        if sinks:
            made["sinks"] = m.normal(heads)
        return made

    return Case("random", seqlen_q=nq, seqlen_k=nk, heads=heads, kv_heads=kv_heads, head_dim=draw_from(st.integers(1, 40)),
                head_dim_v=draw_from(st.integers(1, 40)), options=options, layout=draw_from(st.sampled_from(["bshd", "bhsd"])))


@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(problems(), st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 3))
def test_any_combination(small_tiles, case, dtype, seed):
    call = draw(case, dtype, DEVICE, seed)
    for backend in AVAILABLE:
        if backend == "tiled" and call.options.get("batch_invariant"):
            continue
        wrong = [verdict for verdict in tolerance.check(call, backend) if not verdict.ok]
        assert not wrong, (backend, wrong)
