"""Hugging Face models on Tilewise: what `eager` computes, with masks that stay functions of the indices."""
import copy
import functools
import itertools
import sys

import pytest
import torch
from support.backends import AVAILABLE
from torch.nn.attention.flex_attention import create_block_mask
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
    "image blocks": theirs.or_masks(theirs.causal_mask_function,
                                    lambda b, h, q, k: (GROUPS[b, q] == GROUPS[b, k]) & (GROUPS[b, q] >= 0)),
    "packed": theirs.and_masks(theirs.packed_sequence_mask_function((POSITIONS == 0).cumsum(-1)), theirs.causal_mask_function),
    "prefix": theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k < STARTS[b]),
    "from a start on": lambda b, h, q, k: (k >= STARTS[b]) & (k - STARTS[b] <= q) & (q - k < STARTS[b]),
    "late queries": lambda b, h, q, k: (q > 3) & (k + 2 >= q),
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
        offset = torch.tensor(first_q)
        found = masking.index_mask(batch_size=B, q_length=nq, kv_length=nk, q_offset=offset, kv_offset=first_k,
                                   mask_function=FUNCTIONS[name], attention_mask=padding, device="cpu")
        offset += nq  # as a static cache counts on
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


@pytest.mark.parametrize("name, bands", [("causal", True), ("window", True), ("bidirectional window", True),
                                         ("chunked", False)])
def test_masks_of_bounds_have_bands(name, bands):
    """So that kernels need no lists of tiles: those are rebuilt when a cache grows, and few queries cannot use them."""
    mask = masking.index_mask(batch_size=B, q_length=7, q_offset=9, kv_length=16, mask_function=FUNCTIONS[name],
                                  attention_mask=LEFT[:, :16], device="cpu").mask
    assert bool(mask.keys) == bool(mask.queries) == bands
    found = masking.index_mask(batch_size=B, q_length=1, q_offset=15, kv_length=16, mask_function=FUNCTIONS["causal"],
                                   attention_mask=torch.ones(B, 16), device="cpu")
    assert found.mask is None  # one query with all keys before it


def test_offsets_do_not_compile_again():
    programs = set()
    for offset in (9, 11):
        mask = masking.index_mask(batch_size=B, q_length=2, q_offset=offset, kv_length=S, mask_function=FUNCTIONS["window"],
                                      attention_mask=LEFT, device="cpu").mask
        q, k = torch.zeros(B, 2, 1, 4), torch.zeros(B, S, 1, 4)
        programs.add(tw.explain(q, k, k, mask=mask).problem.program)
    assert len(programs) == 1


def test_a_mask_moves_with_its_tensors():
    found = masking.index_mask(batch_size=B, q_length=S, kv_length=S, mask_function=FUNCTIONS["chunked"],
                                   attention_mask=LEFT, device="cpu")
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
    largest = max(x.abs().max() for name, x in truth.items() if name not in ("logits", "loss"))
    for name, x in found.items():
        assert x.shape == truth[name].shape
        error, eagers = ((y.double() - truth[name]).abs().max() for y in (x, standard[name]))
        factor, scale = (2, truth[name].abs().max()) if name in ("logits", "loss") else (3, largest)  # some sums cancel
        assert error <= factor * eagers + 4 * torch.finfo(torch.float32).eps * scale, (name, float(error), float(eagers))


@pytest.fixture
def calls(monkeypatch):
    """The options of every call of tw.attention that a model makes."""
    made = []

    @functools.wraps(tw.attention)
    def recorded(*args, **options):
        made.append(options)
        return tw.attention(*args, **options)
    monkeypatch.setattr(ours, "attention", recorded)
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


@pytest.mark.parametrize("name, padding", [("llama", "left"), ("gpt_oss", "right")])
def test_decoders_train_by_native_kernels(name, padding):
    inputs, tokens = batch(padding)
    assert_like_eager(build(name).train(), inputs, "tilewise", tokens)


OTHERS = {
    "bert": ("BertConfig", "BertForMaskedLM", dict(WIDTHS, vocab_size=VOCAB, max_position_embeddings=64,
                                                   hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "vit": ("ViTConfig", "ViTModel", dict(WIDTHS, image_size=20, patch_size=4, hidden_dropout_prob=0.0,
                                          attention_probs_dropout_prob=0.0)),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", dict(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=15, max_target_positions=64, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None)),
    "t5": ("T5Config", "T5ForConditionalGeneration", dict(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
        eos_token_id=None)),
}


def others_inputs(name):
    inputs, tokens = batch("right")
    random = torch.Generator().manual_seed(2)
    if name == "bert":
        return inputs, tokens
    if name == "vit":
        return dict(pixel_values=torch.randn(B, 3, 20, 20, generator=random)), None
    if name == "whisper":
        return dict(input_features=torch.randn(B, 8, 30, generator=random), labels=inputs["input_ids"]), None
    return dict(inputs, labels=inputs["input_ids"].flip(-1)), None


@pytest.mark.parametrize("name", OTHERS)
def test_encoders_and_both_train_as_in_eager(name, calls):
    inputs, tokens = others_inputs(name)
    assert_like_eager(build(name, OTHERS).train(), inputs, "tilewise-tiled", tokens)
    assert len(calls) == (2 if name in ("bert", "vit") else 3)
    assert ["bound" in repr(call["mask"]) or "causal" in repr(call["mask"]) for call in calls].count(True) == (
        name in ("whisper", "t5"))


def test_a_compiled_model_serves_every_padding():
    """Only where the mask is made there is a break; another padding is another input, not another graph."""
    model = build("mistral", num_hidden_layers=1).eval()
    model.set_attn_implementation("tilewise-tiled")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    graphs = []
    for padding in ("left", "right", "holes"):
        inputs, _ = batch(padding)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2] > 0


def test_checkpointed_layers_have_the_same_gradients():
    model, (inputs, _) = build("gemma3").train(), batch("left")
    expected = results(model, "tilewise-tiled", inputs)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    found = results(model, "tilewise-tiled", inputs | dict(use_cache=False))
    torch.testing.assert_close(found, expected)


def test_images_see_themselves_both_ways():
    vision = dict(WIDTHS, num_hidden_layers=1, image_size=28, patch_size=7)
    model = build("gemma3", {"gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", dict(
        text_config=dict(DECODERS["gemma3"][2]), vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3))}).eval()
    inputs, tokens = batch("left")
    inputs["input_ids"][:, 13:17] = VOCAB - 1
    pixels = torch.randn(B, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    inputs |= dict(pixel_values=pixels, token_type_ids=(inputs["input_ids"] == VOCAB - 1).long())
    assert_like_eager(model, inputs, "tilewise-tiled", tokens)


@pytest.mark.parametrize("given", ["boolean", "added", "of torch"])
def test_masks_of_the_user(given):
    inputs, _ = batch()
    visible = dense(FUNCTIONS["prefix"], PLACES["square"], None)
    if given == "of torch":
        mask = create_block_mask(FUNCTIONS["prefix"], B, None, S, S, device="cpu", BLOCK_SIZE=8)
    else:
        mask = visible if given == "boolean" else torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    model = build("llama").eval()
    out = {}
    for name, it in (("eager", torch.where(visible, 0.0, -torch.inf)), ("tilewise-tiled", mask)):
        model.set_attn_implementation(name)
        out[name] = model(**inputs | dict(attention_mask=it)).logits
    torch.testing.assert_close(out["tilewise-tiled"], out["eager"])


def packed_inputs(cu=False):
    """The first of a batch as three sequences in a row, and the same sequences with padding."""
    row = batch()[0]["input_ids"][:1]
    ends = torch.tensor([0, 8, 13, 23], dtype=torch.int32)
    packed = dict(input_ids=row, position_ids=POSITIONS[:1])
    if cu:
        packed |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=10, max_length_k=10)
    return packed, [dict(input_ids=x) for x in row.split([8, 5, 10], 1)]


@pytest.mark.parametrize("cu", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4"])
def test_packed_sequences_are_apart(name, cu):
    model = build(name).eval()
    model.set_attn_implementation("tilewise-tiled")
    packed, alone = packed_inputs(cu)
    expected = torch.cat([model(**one, use_cache=False).logits for one in alone], 1)
    torch.testing.assert_close(model(**packed, use_cache=False).logits, expected)


def test_cu_seq_lens_alone_pack():
    x = [torch.randn(1, 2, S, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    ends = torch.tensor([0, 8, 13, 23], dtype=torch.int32)
    bias = torch.randn(1, 2, S, S, generator=torch.Generator().manual_seed(4))
    call = functools.partial(ours.attention_forward, torch.nn.Module(), backend="tiled", sliding_window=4)
    for more in (False, True):
        def bias_of(rows, more=more):
            return dict(position_bias=bias[:, :, rows, rows]) if more else {}
        for causal in (False, True):
            found = call(*x, None, is_causal=causal, cu_seq_lens_q=ends, cu_seq_lens_k=ends, **bias_of(slice(0, S)))[0]
            for rows in (slice(0, 8), slice(8, 13), slice(13, 23)):
                alone = call(*(t[:, :, rows] for t in x), None, is_causal=causal, **bias_of(rows))[0]
                torch.testing.assert_close(found[:, rows], alone)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected packed sequences in a batch of 1, got a batch of 2"):
        call(*(t.expand(2, -1, -1, -1) for t in x), None, cu_seq_lens_q=ends)


def test_dropout_follows_the_generator():
    model = build("llama", attention_dropout=0.4).train()
    inputs, _ = batch()
    model.set_attn_implementation("tilewise")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**inputs).loss.item())
    assert losses[0] == losses[1] != losses[2]
    assert abs(losses[0] - model.eval()(**inputs).loss.item()) > 1e-3


# ---- generation -------------------------------------------------------------------------------------------------------

def generate(model, implementation, padding="left", seed=0, **options):
    model.set_attn_implementation(implementation)
    inputs, _ = batch(padding)
    torch.manual_seed(seed)
    del inputs["labels"]
    return model.generate(**inputs, max_new_tokens=9, pad_token_id=0, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_as_in_eager(name, cache, calls):
    model = build(name, tie_word_embeddings=False).eval()  # else some repeat their last token, whatever they attend to
    found = generate(model, "tilewise-tiled", cache_implementation=cache)
    assert len(calls) == 2 * 9
    assert all(call["bias"] is None and "tensor" not in repr(call["mask"]) for call in calls)
    assert torch.equal(found, generate(model, "eager", cache_implementation=cache))
    assert len(found[:, S:].unique()) > 3


@pytest.mark.parametrize("options", [dict(do_sample=True, top_k=20), dict(num_beams=3), dict(prompt_lookup_num_tokens=2),
                                     dict(use_cache=False), dict(prefill_chunk_size=5)], ids=str)
def test_ways_to_generate(options):
    padding = None if "prompt_lookup_num_tokens" in options else "left"
    model = build("gemma3" if padding else "llama").eval()
    found = generate_one(model, "tilewise-tiled", padding, options)
    assert torch.equal(found, generate_one(model, "eager", padding, options))


def generate_one(model, implementation, padding, options):
    if padding is not None:
        return generate(model, implementation, padding, **options)
    model.set_attn_implementation(implementation)  # one sequence, without padding, at a time
    return model.generate(batch()[0]["input_ids"][:1], max_new_tokens=9, pad_token_id=0, **options)


def test_a_helper_model_drafts():
    model, helper = build("llama").eval(), build("llama", num_hidden_layers=1).eval()
    found = {}
    for name in ("eager", "tilewise-tiled"):
        helper.set_attn_implementation(name)
        found[name] = generate_one(model, name, None, dict(assistant_model=helper))
    assert torch.equal(found["tilewise-tiled"], found["eager"])


def test_generation_by_native_kernels():
    model = build("llama").eval()
    for cache in ("dynamic", "static"):
        assert torch.equal(generate(model, "tilewise", cache_implementation=cache),
                           generate(model, "eager", cache_implementation=cache))


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_encoder_and_decoder_generate(name):
    model = build(name, OTHERS).eval()
    inputs = {k: x for k, x in others_inputs(name)[0].items() if k != "labels"}
    found = {}
    for implementation in ("eager", "tilewise-tiled"):
        model.set_attn_implementation(implementation)
        found[implementation] = transformers.GenerationMixin.generate(model, **inputs, max_new_tokens=9, pad_token_id=0)
    assert torch.equal(found["tilewise-tiled"], found["eager"])


# ---- memory -----------------------------------------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_memory_is_linear(name):
    """Padding, causal, window: forward and backward, no tensor comes near S x S, as in eager."""
    n = 1536
    model = build(name, max_position_embeddings=n).train()
    ids = torch.randint(2, VOCAB, (1, n), generator=G)
    tokens = (torch.arange(n) >= 100)[None].long()
    found = {}
    for implementation in ("tilewise", "eager"):
        model.set_attn_implementation(implementation)
        with Largest() as largest:
            model(input_ids=ids, attention_mask=tokens, labels=ids).loss.backward()
        found[implementation] = largest.bytes
    assert found["tilewise"] < n * n / 2  # half a boolean mask
    assert found["eager"] >= 4 * n * n


# ---- what is refused ----------------------------------------------------------------------------------------------------

def test_refusals():
    x = torch.randn(2, 2, 6, 8)
    call = functools.partial(ours.attention_forward, torch.nn.Module(), x, x, x)
    with pytest.raises(NotImplementedError, match=r"output_attentions: .*eager"):
        call(None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="cache: the paged cache"):
        call(None, cache=object())
    with pytest.raises(TypeError, match=r"attention_mask: expected a boolean or floating tensor .*got torch.int64 \[2, 6\]"):
        call(torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention_mask: expected one of \[B, 1, S_q, S_k\] = \[2, 1, 6, 6\]"):
        call(masking.index_mask(batch_size=2, q_length=6, kv_length=7, device="cpu"))
    with pytest.raises(ValueError, match="attention_mask: expected a mask where 4 queries meet 6 keys"):
        ours.attention_forward(torch.nn.Module(), x[:, :, :4], x, x, None)
    with pytest.raises(tw.trace.capture.CaptureError, match="instead of if"):
        masking.index_mask(batch_size=2, q_length=6, kv_length=6, mask_function=lambda b, h, q, k: k <= q if q else k)
    model = build("llama")
    model.set_attn_implementation("tilewise")
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(**batch()[0], output_attentions=True)


def test_without_a_mask_the_arguments_say_who_sees_whom():
    x = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(3))
    module = torch.nn.Module()
    module.is_causal = False
    for options, mask in [(dict(), None), (dict(is_causal=True), tw.causal()), (dict(sliding_window=3), tw.window(2, 2)),
                          (dict(is_causal=True, sliding_window=3), tw.window(2, 0)), (dict(sliding_window=9), None)]:
        expected = tw.attention(x, x, x, mask=mask, layout="bhsd", backend="tiled").transpose(1, 2)
        torch.testing.assert_close(ours.attention_forward(module, x, x, x, None, backend="tiled", **options)[0], expected)
    last = ours.attention_forward(torch.nn.Module(), x[:, :, -1:], x, x, None, sliding_window=3, backend="tiled")[0]
    expected = tw.attention(x, x, x, mask=tw.window(2, 0), layout="bhsd", backend="tiled").transpose(1, 2)[:, -1:]
    torch.testing.assert_close(last, expected)


def test_names():
    functions, mask_functions = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    register("another")
    register("another", backend="tiled")
    assert functions["another"].keywords == {"backend": "tiled"}
    assert mask_functions["another"] is masking.index_mask
    unregister("another")
    assert "another" not in functions
    assert "another" not in mask_functions
    with pytest.raises(ValueError, match="name: expected one that register"):
        unregister("another")
    for name in ("sdpa", "eager", "org/kernel", "paged|tilewise", "flash_tilewise", ""):
        with pytest.raises(ValueError, match="name: expected"):
            register(name)
    with pytest.raises(ValueError, match="backend: expected"):
        register(backend="fastest")


def test_a_missing_or_old_library_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.49.0")
    with pytest.raises(ImportError, match=r"needs transformers >= 4\.57, found 4\.49\.0"):
        register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'tilewise\[hf\]'"):
        register()
