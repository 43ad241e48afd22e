"""Packed sequences: each is attention of its own, whatever shares the call; who is told what; what may not be read."""
import sys

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import AVAILABLE, DEVICE, INTERPRETING
from support.memory import peak_apart
from torch.overrides import TorchFunctionMode

import tilewise as tw
import tilewise.ops  # registers the custom op
from tilewise.backends import Needs
from tilewise.backends.gpu_math.schedule import schedule
from tilewise.backends.triton.configs import Config
from tilewise.bench.cases import draw, named
from tilewise.packing import cu_seqlens
from tilewise.sequences import packed_rows
from tilewise.trace import tile_lists

pytestmark = pytest.mark.usefixtures("one_thread")
CPU_ONLY = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
ON_TRITON = pytest.mark.skipif("triton" not in AVAILABLE, reason="no GPU and not interpreting")


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
    """(lengths, (heads, kv_heads), head dims, how much longer the longest are said to be, options by name, seed)."""
    lengths = draw_from(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6))
    kv_heads, group = draw_from(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    options = draw_from(st.fixed_dictionaries({}, optional=dict(
        causal=st.just(True), window=st.tuples(st.none() | st.integers(0, 20), st.none() | st.integers(0, 20)),
        softcap=st.just(3.0), alibi=st.sampled_from([1, 2]), dropout_p=st.sampled_from([0.1, 0.5]), sinks=st.just(True),
        bias=st.tuples(*[st.booleans()] * 4), first_sequence=st.integers(0, 9), scale=st.sampled_from([0.0, -0.3]))))
    dims, slack = draw_from(st.tuples(*[st.integers(1, 24)] * 2)), draw_from(st.sampled_from([(0, 0), (1, 30), (40, 0)]))
    return lengths, (kv_heads * group, kv_heads), dims, slack, options, draw_from(st.integers(0, 3))


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
    lengths, (heads, kv_heads), (dim, dim_v), slack, options, seed = problem
    lengths_q, lengths_k = [n for n, _ in lengths], [n for _, n in lengths]
    count = len(lengths)
    longest_q, longest_k = (max(n, default=0) + more for n, more in zip((lengths_q, lengths_k), slack, strict=True))
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


@ON_TRITON
@examples(40)
@given(batches())
def test_triton_is_attention_of_each_sequence(problem):
    assert_each_alone(problem, "triton", "tiled" if INTERPRETING else "triton")


@ON_TRITON
def test_rows_of_a_batch_invariant_call_do_not_depend_on_the_other_sequences():
    lengths_q, lengths_k = [40, 1, 0, 9], [40, 70, 5, 33]
    q, k, v, cu_q, cu_k = batch(lengths_q, lengths_k)
    options = dict(causal=True, batch_invariant=True, backend="triton")
    whole = tw.attention_varlen(q, k, v, cu_q, cu_k, **options)
    of_k = tw.unpack(k, cu_k), tw.unpack(v, cu_k)
    for own, q_b, k_b, v_b in zip(tw.unpack(whole, cu_q), tw.unpack(q, cu_q), *of_k, strict=True):
        assert torch.equal(own, tw.attention(q_b[None], k_b[None], v_b[None], **options)[0])
        assert torch.equal(own[-1:], tw.attention(q_b[None, -1:], k_b[None], v_b[None], **options)[0])


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"])
def test_gradient_of_distances_where_a_sequence_is_empty(backend):
    q = normal(1, 2, 8)
    for sign in (1, -1):
        table = normal(1)
        mod = tw.score_mod(lambda s, b, h, q, k, table=table, sign=sign: s + table[sign * (k - q)])
        _, lse = tw.attention_varlen(q, q, q, offsets([1, 0]), score_mod=mod, return_lse=True, backend=backend)
        torch.testing.assert_close(torch.autograd.grad(lse.sum(), table)[0], 2 * torch.ones_like(table))


# ---- how lengths are told -----------------------------------------------------------------------------------------------

def test_keys_are_packed_like_queries_by_default():
    q, k, v, cu, _ = batch([7, 0, 20])
    for options in (dict(), dict(max_seqlen_q=25)):
        found = tw.attention_varlen(q, k, v, cu, causal=True, backend=AVAILABLE[-1], **options)
        assert torch.equal(found, tw.attention_varlen(q, k, v, cu, cu, causal=True, backend=AVAILABLE[-1]))


def test_offsets_of_64_bits():
    q, k, v, cu_q, cu_k = batch([7, 0, 20], [9, 3, 20])
    used = torch.tensor([5, 0, 20], device=DEVICE)
    options = dict(causal=True, backend=AVAILABLE[-1])
    found = tw.attention_varlen(q, k, v, cu_q.long(), cu_k.long(), seqused_q=used, seqused_k=used, **options)
    assert torch.equal(found, tw.attention_varlen(q, k, v, cu_q, cu_k, seqused_q=used.int(), seqused_k=used.int(), **options))


@pytest.mark.parametrize("longest", [20, 33, 100])
def test_bias_and_masks_are_as_long_as_the_longest_is_said_to_be(longest):
    q, k, v, cu, _ = batch([7, 0, 20])
    bias = normal(3, 4, longest, longest)
    visible = normal(longest, longest).detach() < 0.5
    options = dict(max_seqlen_q=longest, backend=AVAILABLE[-1])
    found = tw.attention_varlen(q, k, v, cu, bias=bias, mask=visible, **options)
    options["max_seqlen_q"] = 20
    expected = tw.attention_varlen(q, k, v, cu, bias=bias[:, :, :20, :20], mask=visible[:20, :20], **options)
    assert_same([found, *torch.autograd.grad(found.square().sum(), (q, bias))],
                [expected, *torch.autograd.grad(expected.square().sum(), (q, bias))])


def test_a_change_of_lengths_is_noticed():
    """What is remembered of a tensor holds for as long as no one writes to it."""
    q, k, v, cu, _ = batch([7, 13, 20])
    attend = lambda cu: tw.attention_varlen(q, k, v, cu, causal=True, backend=AVAILABLE[-1])  # noqa: E731
    before = attend(cu)
    cu[1] = 15
    after = attend(cu)
    assert not torch.equal(after, before)
    assert torch.equal(after, attend(cu.clone()))


def nested(*lengths, heads=4, dim=8, seed=0):
    sequences = [normal(n, heads, dim, seed=seed + i) for i, n in enumerate(lengths)]
    return torch.nested.as_nested_tensor(sequences, layout=torch.jagged), sequences


@CPU_ONLY
@pytest.mark.parametrize("lengths_k", [(3, 0, 40), (9, 5, 2)], ids=["self", "cross"])
def test_nested_tensors(lengths_k):
    (q, of_q), (k, of_k), (v, of_v) = nested(3, 0, 40), nested(*lengths_k, heads=2, seed=5), nested(*lengths_k, heads=2, seed=9)
    out, lse = tw.attention_varlen(q, k, v, causal=True, return_lse=True)
    packed, cu_q = tw.pack(of_q)
    expected, expected_lse = tw.attention_varlen(packed, tw.pack(of_k)[0], tw.pack(of_v)[0], cu_q, tw.pack(of_k)[1],
                                                 causal=True, return_lse=True)
    assert out.is_nested
    assert out.shape == q.shape                             # of the same j: they may be added
    assert torch.equal((q + out).values(), packed + expected)
    assert torch.equal(lse, expected_lse)
    leaves = of_q + of_k + of_v
    assert_same(*(torch.autograd.grad(x.square().sum(), leaves, allow_unused=True, materialize_grads=True)
                  for x in (out.values(), expected)))


@CPU_ONLY
def test_autocast():
    q, k, v, cu_q, cu_k = batch([7, 0, 20])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, lse = tw.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, tw.attention_varlen(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu_q, cu_k))


# ---- errors -------------------------------------------------------------------------------------------------------------

def ints(*values, **options):
    return torch.tensor(values, **{"dtype": torch.int32} | options)


X = torch.zeros(10, 2, 8)
JAGGED = torch.nested.nested_tensor_from_jagged(X, torch.tensor([0, 4, 10]))
OTHER = torch.nested.nested_tensor_from_jagged(X, torch.tensor([0, 5, 10]))
THREE = torch.nested.nested_tensor_from_jagged(X, torch.tensor([0, 4, 6, 10]))
BAD = [
    (dict(q=[1.0]), ValueError, r"q: expected packed sequences \[total, heads, head_dim\], got list"),
    (dict(q=X[None]), ValueError, r"q: expected packed sequences .* got 4 dimensions \[1, 10, 2, 8\]"),
    (dict(k=X[0]), ValueError, r"k: expected packed sequences .* got 2 dimensions \[2, 8\]"),
    (dict(k=JAGGED), ValueError, "k: expected packed sequences .* got 4 dimensions"),
    (dict(v=X[:9]), ValueError, r"v: expected as many keys as k \(10\), got 9"),
    (dict(k=X[:, :, :4]), ValueError, "k: expected q's head_dim 8, got 4"),
    (dict(cu_seqlens_q=None), TypeError, "cu_seqlens_q: expected an int32 tensor of one dimension, got NoneType"),
    (dict(cu_seqlens_q=[0, 10]), TypeError, "cu_seqlens_q: expected an int32 tensor of one dimension, got list"),
    (dict(cu_seqlens_q=ints(0, 10).float()), TypeError, r"cu_seqlens_q: expected an int32 .* got torch.float32 \[2\]"),
    (dict(cu_seqlens_k=ints(0, 10)[None]), TypeError, r"cu_seqlens_k: .* of one dimension, got torch.int32 \[1, 2\]"),
    (dict(seqused_k=ints(4, 6).short()), TypeError, r"seqused_k: expected an int32 .* got torch.int16 \[2\]"),
    (dict(seqused_q=3), TypeError, "seqused_q: expected an int32 .* got int"),
    (dict(cu_seqlens_q=ints(0, 10, device="meta")), ValueError, "cu_seqlens_q: expected a tensor on q's device cpu, got meta"),
    (dict(seqused_q=ints(4, 6, device="meta")), ValueError, "seqused_q: expected a tensor on q's device cpu, got meta"),
    (dict(cu_seqlens_q=ints()), ValueError, "cu_seqlens_q: expected one entry more than there are sequences, got 0 entries"),
    (dict(seqused_q=ints(4, 6, 0)), ValueError, "cu_seqlens_q: expected one entry more .* got 3 entries with 3 in seqused_q"),
    (dict(cu_seqlens_k=ints(0, 4, 6, 10)), ValueError, r"cu_seqlens_k: .* as many sequences as cu_seqlens_q \(2\), got 3"),
    (dict(cu_seqlens_q=ints(0, 6, 4)), ValueError, r"cu_seqlens_q: expected to rise from 0 to .* q's 10 rows, got \[0, 6, 4\]"),
    (dict(cu_seqlens_q=ints(1, 4, 10)), ValueError, r"cu_seqlens_q: expected to rise from 0 .* got \[1, 4, 10\]"),
    (dict(cu_seqlens_k=ints(0, 4, 11)), ValueError, r"cu_seqlens_k: .* at most k's 10 rows, got \[0, 4, 11\]"),
    (dict(cu_seqlens_k=ints(*range(20))), ValueError, r"cu_seqlens_k: .* got \[0, 1, 2, 3, 4, 5, \.\.\., 17, 18, 19\]"),
    (dict(k=X[:8], v=X[:8]), ValueError, r"cu_seqlens_k: expected to rise from 0 to at most k's 8 rows, got \[0, 4, 10\]"),
    (dict(seqused_q=ints(5, 2)), ValueError, r"seqused_q: expected 0 up to each sequence's rows \[4, 6\], got \[5, 2\]"),
    (dict(seqused_k=ints(-1, 2)), ValueError, r"seqused_k: expected 0 up to .* got \[-1, 2\]"),
    (dict(max_seqlen_q=5), ValueError, "max_seqlen_q: expected at least the longest sequence, 6, got 5"),
    (dict(max_seqlen_k=0), ValueError, "max_seqlen_k: expected at least the longest sequence, 6, got 0"),
    (dict(seqused_k=ints(3, 5), max_seqlen_k=4), ValueError, "max_seqlen_k: expected at least the longest sequence, 5, got 4"),
    (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q: expected None or an integer >= 0, got -1"),
    (dict(max_seqlen_q=True), ValueError, "max_seqlen_q: expected None or an integer >= 0, got True"),
    (dict(max_seqlen_k=6.0), ValueError, "max_seqlen_k: expected None or an integer >= 0, got 6.0"),
    (dict(bias=torch.zeros(2, 2, 10, 10)), ValueError, r"bias: .* broadcasts to .* \[2, 2, 6, 6\], got \[2, 2, 10, 10\]"),
    (dict(mask=torch.ones(5, 6, dtype=torch.bool)), ValueError, r"mask: expected size 6 .* \(S_q\), got \[5, 6\]"),
    (dict(mask=tw.documents(ints(0, 0, 0, 1))), ValueError, r"documents: ids_q: expected size 6 .* \(S_q\), got \[4\]"),
    (dict(mask=tw.prefix(ints(4, 7))), ValueError, r"prefix: lengths: expected values from 0 to 6 .* got values from 4 to 7"),
    (dict(backend="cuda"), ValueError, "backend: expected \"auto\" or one of .* got 'cuda'"),
    (dict(batch_invariant=True, backend="tiled"), NotImplementedError, "backend='tiled' cannot .*: .*batch_invariant"),
    (dict(q=JAGGED, k=JAGGED, v=JAGGED), ValueError, "cu_seqlens_q: expected None with nested tensors"),
    (dict(q=JAGGED, k=JAGGED, v=JAGGED, cu_seqlens_q=None, cu_seqlens_k=ints(0, 10)), ValueError, "cu_seqlens_k: .* None"),
    (dict(q=JAGGED, k=JAGGED, v=OTHER, cu_seqlens_q=None), ValueError, "v: expected a nested tensor with k's lengths"),
    (dict(q=JAGGED, k=THREE, v=THREE, cu_seqlens_q=None), ValueError, r"cu_seqlens_k: .* as many sequences .* \(2\), got 3"),
    (dict(q=JAGGED, cu_seqlens_q=None), TypeError, "k: expected a nested tensor like q, got Tensor"),
    (dict(q=JAGGED, k=JAGGED.transpose(1, 2), v=JAGGED, cu_seqlens_q=None), ValueError, "k: expected sequences along dim"),
]


@CPU_ONLY
@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on the CPU")
@pytest.mark.parametrize("changes, error, words", BAD, ids=[f"{i}-{next(iter(c))}" for i, (c, _, _) in enumerate(BAD)])
def test_bad_input(changes, error, words):
    with pytest.raises(error, match=words):
        tw.attention_varlen(**dict(q=X, k=X, v=X, cu_seqlens_q=ints(0, 4, 10)) | changes)


@CPU_ONLY
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_of_the_other_layout():
    x = torch.nested.nested_tensor([torch.zeros(3, 2, 8)])
    with pytest.raises(ValueError, match=r"q: expected .* torch.jagged layout, got torch.strided: call .*\(q.unbind"):
        tw.attention_varlen(x, x, x)


# ---- torch.compile, torch.func ------------------------------------------------------------------------------------------

def loss(q, k, v, cu_q, cu_k, sinks, lengths, longest):
    out, lse = tw.attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=longest, max_seqlen_k=longest, causal=True,
                                   mask=tw.window(20, None) | tw.prefix(lengths), score_mod=tw.softcap(3.0), sinks=sinks,
                                   return_lse=True)
    return out.square().sum() + lse.sum()


@CPU_ONLY
def test_compile_whole_graph_without_recompiling_for_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for lengths_q, lengths_k, longest in (  # first as many sequences as nothing else has, so that sizes are told apart
            ([9, 4, 20, 1, 2, 0], [30, 4, 7, 2, 1, 1], 64), ([20, 4, 9, 0, 1, 2], [4, 30, 7, 2, 2, 0], 64),
            ([5, 60, 33], [5, 60, 9], 64), ([3, 2, 9, 1, 2], [8, 1, 9, 2, 4], 64), ([90, 10], [80, 64], 100)):
        x = batch(lengths_q, lengths_k)
        sinks, prefixes = normal(4, seed=3), torch.tensor([2] * len(lengths_q), device=DEVICE)
        leaves = (*x[:3], sinks)
        assert_same(*(torch.autograd.grad(f(*x, sinks, prefixes, longest), leaves) for f in (compiled, loss)))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]


@CPU_ONLY
def test_compile_without_the_longest():
    torch._dynamo.reset()
    attend = lambda q, k, v, cu, used: tw.attention_varlen(q, k, v, cu, seqused_k=used, causal=True)  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    q, k, v, cu, _ = batch([9, 0, 30])
    used = torch.tensor([3, 0, 30], device=DEVICE)
    assert_same(*((out, *torch.autograd.grad(out.sum(), (q, k, v)))
                  for out in (compiled(q, k, v, cu, used), attend(q, k, v, cu, used))))


@CPU_ONLY
def test_func_transforms():
    q, k, v, cu_q, cu_k = batch([9, 0, 12], [5, 3, 12])
    attend = lambda q, k, v: tw.attention_varlen(q, k, v, cu_q, cu_k, causal=True, backend="tiled").square().sum()  # noqa: E731
    expected = torch.autograd.grad(attend(q, k, v), (q, k, v))
    plain = [x.detach() for x in (q, k, v)]
    assert_same(torch.func.grad(attend, (0, 1, 2))(*plain), expected)
    several = torch.func.vmap(torch.func.grad(attend), (0, None, None))(torch.stack([plain[0]] * 2), *plain[1:])
    assert_same(several, [expected[0]] * 2)
    _, tangent = torch.func.jvp(attend, tuple(plain), tuple(plain))
    torch.testing.assert_close(tangent, sum((g * x).sum() for g, x in zip(expected, plain, strict=True)))


@CPU_ONLY
def test_second_derivatives(small_tiles):
    q, k, v, cu_q, cu_k = batch([2, 0, 3], [3, 1, 2], heads=2, kv_heads=1, dim=3, dtype=torch.float64)
    sinks, bias = normal(2, dtype=torch.float64), normal(2, 1, 3, dtype=torch.float64)

    def attend(q, k, v, sinks, bias):
        return tw.attention_varlen(q, k, v, cu_q, cu_k, causal=True, sinks=sinks, bias=bias, dropout_p=0.2, rng=tw.Rng(1),
                                   return_lse=True, backend="tiled")

    assert torch.autograd.gradcheck(lambda *x: attend(*x)[0], (q, k, v, sinks, bias))
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x)[0], (q, k, v, sinks, bias))


# ---- memory, work, waiting ----------------------------------------------------------------------------------------------

@CPU_ONLY
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_linear_and_less_than_of_padding():
    half, whole, padded = (peak_apart(mode, n) for mode, n in (("packed", 4608), ("packed", 9216), ("padded", 9216)))
    assert whole <= 2.2 * half
    assert whole <= padded


LENGTHS = ([33, 0, 64, 1, 17, 40], [10, 50, 0, 70, 10, 33])


def rows_of(lengths, device=DEVICE):
    return packed_rows("q", offsets(lengths).to(device), None, sum(lengths), None, torch.device(device), False)[0]


@pytest.mark.parametrize("block, rows_per_row, more", [(16, 1, 0), (32, 1, 40), (16, 3, 0), (128, 2, 7)])
def test_schedule_has_each_block_once_the_longest_first(block, rows_per_row, more):
    own, others = LENGTHS
    items = schedule(rows_of(own), rows_of(others), sum(own) + more, block, rows_per_row).tolist()
    blocks = [-(-n * rows_per_row // block) for n in own]
    count = sum(blocks)
    assert len(items) == (sum(own) + more) * rows_per_row // block + len(own)
    assert sorted(items[:count]) == [[b, i] for b, n in enumerate(blocks) for i in range(n)]
    assert items[count:] == [[-1, 0]] * (len(items) - count)
    assert [others[b] for b, _ in items[:count]] == sorted((others[b] for b, _ in items[:count]), reverse=True)
    for b, n in enumerate(blocks):
        assert [i for c, i in items[:count] if c == b] == list(range(n))[::-1]


def test_schedule_of_no_rows():
    nothing = rows_of([0, 0])
    assert schedule(nothing, nothing, 0, 16).tolist() == [[-1, 0], [-1, 0]]


class NoTransfers(TorchFunctionMode):
    """Raises where numbers would be sent to a device, for which the host waits. What is on the meta device cannot be read."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor) and kwargs.get("device"):
            raise AssertionError(f"{args[0]} is sent to {kwargs['device']}")
        return function(*args, **kwargs)


@CPU_ONLY
@pytest.mark.parametrize("name", [
    "packed", "packed causal", "packed window", "packed sinks", "packed bias", "packed bias shared", "packed lengths",
    "packed documents", "packed boolean tensor", "packed function of heads", "packed table of distances",
    "packed table of keys", "packed table of any index", "packed tree", "packed used"])
def test_nothing_waits_for_a_device(name):
    """Forward and backward up to the launches themselves."""
    launch = pytest.importorskip("tilewise.backends.triton.launch", reason="needs triton", exc_type=ImportError)
    call = draw(named(name), torch.float32, "meta")

    def settle(kernel, problem, programs, values):
        config = launch.choose(launch.config_name(kernel, values), problem, "interpreter")
        if 0 not in programs(config):
            launch.settled(problem, values, config)

    with NoTransfers():
        problem, x = call.described()
        out, lse = launch.forward(problem, x, settle)
        needs = Needs(True, True, (True,) * len(x.captured))
        launch.backward(problem, x, out, lse, torch.empty_like(out), torch.empty_like(lse), needs, settle)


@CPU_ONLY
@pytest.mark.parametrize("transposed", [False, True], ids=["queries", "keys"])
def test_lists_on_a_device_begin_as_those_on_the_host(transposed, monkeypatch):
    launch = pytest.importorskip("tilewise.backends.triton.launch", reason="needs triton", exc_type=ImportError)
    problem, x = draw(named("packed function"), torch.float32).described()
    visits = launch.visits(problem, x, transposed)
    compact = visits(Config(16, 16, 4, 1))["LIST"]
    monkeypatch.setattr(tile_lists, "on_host", lambda device: False)
    tile_lists._lists.known.clear()
    padded = visits(Config(16, 16, 4, 1))["LIST"]
    assert len(padded) > len(compact)
    assert torch.equal(padded[:len(compact)], compact)
