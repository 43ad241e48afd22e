"""Hugging Face models on Tilewise: what `eager` computes, with masks that stay functions of the indices."""
import copy
import functools
import inspect
import itertools
import sys

import pytest
import torch
from support.backends import AVAILABLE
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise as tw
from tilewise.compat.transformers import register, unregister
from tilewise.trace.bounds import EMPTY, FULL

transformers = pytest.importorskip("transformers")
from transformers import masking_utils as theirs  # noqa: E402

from tilewise.compat.transformers import attention as ours  # noqa: E402
from tilewise.compat.transformers import masking  # noqa: E402

pytestmark = [pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs"),
              pytest.mark.usefixtures("one_thread", "registered")]
VOCAB = 61
NEW_MASKS = "q_length" in inspect.signature(theirs.sdpa_mask).parameters


@pytest.fixture(scope="module")
def registered():
    register()
    register("tilewise-tiled", backend="tiled")
    yield
    unregister("tilewise-tiled")
    unregister()


# ---- masks ------------------------------------------------------------------------------------------------------------

B, S = 3, 23
G = torch.Generator().manual_seed(0)
GROUPS = torch.tensor([0, 0, 0, -1, 1, 1, -1, 2, 2, 2, 2, -1, -1, 3, 3, 3, 3, 3, 3, -1, -1, 4, 4]).expand(B, S)
STARTS = torch.tensor([0, 4, 9])
POSITIONS = torch.cat([torch.arange(8), torch.arange(5), torch.arange(10)]).expand(B, S)
FUNCTIONS = {
    "causal": theirs.causal_mask_function,
    "window": theirs.sliding_window_causal_mask_function(6),
    "bidirectional": getattr(theirs, "bidirectional_mask_function", lambda b, h, q, k: q >= 0),
    "bidirectional window": lambda b, h, q, k: (abs(q - k) <= 4) & (q >= 0),
    "chunked": theirs.chunked_causal_mask_function(5, STARTS),
    "image blocks": theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: (GROUPS[b, q] == GROUPS[b, k]) & (GROUPS[b, q] >= 0)),
    "packed": theirs.and_masks(theirs.packed_sequence_mask_function((POSITIONS == 0).cumsum(-1)), theirs.causal_mask_function),
    "prefix": theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k < STARTS[b]),
    "only itself": lambda b, h, q, k: q == k,
    "strictly before": lambda b, h, q, k: (k < q) & (2 * k != q),
}
LEFT = torch.arange(S) >= torch.tensor([0, 5, 11])[:, None]
PADDINGS = {"none": None, "all there": torch.ones(B, S, dtype=torch.bool), "left": LEFT, "right": LEFT.flip(-1),
            "holes": torch.rand(B, S, generator=G) < 0.7, "nothing": LEFT & (torch.arange(B) != 1)[:, None]}
# (queries, keys, position of the first query, of the first key): without a cache, with one, one query, static, sliding caches
PLACES = {"square": (S, S, 0, 0), "later": (7, S, S - 7, 0), "decode": (1, S, S - 1, 0), "static": (9, S, 0, 0),
          "static decode": (1, S, 12, 0), "sliding": (4, 9, 19, 14), "beyond the padding mask": (5, S + 6, 3, 0)}


def dense(function, place, padding):
    nq, nk, first_q, first_k = place
    b, q, k = torch.arange(B)[:, None, None, None], torch.arange(nq)[:, None] + first_q, torch.arange(nk) + first_k
    visible = function(b, torch.zeros_like(b), q, k).expand(B, 1, nq, nk)
    if padding is not None:
        visible = visible & torch.nn.functional.pad(padding, (0, max(0, nk + first_k - S)))[:, None, None, first_k:first_k + nk]
    return visible


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_is_what_its_function_and_the_padding_say(name, place):
    if place.startswith("beyond") and name in ("image blocks", "packed"):
        pytest.skip("reads a table of the tokens there are")
    nq, nk, first_q, first_k = place = PLACES[place]
    for padding in PADDINGS.values():
        expected = dense(FUNCTIONS[name], place, padding)
        found = masking.attention_mask(batch_size=B, q_length=nq, kv_length=nk, q_offset=torch.tensor(first_q), kv_offset=first_k,
                                       mask_function=FUNCTIONS[name], attention_mask=padding, device="cpu")
        assert found.shape == expected.shape
        assert torch.equal(found.to_dense(), expected)
        if found.mask is not None:
            assert_tiles_hold(found.mask.classify(B, 1, nq, nk, 3, 4), expected)


def assert_tiles_hold(classes, visible):
    """Tiles of 3 queries and 4 keys said to be empty or full are."""
    for i, j in itertools.product(*map(range, classes.shape[2:])):
        tile = visible[:, :, 3 * i:3 * i + 3, 4 * j:4 * j + 4].flatten(2)
        assert not (tile.any(2) & (classes[:, :, i, j] == EMPTY)).any()
        assert not (~tile.all(2) & (classes[:, :, i, j] == FULL)).any()


@pytest.mark.parametrize("name, bands", [("causal", True), ("window", True), ("bidirectional window", True), ("chunked", False)])
def test_masks_of_bounds_have_bands(name, bands):
    """So that kernels need no lists of tiles: those are rebuilt when a cache grows, and few queries cannot use them."""
    mask = masking.attention_mask(batch_size=B, q_length=7, q_offset=9, kv_length=16, mask_function=FUNCTIONS[name],
                                  attention_mask=LEFT[:, :16], device="cpu").mask
    assert bool(mask.keys) == bool(mask.queries) == bands
    found = masking.attention_mask(batch_size=B, q_length=1, q_offset=15, kv_length=16, mask_function=FUNCTIONS["causal"],
                                   attention_mask=torch.ones(B, 16), device="cpu")
    assert found.mask is None  # one query with all keys before it


def test_offsets_do_not_compile_again():
    programs = set()
    for offset in (9, 11):
        mask = masking.attention_mask(batch_size=B, q_length=2, q_offset=offset, kv_length=S, mask_function=FUNCTIONS["window"],
                                      attention_mask=LEFT, device="cpu").mask
        q, k = torch.zeros(B, 2, 1, 4), torch.zeros(B, S, 1, 4)
        programs.add(tw.explain(q, k, k, mask=mask).problem.program)
    assert len(programs) == 1


def test_a_mask_moves_with_its_tensors():
    found = masking.attention_mask(batch_size=B, q_length=S, kv_length=S, mask_function=FUNCTIONS["chunked"], attention_mask=LEFT,
                                   device="cpu")
    assert found.to("cpu", non_blocking=True) is found.contiguous() is found
    q = torch.zeros(B, S, 1, 4, device="meta")
    there = tw.api.make(q, q, q, mask=found.to("meta").mask)[1]
    assert {t.device.type for t in there.captured} == {"meta"}
    assert len(there.captured) == len({id(t) for t in there.captured})
    with pytest.raises(TypeError, match="to_dense"):
        found[:, :, :, :4]


# ---- models -----------------------------------------------------------------------------------------------------------

WIDTHS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
DECODER = dict(WIDTHS, vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1,
               eos_token_id=None, pad_token_id=0)
ALTERNATING = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
DECODERS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(DECODER, sliding_window=6)),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(DECODER, **ALTERNATING, attn_logit_softcapping=2.0,
                                                         query_pre_attn_scalar=17)),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(DECODER, **ALTERNATING, query_pre_attn_scalar=17)),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", dict(DECODER, **ALTERNATING, num_local_experts=2, num_experts_per_tok=1)),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                                                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1,
                                                   eos_token_id=None, pad_token_id=0)),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", dict(
        DECODER, attention_chunk_size=6, intermediate_size_mlp=48, num_local_experts=2, no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"])),
}


def build(name, table=DECODERS, **changes):
    config, model, settings = table[name]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**(settings | changes)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks") or parameter.dim() > 1:
                parameter.normal_(0, 0.3)  # large enough that attention is far from uniform
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others have no fp64
    return model


class Double(TorchFunctionMode):
    """What a model's code asks for in fp32, such as its softmax, is fp64: the truth."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        def wide(x):
            return torch.float64 if x is torch.float32 else x
        return function(*map(wide, args), **{key: wide(x) for key, x in (kwargs or {}).items()})


def results(model, implementation, inputs, tokens=None):
    """Logits where there are tokens, loss and gradients."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    out = model(**inputs)
    logits = getattr(out, "logits", None)
    logits = out.last_hidden_state if logits is None else logits
    logits = logits if tokens is None else logits[tokens]
    loss = getattr(out, "loss", None)
    loss = logits.square().mean() if loss is None else loss
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {"logits": logits.detach(), "loss": loss.detach(),
            **{n: g for n, g in zip(names, gradients, strict=True) if g is not None}}


def assert_like_eager(model, inputs, implementation, tokens=None):
    """Errors against the same model in fp64 are at most 2 times eager's (3 times for gradients), and a rounding floor."""
    standard = results(model, "eager", inputs, tokens)
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    with Double():
        truth = results(copy.deepcopy(model).double(), "eager", wide, tokens)
    found = results(model, implementation, inputs, tokens)
    assert found.keys() == truth.keys()
    for name, x in found.items():
        assert x.shape == truth[name].shape
        floor = 4 * torch.finfo(torch.float32).eps * truth[name].abs().max()
        error, eagers = ((y.double() - truth[name]).abs().max() for y in (x, standard[name]))
        assert error <= (2 if name in ("logits", "loss") else 3) * eagers + floor, (name, float(error), float(eagers))


@pytest.fixture
def calls(monkeypatch):
    """The options of every call of tw.attention that a model makes."""
    made = []

    @functools.wraps(tw.attention)
    def recorded(*args, **options):
        made.append(options)
        return tw.attention(*args, **options)
    monkeypatch.setattr(ours, "tilewise_attention", recorded)
    return made


def batch(padding=None):
    ids = torch.randint(2, VOCAB, (B, S), generator=torch.Generator().manual_seed(1))
    if padding is None:
        return dict(input_ids=ids, labels=ids), None
    tokens = PADDINGS[padding]
    foretold = tokens & tokens.roll(1, 1)  # no padding, whose row is of no meaning, foretells a token
    return dict(input_ids=ids.where(tokens, 0), labels=ids.where(foretold, -100), attention_mask=tokens.long()), tokens


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_train_as_in_eager(name, padding, calls):
    inputs, tokens = batch(padding)
    assert_like_eager(build(name).train(), inputs, "tilewise-tiled", tokens)
    assert len(calls) == 2
    assert all(call["bias"] is None and "tensor" not in repr(call["mask"]) for call in calls)


@pytest.mark.parametrize("name, padding", [("llama", "left"), ("gemma2", None), ("gpt_oss", "right")])
def test_decoders_train_by_native_kernels(name, padding):
    inputs, tokens = batch(padding)
    assert_like_eager(build(name).train(), inputs, "tilewise", tokens)
