"""Packed sequences: each is attention of its own, whatever shares the call; who is told what; what may not be read."""
import sys

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import AVAILABLE, DEVICE, INTERPRETING

import tilewise as tw
from tilewise.packing import cu_seqlens

pytestmark = pytest.mark.usefixtures("one_thread")
CPU_ONLY = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
NATIVE = "tiled" if "tiled" in AVAILABLE else "triton"


def offsets(lengths):
    return cu_seqlens(torch.tensor(lengths, dtype=torch.int64, device=DEVICE))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE).requires_grad_()


def batch(lengths_q, lengths_k=None, heads=4, kv_heads=2, dim=8, dtype=torch.float32):
    """q, k, v, cu_seqlens_q, cu_seqlens_k."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    return (normal(sum(lengths_q), heads, dim, dtype=dtype), normal(sum(lengths_k), kv_heads, dim, seed=1, dtype=dtype),
            normal(sum(lengths_k), kv_heads, dim, seed=2, dtype=dtype), offsets(lengths_q), offsets(lengths_k))


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ---- each sequence is attention of its own ------------------------------------------------------------------------------

@st.composite
def batches(draw_from):
    """(lengths, heads, kv_heads, head_dim, head_dim_v, options by name, seed)."""
    lengths = draw_from(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6))
    kv_heads, group = draw_from(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    options = draw_from(st.fixed_dictionaries({}, optional=dict(
        causal=st.just(True), window=st.tuples(st.none() | st.integers(0, 20), st.none() | st.integers(0, 20)),
        softcap=st.just(3.0), alibi=st.sampled_from([1, 2]), dropout_p=st.sampled_from([0.1, 0.5]), sinks=st.just(True),
        bias=st.tuples(*[st.booleans()] * 4), first_sequence=st.integers(0, 9), scale=st.sampled_from([0.0, -0.3]))))
    return lengths, kv_heads * group, kv_heads, draw_from(st.integers(1, 24)), draw_from(st.integers(1, 24)), options, draw_from(
        st.integers(0, 3))


def settled(options, tensors, b=None):
    """The keyword arguments of a whole batch, or of its sequence b alone (with `b` its number, queries and keys)."""
    made = {name: options[name] for name in ("causal", "dropout_p", "scale") if name in options}
    first = options.get("first_sequence", 0)
    if "dropout_p" in options:
        made["rng"] = tw.Rng(2**40 + 3, 7, first if b is None else first + b[0])
    if "window" in options:
        made["mask"] = tw.window(*options["window"])
    mods = [tw.softcap(options["softcap"])] if "softcap" in options else []
    if "alibi" in options:
        slopes = tensors["slopes"]
        mods.append(tw.alibi(slopes if b is None or slopes.dim() == 1 else slopes[b[0]]))
    if mods:
        made["score_mod"] = mods
    if "sinks" in options:
        made["sinks"] = tensors["sinks"]
    if "bias" in options:
        bias = tensors["bias"]
        if b is not None:
            own = slice(b[0], b[0] + 1) if bias.shape[0] > 1 else slice(None)
            bias = bias[own, :, :b[1] if bias.shape[2] > 1 else 1, :b[2] if bias.shape[3] > 1 else 1]
        made["bias"] = bias
    return made


def one_at_a_time(tensors, lengths, options, backend):
    """out [total, H, D_v] and lse [H, total] by `tw.attention` of each sequence."""
    outs, lses, at = [tensors["q"].new_zeros(0, *tensors["dout"].shape[1:])], [tensors["dlse"][:, :0]], [0, 0]
    for b, (nq, nk) in enumerate(lengths):
        q, k, v = (tensors[name][None, start:start + n] for name, start, n in zip("qkv", (at[0], at[1], at[1]), (nq, nk, nk),
                                                                                strict=True))
        out, lse = tw.attention(q, k, v, **settled(options, tensors, (b, nq, nk)), return_lse=True, backend=backend)
        outs.append(out[0])
        lses.append(lse[0])
        at = [at[0] + nq, at[1] + nk]
    return torch.cat(outs), torch.cat(lses, 1)


def results(attend, tensors, leaves):
    """out, lse and the gradients of leaves by one random gradient of out and lse."""
    out, lse = attend()
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    loss = (out * tensors["dout"]).sum() + (finite * tensors["dlse"]).sum()
    return out, lse, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def assert_each_alone(problem, backend, alone):
    lengths, heads, kv_heads, dim, dim_v, options, seed = problem
    lengths_q, lengths_k = [n for n, _ in lengths], [n for _, n in lengths]
    count, longest_q, longest_k = len(lengths), max(lengths_q, default=0), max(lengths_k, default=0)
    full = (count, heads, longest_q, longest_k)
    shapes = dict(q=(sum(lengths_q), heads, dim), k=(sum(lengths_k), kv_heads, dim), v=(sum(lengths_k), kv_heads, dim_v),
                  sinks=(heads,), bias=[size if own else 1 for size, own in zip(full, options.get("bias", ()), strict=False)],
                  dout=(sum(lengths_q), heads, dim_v), dlse=(heads, sum(lengths_q)),
                  slopes=(count, heads)[2 - options.get("alibi", 2):])
    tensors = {name: normal(*shape, seed=seed + 10 * i) for i, (name, shape) in enumerate(shapes.items())}
    leaves = [tensors[name] for name in ("q", "k", "v", *(name for name in ("sinks", "bias") if name in options))]

    def packed():
        return tw.attention_varlen(
            tensors["q"], tensors["k"], tensors["v"], offsets(lengths_q), offsets(lengths_k), max_seqlen_q=longest_q,
            max_seqlen_k=longest_k, **settled(options, tensors), return_lse=True, backend=backend)

    found = results(packed, tensors, leaves)
    expected = results(lambda: one_at_a_time(tensors, lengths, options, alone), tensors, leaves)
    assert_same(found, expected, rtol=2e-5, atol=2e-5)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@CPU_ONLY
@examples(200)
@given(batches())
def test_tiled_is_attention_of_each_sequence(small_tiles, problem):
    assert_each_alone(problem, "tiled", "tiled")


@CPU_ONLY
@examples(60)
@given(batches())
def test_reference_is_attention_of_each_sequence(problem):
    assert_each_alone(problem, "reference", "reference")


@pytest.mark.skipif("triton" not in AVAILABLE, reason="no GPU and not interpreting")
@examples(40)
@given(batches())
def test_triton_is_attention_of_each_sequence(problem):
    assert_each_alone(problem, "triton", "tiled" if INTERPRETING else "triton")
