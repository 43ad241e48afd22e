"""Bad input: one clear error each, naming the argument, what was expected and what came."""
import pytest
import torch

import tilewise as tw


def tensors(**changes):
    made = {"q": torch.zeros(2, 6, 4, 16), "k": torch.zeros(2, 8, 2, 16), "v": torch.zeros(2, 8, 2, 16)}
    return made | changes


JAGGED = torch.nested.nested_tensor_from_jagged(torch.zeros(10, 4, 16), torch.tensor([0, 4, 10]))

BAD = [
    (dict(q=[1.0]), TypeError, "q: expected a tensor, got list"),
    (dict(q=torch.zeros(6, 4, 16)), ValueError, r"q: expected \[batch, seqlen, heads, head_dim\], got 3 dimensions"),
    (dict(q=torch.zeros(2, 6, 4, 16, dtype=torch.int32)), TypeError, "q: expected float16, .* got torch.int32"),
    (dict(k=torch.zeros(2, 8, 2, 16).half()), TypeError, "k: expected q's dtype torch.float32, got torch.float16"),
    (dict(v=torch.zeros(2, 8, 2, 16, device="meta")), ValueError, "v: expected q's device cpu, got meta"),
    (dict(k=torch.zeros(3, 8, 2, 16)), ValueError, "k: expected q's batch size 2, got 3"),
    (dict(k=torch.zeros(2, 8, 2, 8)), ValueError, "k: expected q's head_dim 16, got 8"),
    (dict(k=torch.zeros(2, 8, 3, 16), v=torch.zeros(2, 8, 3, 16)), ValueError,
     "k: expected a number of heads that divides q's 4, got 3"),
    (dict(v=torch.zeros(2, 8, 4, 16)), ValueError, r"v: expected as many heads as k \(2\), got 4"),
    (dict(v=torch.zeros(2, 9, 2, 16)), ValueError, r"v: expected as many keys as k \(8\), got 9"),
    (dict(v=torch.zeros(2, 8, 2, 513)), ValueError, "v: expected a head_dim from 1 to 512, got 513"),
    (dict(q=torch.zeros(2, 6, 4, 0), k=torch.zeros(2, 8, 2, 0)), ValueError, "q: expected a head_dim from 1 to 512, got 0"),
    (dict(q=torch.zeros(2, 6, 16, 4).mT), ValueError, r"q: expected a contiguous last dimension .* got stride 4: call q.cont"),
    (dict(scale=float("nan")), ValueError, "scale: expected None or a finite number, got nan"),
    (dict(scale="1"), ValueError, "scale: expected None or a finite number, got '1'"),
    (dict(dropout_p=1.0), ValueError, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
    (dict(dropout_p=-0.1), ValueError, r"dropout_p: expected a number in \[0, 1\), got -0.1"),
    (dict(dropout_p=1e-7), ValueError, "dropout_p: expected 0 or a probability between"),
    (dict(dropout_p=1 - 1e-7), ValueError, "dropout_p: expected 0 or a probability between"),
    (dict(rng=3, dropout_p=0.5), TypeError, r"rng: expected None or tw.Rng\(seed\), got int"),
    (dict(rng=torch.zeros(3).long(), dropout_p=0.5), TypeError, r"rng: expected None or tw.Rng\(seed\), got Tensor"),
    (dict(causal=1), TypeError, "causal: expected True or False, got 1"),
    (dict(mask="causal"), TypeError, "mask: expected None, a mask such as tw.causal.* got str"),
    (dict(mask=torch.zeros(6, 8)), TypeError, "mask: expected a boolean tensor .* got torch.float32"),
    (dict(mask=torch.zeros(6, 9, dtype=torch.bool)), ValueError, r"mask: expected size 8 in dimension 1 \(S_k\), got \[6, 9\]"),
    (dict(mask=tw.key_lengths(torch.tensor([3, 9]))), ValueError,
     r"key_lengths: lengths: expected values from 0 to 8 \(S_k\), got values from 3 to 9"),
    (dict(mask=tw.key_lengths(torch.tensor([-1, 2]))), ValueError, "key_lengths: lengths: .* got values from -1 to 2"),
    (dict(mask=tw.prefix(torch.tensor([1]))), ValueError, r"prefix: lengths: expected size 2 .*the batch size"),
    (dict(mask=tw.documents(torch.zeros(6, dtype=torch.int32))), ValueError, r"documents: ids_k: expected size 8 .*S_k"),
    (dict(score_mod=tw.alibi(torch.zeros(3))), ValueError, r"alibi: slopes: expected size 4 .*query heads"),
    (dict(score_mod=3), TypeError, "score_mod: expected None, a score function"),
    (dict(score_mod=max), tw.CaptureError, r"max: expected score_mod\(score, b, h, q_idx, kv_idx\)"),
    (dict(bias=torch.zeros(6, 8, dtype=torch.bool)), TypeError, "bias: expected a floating tensor .* got torch.bool"),
    (dict(bias=torch.zeros(6, 8).to(torch.float8_e4m3fn)), TypeError, "bias: expected a floating tensor .* got torch.float8"),
    (dict(bias=torch.zeros(7, 8)), ValueError, r"bias: expected a shape that broadcasts to .* \[2, 4, 6, 8\], got \[7, 8\]"),
    (dict(bias=torch.zeros(1, 1, 1, 6, 8)), ValueError, "bias: expected a shape that broadcasts"),
    (dict(bias=torch.zeros(6, 8, device="meta")), ValueError, "bias: expected q's device cpu, got meta"),
    (dict(sinks=torch.zeros(2)), ValueError, r"sinks: expected a floating tensor \[H\] = \[4\], got torch.float32 \[2\]"),
    (dict(layout="sbhd"), ValueError, 'layout: expected "bshd" or "bhsd", got \'sbhd\''),
    (dict(backend="cuda"), ValueError,
     "backend: expected \"auto\" or one of hopper, triton, cpu, tiled, reference, got 'cuda'"),
    (dict(backend=["cpu"]), ValueError, r"backend: expected .*, got \['cpu'\]"),
    (dict(deterministic="no"), TypeError, "deterministic: expected True or False, got 'no'"),
    (dict(deterministic=[True]), TypeError, r"deterministic: expected True or False, got \[True\]"),
    (dict(batch_invariant=1), TypeError, "batch_invariant: expected True or False, got 1"),
    (dict(q=JAGGED), ValueError, r"q: expected \[batch, .*, got a nested tensor: call tw.attention_varlen"),
]


@pytest.mark.parametrize("changes, error, words", BAD, ids=[f"{i}-{next(iter(c))}" for i, (c, _, _) in enumerate(BAD)])
def test_bad_input(changes, error, words):
    with pytest.raises(error, match=words):
        tw.attention(**tensors(**changes))


def test_errors_speak_of_the_callers_layout():
    with pytest.raises(ValueError, match=r"k: expected \[batch, heads, seqlen, head_dim\]"):
        tw.attention(**tensors(k=torch.zeros(2)), layout="bhsd")


def test_named_backend_says_why_it_cannot():
    q = torch.zeros(1, 4, 1, 16, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r'backend=.triton. cannot compute this: .* backend="auto"'):
        tw.attention(q, q, q, backend="triton")
