"""fp8 inputs with scales: what the front door takes and refuses, what `explain` says, and flash-attn 3's names for it."""
from dataclasses import replace

import pytest
import torch

import tilewise as tw
from tilewise.backends import hopper
from tilewise.bench import fp8
from tilewise.bench.cases import Case, packed
from tilewise.compat import flash_attn_interface as flash3
from tilewise.problem import make

FP8 = torch.float8_e4m3fn
GROUPED = Case("grouped", batch=2, seqlen_q=20, seqlen_k=30, heads=4, kv_heads=2, head_dim=32)
PACKED = packed("packed", ((9, 12), (0, 4), (7, 7)), heads=4, kv_heads=2, head_dim=32)


def tensors(case=GROUPED, **options):
    call = fp8.drawn(case, **options)
    return call.q, call.k, call.v, {name: call.options[name] for name in fp8.SCALES}


def test_out_is_bf16_and_lse_fp32():
    q, k, v, scales = tensors()
    out, lse = tw.attention(q, k, v, **scales, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_without_scales_they_are_1():
    q, k, v, _ = tensors()
    ones = {name: torch.ones(2) for name in fp8.SCALES}
    small = dict(scale=1e-5)                            # stored numbers are large
    plain = tw.attention(q, k, v, **small, backend="tiled")
    assert torch.equal(plain, tw.attention(*(x.bfloat16() for x in (q, k, v)), **small, backend="tiled"))
    torch.testing.assert_close(plain, tw.attention(q, k, v, **small, **ones, backend="tiled"))


@pytest.mark.parametrize("case", [GROUPED, PACKED], ids=str)
def test_scales_of_heads_are_those_of_all_sequences(case):
    call = fp8.drawn(case, per_sequence=False)
    of_each = {name: call.options[name].expand(case.batch, 2).clone() for name in fp8.SCALES}
    found = [fp8.run(replace(call, options=call.options | scales), "tiled") for scales in ({}, of_each)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_score_functions_see_the_true_score():
    q, k, v, scales = tensors()
    seen = tw.attention(q, k, v, **scales, score_mod=tw.softcap(0.5), return_lse=True, backend="tiled")[1]
    exact = fp8.exact(fp8.drawn(GROUPED))
    truth = tw.attention(exact.q, exact.k, exact.v, score_mod=tw.softcap(0.5), return_lse=True, backend="reference")[1]
    torch.testing.assert_close(seen.double(), truth, rtol=1e-5, atol=1e-5)


def test_statistics():
    q, k, v, scales = tensors()
    _, found = tw.attention(q, k, v, **scales, return_stats=("max_score", "key_mass"), backend="tiled")
    exact = fp8.exact(fp8.drawn(GROUPED))
    _, truth = tw.attention(exact.q, exact.k, exact.v, return_stats=("max_score", "key_mass"), backend="reference")
    torch.testing.assert_close(found.max_score.double(), truth.max_score, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.key_mass.double(), truth.key_mass, rtol=1e-4, atol=1e-4)


def test_compiled():
    q, k, v, scales = tensors()
    options = scales | dict(causal=True, backend="tiled")
    compiled = torch.compile(lambda *x: tw.attention(*x, **options), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), tw.attention(q, k, v, **options))


def test_explain_says_what_is_copied():
    q, k, v, scales = tensors()
    plan = tw.explain(q, k, v, **scales, backend="tiled")
    assert plan.copied == 2 * (q.numel() + k.numel() + v.numel())
    assert plan.workspace[0] >= plan.copied
    assert plan.workspace[1] == 0
    for words in ("float8_e4m3fn", "copied in bfloat16", "none of fp8 inputs"):
        assert words in str(plan)
    assert tw.explain(*(x.bfloat16() for x in (q, k, v)), backend="tiled").copied == 0


def test_explain_of_a_kernel_that_multiplies_fp8(monkeypatch):
    monkeypatch.setattr(hopper, "supports", hopper.unsupported)
    q, k, v, scales = tensors()
    plan = tw.explain(q, k, v, **scales, backend="hopper")
    assert "probabilities are rounded to it" in str(plan)
    assert plan.copied == 0
    assert plan.workspace == (4 * 2 * 4 * 20 + 2 * 2 * 32 * 32, 0)     # lse; values, 30 keys in rows of 32 bytes


BAD = {
    "another dtype": (dict(q_scale=torch.ones(2).double()), TypeError, "q_scale: expected a float32 tensor"),
    "another shape": (dict(k_scale=torch.ones(4)), TypeError, r"k_scale: expected a float32 tensor \[H_kv\] = \[2\]"),
    "no tensor": (dict(v_scale=2.0), TypeError, "v_scale: expected .* got float"),
    "not positive": (dict(q_scale=torch.tensor([1.0, 0.0])), ValueError, "q_scale: expected positive finite numbers"),
    "infinite": (dict(k_scale=torch.tensor([1.0, torch.inf])), ValueError, "k_scale: expected positive finite"),
    "another device": (dict(v_scale=torch.ones(2, device="meta")), ValueError, "v_scale: expected q's device"),
    "a gradient": (dict(q_scale=torch.ones(2, requires_grad=True)), ValueError, "q_scale: expected no gradient"),
    "a sink's gradient": (dict(sinks=torch.zeros(4, requires_grad=True)), ValueError, "sinks: expected no gradient"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_clear_error(name):
    options, kind, words = BAD[name]
    q, k, v, _ = tensors()
    with pytest.raises(kind, match=words):
        tw.attention(q, k, v, **options)


def test_there_are_no_gradients():
    q, k, v, _ = tensors()
    with pytest.raises(ValueError, match="k: expected no gradient: attention of float8_e4m3fn inputs has a forward pass only"):
        tw.attention(q, k.detach().clone().requires_grad_(), v)
    with torch.no_grad():
        tw.attention(q, k.detach().clone().requires_grad_(), v, scale=1e-5)


def test_scales_come_with_fp8_alone():
    q, k, v, scales = tensors()
    wide = [x.bfloat16() for x in (q, k, v)]
    with pytest.raises(ValueError, match="q_scale: expected None: only float8_e4m3fn tensors come with scales"):
        tw.attention(*wide, **scales)
    with pytest.raises(TypeError, match=r"k: expected q's dtype torch\.float8_e4m3fn"):
        tw.attention(q, wide[1], v)
    with pytest.raises(TypeError, match="q: expected float16, bfloat16, float32, float64 or float8_e4m3fn, got"):
        tw.attention(*(x.to(torch.float8_e5m2) for x in wide))


def test_caches_take_queries_in_16_bits():
    cache = tw.KVCache(2, 8, 2, 32, dtype=FP8)
    with pytest.raises(TypeError, match="q: expected float16, bfloat16, float32 or float64, got"):
        tw.attention_with_kv_cache(torch.zeros(2, 1, 4, 32).to(FP8), cache)


def test_hopper_says_what_it_lacks():
    def lacking(dim=32, **options):
        q = torch.zeros(1, 8, 2, dim).to(FP8)
        return hopper.unsupported(make(q, q, q, **options)[0])

    assert lacking() is None
    assert lacking(dim=48) is None
    assert "dropout of fp8 inputs" in lacking(dropout_p=0.1)
    assert "multiples of 16 bytes" in lacking(dim=40)
    assert "head dims over 256" in lacking(dim=272)


@pytest.mark.parametrize("case", [GROUPED, PACKED], ids=str)
def test_flash_attn_3_calls_them_descales(case):
    call = fp8.drawn(case)
    q, k, v = call.q, call.k, call.v
    descales = dict(zip(("q_descale", "k_descale", "v_descale"), (call.options[name] for name in fp8.SCALES), strict=True))
    options = dict(causal=True, backend="tiled")
    if case.packed is None:
        found = flash3.flash_attn_func(q, k, v, **descales, **options)
    else:
        of_each = call.options["cu_seqlens_q"], call.options["cu_seqlens_k"]
        found = flash3.flash_attn_varlen_func(q, k, v, *of_each, case.seqlen_q, case.seqlen_k, **descales, **options)
    assert torch.equal(found, fp8.run(replace(call, options=call.options | dict(causal=True)), "tiled")[0])
