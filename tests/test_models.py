"""The GPT: what it may see, what it starts from, and that generation is what training taught."""

import math

import pytest
import torch
import torch.nn.functional as F

from tilewise.models import GPT, GPTConfig, rotate

CONFIG = GPTConfig(vocab=256, context=32, layers=2, heads=2, width=32)
pytestmark = pytest.mark.usefixtures("one_thread")


def attend(q, k, v):
    """Dense causal attention, the last query on the last key."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def new_model(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return GPT(config, attend)


def random_tokens(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def test_no_token_sees_a_later_one():
    model, seen = new_model(), 7
    embedded = []
    model.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    logits = model(random_tokens(1, 12))[0, seen]
    (grad,) = torch.autograd.grad(logits.square().sum(), embedded)
    reached = grad[0].abs().amax(-1)
    assert (reached[: seen + 1] > 0).all()
    assert (reached[seen + 1 :] == 0).all()


def test_loss_starts_at_the_uniform_guess():
    tokens = random_tokens(8, 33)
    loss = F.cross_entropy(new_model()(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_rotated_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    products = [(rotate(q, i) * rotate(k, j)).sum().item() for i, j in ((5, 2), (105, 102), (3, 0))]
    assert products == pytest.approx([products[0]] * 3, abs=1e-4)
    assert abs((rotate(q, 5) * rotate(k, 3)).sum().item() - products[0]) > 1e-2
    assert rotate(q, 9).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)


def test_rotation_starts_at_nothing_and_counts_from_start():
    x = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x)[:, :1], x[:, :1])
    torch.testing.assert_close(rotate(x)[:, 4:], rotate(x[:, 4:], start=4))


def test_reading_in_pieces_is_reading_at_once():
    model, tokens = new_model(), random_tokens(2, 20)
    first, past = model.read(tokens[:, :13])
    second, past = model.read(tokens[:, 13:], past)
    torch.testing.assert_close(torch.cat([first, second], 1), model(tokens), atol=1e-5, rtol=1e-5)
    assert past.seen == 20


def test_the_past_is_bounded_by_the_context():
    model = new_model()
    out = model.generate(random_tokens(1, 5), 60, generator=torch.Generator().manual_seed(0))
    assert out.shape == (1, 65)
    _, past = model.read(out)
    assert all(k.shape[1] == CONFIG.context for k, _ in past.layers)


def test_generation_repeats_with_its_generator_and_keeps_the_prompt():
    model, prompt = new_model(), random_tokens(2, 6)
    a, b, c = (model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(a[:, :6], prompt)


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model, prompt = new_model(), random_tokens(1, 4)
    out = model.generate(prompt, 8, temperature=0)
    assert torch.equal(out[:, 4:], model(out)[:, 3:-1].argmax(-1))
    assert torch.equal(out, model.generate(prompt, 8, top_k=1, generator=torch.Generator().manual_seed(3)))


def test_overfits_a_tiny_batch():
    model, tokens = new_model(), random_tokens(2, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_counts():
    c, model = CONFIG, new_model()
    matrices = c.vocab * c.width + c.layers * 12 * c.width**2
    assert model.parameter_count() == matrices + (2 * c.layers + 1) * c.width
    assert model.training_flops(3, 10) == 3 * (6 * matrices * 10 + 6 * c.layers * c.width * 100)


def test_a_width_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match=r"width: expected a multiple of 2 \* heads = 6, got 32"):
        GPTConfig(heads=3, width=32)
