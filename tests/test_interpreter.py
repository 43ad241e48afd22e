"""Each repair of Triton's interpreter: what stock gets wrong comes out right. Run with TRITON_INTERPRET=1."""

# ruff: noqa: E402 - without Triton in interpreter mode the rest cannot be imported
import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 for the whole process", allow_module_level=True)

import numpy as np
import torch
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tilewise.inspect import interpreter

interpreter.install()
INF, NAN = float("inf"), float("nan")


def close(got, want, tolerance):
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= tolerance, f"relative error {error:.1e}"


def same(got, want):
    assert got.dtype == want.dtype
    assert torch.equal(got.nan_to_num(nan=12345.0), want.nan_to_num(nan=12345.0))


def test_install_is_idempotent():
    patched = interpreter.Builder.binary_op
    interpreter.install()
    assert interpreter.Builder.binary_op is patched


def test_other_internals_are_one_clear_error(monkeypatch):
    monkeypatch.setitem(interpreter.INTERNALS, interpreter.Builder, "create_dot create_telepathy")
    with pytest.raises(RuntimeError, match=r"lacks InterpreterBuilder\.create_telepathy: review"):
        interpreter.install()


# --- numbers ----------------------------------------------------------------------------------------------------------


@triton.jit
def dot_kernel(A, B, C, N: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at), input_precision=PRECISION, out_dtype=OUT))


def product(a, b, precision=None, out=tl.float32):
    c = torch.empty(a.shape)
    dot_kernel[(1,)](a, b, c, len(a), precision, out)
    return c


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_of_half_types_accumulates_in_fp32(dtype):
    a, b = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype)
    close(product(a, b), a.double() @ b.double(), 1e-6)


def test_dot_in_ieee_tf32_and_tf32x3():
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    truth = a.double() @ b.double()
    close(product(a, b, "ieee"), truth, 1e-6)
    close(product(a, b, "tf32x3"), truth, 1e-6)
    truncated = [torch.from_numpy((x.numpy().view(np.int32) & -8192).view(np.float32)).double() for x in (a, b)]
    close(product(a, b, "tf32"), truncated[0] @ truncated[1], 1e-6)
    same(product(a, b, "tf32"), product(a, b))  # Triton's default
    assert 1e-4 < (product(a, b, "tf32") - truth).abs().max() / truth.abs().max() < 2e-3


def test_tf32_rounding_is_ties_away_and_keeps_specials():
    ulp = 2.0**-10
    values = np.array([1 + ulp / 2, -1 - ulp / 2, 1 + ulp / 2.01, 1 + ulp, INF, -INF, NAN], np.float32)
    want = np.array([1 + ulp, -1 - ulp, 1, 1 + ulp, INF, -INF, NAN], np.float32)
    np.testing.assert_array_equal(interpreter.rounded_to_tf32(values), want)
    assert interpreter.truncated_to_tf32(values)[0] == 1


def test_tf32x3_keeps_infinity():
    a = torch.eye(16)
    a[0, 0] = INF
    assert product(a, torch.ones(16, 16), "tf32x3")[0, 0] == INF


@triton.jit
def cast_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_casts_to_bf16_round_to_nearest_even(source):
    hard = [1.00390625, 1.01171875, -1.00390625, 1e-30, 3.4e38, 0.0, -0.0, INF, -INF, NAN, 1e-40, 65504.0]
    x = torch.cat([torch.randn(1000) * 3, torch.tensor(hard * 2)])
    x = (x.nan_to_num(0, 0, 0) if source == torch.int32 else x).to(source)
    y = torch.empty(1024, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, 1024)
    same(y, x.float().bfloat16())


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.int32, torch.float64])
def test_casts_from_bf16(target):
    x, y = (torch.randn(64) * 100).bfloat16(), torch.empty(64, dtype=target)
    cast_kernel[(1,)](x, y, 64)
    same(y, x.to(target))


@pytest.mark.parametrize("source, target", [(torch.int64, torch.int32), (torch.int32, torch.uint16),
                                            (torch.uint16, torch.int32), (torch.int32, torch.uint8),
                                            (torch.bool, torch.float32), (torch.bool, torch.bfloat16),
                                            (torch.uint8, torch.bool)])
def test_integer_and_boolean_casts(source, target):
    x, y = torch.arange(64).to(source), torch.empty(64, dtype=target)
    cast_kernel[(1,)](x, y, 64)
    assert torch.equal(y, x.to(target))


@triton.jit
def bf16_kernel(X, Y, R, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Y + i, tl.where(x > 0.5, x * x + x * 0.3 - 1, -tl.abs(x)))
    tl.store(R, tl.max(x, 0))
    tl.store(R + 1, tl.sum(x, 0))
    tl.store(R + 2, tl.minimum(tl.min(x, 0), 0.0))
    tl.store(R + 3, tl.sum((x > 0).to(tl.bfloat16), 0))


def test_bf16_arithmetic_and_reductions():
    x, y, r = torch.randn(64).bfloat16(), torch.empty(64).bfloat16(), torch.empty(4)
    bf16_kernel[(1,)](x, y, r, 64)
    close(y, torch.where(x > 0.5, x * x + x * 0.3 - 1, -x.abs()), 0.02)
    assert r[0] == x.max()
    close(r[1], x.float().sum().bfloat16(), 0)
    assert r[2] == min(x.min(), 0)
    assert r[3] == (x > 0).sum()


@triton.jit
def softmax_kernel(X, Y, L, SUM, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + i[None, :])
    m = tl.max(x, 1)
    p = tl.math.exp2(x - m[:, None])
    tl.store(L + i, m + tl.math.log2(tl.sum(p, 1)))
    tl.store(Y + i[:, None] * N + i[None, :], tl.exp(x) * 1e30 * 1e30)
    tl.store(SUM + i, tl.cumsum(tl.max(tl.where(x > 0, 1, -1), 1), 0))


def test_infinities_and_overflow_do_not_warn():
    x, y, lse, count = torch.randn(16, 16), torch.empty(16, 16), torch.empty(16), torch.empty(16, dtype=torch.int32)
    x[0] = -INF
    x[1] = NAN
    x[2, :3] = torch.tensor([NAN, -INF, 1])
    softmax_kernel[(1,)](x, y, lse, count, 16)
    assert lse[:3].isnan().all()
    close(lse[3:], (x[3:] * np.log(2)).logsumexp(1) / np.log(2), 1e-6)
    assert y[3].isinf().all()
    assert count[0] == -1


@triton.jit
def extremes_kernel(X, Y, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(Z + i, tl.maximum(x, y))
    tl.store(Z + N + i, tl.minimum(x, y))
    tl.store(Z + 2 * N + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(Z + 3 * N + i, tl.clamp(x, -1.0, 1.0))


def test_minimum_and_maximum_ignore_nan_unless_told():
    x, y, z = torch.randn(16), torch.randn(16), torch.empty(4, 16)
    x[0] = y[1] = NAN
    extremes_kernel[(1,)](x, y, z, 16)
    same(z[:3], torch.stack([x.fmax(y), x.fmin(y), x.maximum(y)]))
    same(z[3, 1:], x[1:].clamp(-1, 1))
    assert z[3, 0] == -1


# --- integers ---------------------------------------------------------------------------------------------------------


@triton.jit
def unsigned_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i).to(tl.uint32, bitcast=True)
    high = tl.umulhi(x, tl.full([N], 0xD2511F53, tl.uint32))
    low = x * 0xD2511F53 + 0x9E3779B9
    half = (x >> 16).to(tl.uint16) & 0xFFFF
    tl.store(Y + i, high ^ low ^ ~x ^ (x << 5) ^ half.to(tl.uint32))
    tl.store(Y + N + i, tl.umulhi(tl.load(X + i), -3).to(tl.uint32, bitcast=True))


def test_uint32_wraps_shifts_and_multiplies_high():
    x = np.random.default_rng(0).integers(-2**31, 2**31, 64, dtype=np.int32)
    y = torch.empty(128, dtype=torch.uint32)
    unsigned_kernel[(1,)](torch.from_numpy(x), y, 64)
    mask, exact = 0xFFFFFFFF, [int(v) & 0xFFFFFFFF for v in x]
    want = [(v * 0xD2511F53 >> 32) ^ ((v * 0xD2511F53 + 0x9E3779B9) & mask) ^ (~v & mask) ^ (v << 5 & mask) ^ (v >> 16)
            for v in exact]
    assert y.tolist() == want + [v * (mask - 2) >> 32 for v in exact]


@triton.jit
def philox_kernel(Y, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, _c, _d = tl.randint4x(seed, i)
    tl.store(Y + i, a)
    tl.store(Y + N + i, b)


def test_triton_philox_runs_and_is_even():
    y = torch.empty(2048, dtype=torch.int32)
    philox_kernel[(1,)](y, 1234, 1024)
    assert len(y.unique()) > 2040
    assert abs((y > 0).float().mean() - 0.5) < 0.05


@triton.jit
def overflow_kernel(X, n):
    tl.store(X, n * n)


def test_signed_overflow_is_an_error():
    with pytest.raises(InterpreterError, match="int32 overflow in mul"):
        overflow_kernel[(1,)](torch.zeros(1, dtype=torch.int32), 65536)


# --- language ---------------------------------------------------------------------------------------------------------


@triton.jit
def loops_kernel(Y, start, stop, B: tl.constexpr):
    count = 0
    for _ in range(start, tl.cdiv(stop, B)):
        count += 1
    wide = tl.zeros([1], tl.int64)
    for i in tl.range(start, stop, B, num_stages=3):
        wide += i.to(tl.int64) * 1_000_000_000
    left = stop
    while left > start and left > 3:
        left -= 1
    for k in tl.static_range(2):
        tl.store(Y + 3 + k, k)
    tl.store(Y, count)
    tl.store(Y + 1 + tl.arange(0, 1), wide)
    tl.store(Y + 2, left)


def test_loops_over_runtime_bounds():
    y = torch.empty(5, dtype=torch.int64)
    loops_kernel[(1,)](y, 0, 100, 32)
    assert y.tolist() == [4, 192_000_000_000, 3, 0, 1]


@triton.jit
def plus(score, captured, column):
    return score + tl.load(captured[0] + column)


@triton.jit
def scaled(score, captured, column):
    tl.static_assert(captured[2] is None)
    return score * captured[1]


@triton.jit
def tuples_kernel(X, Y, strides, captured, program, MOD: tl.constexpr, NOTHING: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None].to(tl.int64) * strides[0] + i[None, :] * strides[1]
    score = tl.load(X + at)
    for k in tl.static_range(len(program)):
        score = program[k](score, captured, i[None, :])
    if MOD is not None:
        score = MOD(score, captured, i[None, :])
    if NOTHING is not None:
        score = score * NAN
    tl.store(Y + at, score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tuples_functions_and_none_as_arguments(dtype):
    x, table = torch.randn(16, 16).to(dtype), torch.randn(16)
    y = torch.empty_like(x)
    tuples_kernel[(1,)](x, y, (16, 1), (table, 0.5, None), (plus, scaled), plus, None, 16)
    close(y, (x + table) * 0.5 + table, 2e-2 if dtype == torch.bfloat16 else 2e-3)


@triton.jit
def shapes_kernel(X, Y, N: tl.constexpr):
    a, b = tl.split(tl.reshape(tl.load(X + tl.arange(0, N)), [N // 2, 2]))
    tl.store(Y + tl.arange(0, N), tl.reshape(tl.permute(tl.join(a, b), 1, 0), [N]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_reshape_split_join_permute(dtype):
    x, y = torch.arange(32).to(dtype), torch.empty(32, dtype=dtype)
    shapes_kernel[(1,)](x, y, 32)
    assert torch.equal(y, torch.cat([x[::2], x[1::2]]))


@triton.jit
def merge(m1, l1, m2, l2):
    m = tl.maximum(m1, m2)
    return m, l1 * tl.math.exp2(m1 - m) + l2 * tl.math.exp2(m2 - m)


@triton.jit
def first(a, b):
    return a


@triton.jit
def reduce_kernel(X, M, L, F, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + i[None, :])
    m, l = tl.reduce((x, tl.full([N, N], 1.0, tl.float32)), 1, merge)
    tl.store(M + i, m)
    tl.store(L + i, l)
    tl.store(F + i[None, :], tl.reduce(x, 0, first, keep_dims=True))
    tl.store(F + N, tl.reduce(x, None, first))


def test_own_reductions_keep_order_and_take_tuples():
    x = torch.randn(16, 16)
    m, l, f = torch.empty(16), torch.empty(16), torch.empty(17)
    reduce_kernel[(1,)](x, m, l, f, 16)
    assert torch.equal(m, x.max(1).values)
    close(l, torch.exp2(x - m[:, None]).sum(1), 1e-6)
    assert torch.equal(f, torch.cat([x[0], x[0, :1]]))


@triton.jit
def arguments_kernel(X, Y, flag, scale, stride: tl.int64, pitch: "i64", big, mask_ptr, N: tl.constexpr):  # noqa: F821
    i = tl.arange(0, N)
    visible = tl.load(mask_ptr + i) & (i < N - 1) | (i == 0)
    x = tl.load(X + i, mask=visible, other=0.0)
    if flag:
        x = x * scale
    tl.store(Y + i, x.to(tl.float32))
    tl.store(Y + N, 1.0 if x.dtype == tl.float32 else 0.0)
    tl.store(Y + N + 1, ((stride + pitch) * 65536 * 65536).to(tl.float32))
    tl.store(Y + N + 2, (big + 1).to(tl.float32))
    tl.store(Y + N + 3, tl.load(X + N, mask=big < 0, other=7.0))


def test_scalar_arguments_have_the_types_of_a_launch():
    x, y, mask = torch.randn(16).half(), torch.zeros(20), torch.rand(16) > 0.5
    arguments_kernel[(1,)](x, y, True, 0.3, 1, 1, 2**32 - 1, mask, 16)
    visible = mask & (torch.arange(16) < 15)
    visible[0] = True
    assert torch.equal(y[:16], torch.where(visible, x.float() * np.float32(0.3), 0))
    assert y[16:].tolist() == [1, 2.0**33, 2.0**32, 7]


@triton.jit
def descriptor_kernel(source, target, B: tl.constexpr):
    at = [tl.program_id(0) * B, tl.program_id(1) * B]
    target.store(at, source.load(at) * 2)


def test_bf16_descriptors_made_by_the_host():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.randn(64, 64).bfloat16(), torch.zeros(64, 64).bfloat16()
    descriptor_kernel[(2, 2)](*(TensorDescriptor.from_tensor(t, [32, 32]) for t in (x, y)), 32)
    assert torch.equal(y, x * 2)


# --- all of it together -----------------------------------------------------------------------------------------------


@triton.jit
def update(out, m, l, s, v):
    m_new = tl.maximum(m, tl.max(s, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(s - base[:, None])
    fade = tl.math.exp2(m - base)
    return out * fade[:, None] + tl.dot(p.to(v.dtype), v), m_new, l * fade + tl.sum(p, 1)


@triton.jit
def forward_kernel(Q, K, V, O, L, n, scale, B: tl.constexpr, D: tl.constexpr):
    rows, d = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, D)
    q = tl.load(Q + rows[:, None] * D + d[None, :], mask=rows[:, None] < n, other=0.0)
    out, m, l = tl.zeros([B, D], tl.float32), tl.full([B], float("-inf"), tl.float32), tl.zeros([B], tl.float32)
    for start in tl.range(0, tl.minimum(n, (tl.program_id(0) + 1) * B), B):
        columns = start + tl.arange(0, B)
        at = columns[:, None] * D + d[None, :]
        k = tl.load(K + at, mask=columns[:, None] < n, other=0.0)
        v = tl.load(V + at, mask=columns[:, None] < n, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = (columns[None, :] < n) & (columns[None, :] <= rows[:, None])
        out, m, l = update(out, m, l, tl.where(visible, s, float("-inf")), v)
    tl.store(O + rows[:, None] * D + d[None, :], out / l[:, None], mask=rows[:, None] < n)
    tl.store(L + rows, (m + tl.math.log2(l)) * 0.6931471805599453, mask=rows < n)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float32, 2e-3)])
def test_flash_attention_forward(dtype, tolerance):
    n, d = 100, 32
    q, k, v = (torch.randn(n, d).to(dtype) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(n)
    forward_kernel[(triton.cdiv(n, 32),)](q, k, v, out, lse, n, d**-0.5 * 1.4426950408889634, 32, d)
    scores = (q.double() @ k.double().T * d**-0.5).masked_fill(~torch.ones(n, n).tril().bool(), -INF)
    close(lse, scores.logsumexp(1), 1e-6)
    close(out, scores.softmax(1) @ v.double(), tolerance)  # fp32: the second product is tf32
