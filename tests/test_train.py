"""Text and the loop: the same bytes, batches and losses every time."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tilewise.models import GPT, GPTConfig
from tilewise.train import Corpus, Recipe, batch, bits_per_byte, learning_rate, load_corpus, make_optimizer, train
from tilewise.train.text import list_files

RECIPE = Recipe(steps=12, batch=4, context=16, lr=1e-2, warmup=3, val_every=5, val_batches=2)
pytestmark = pytest.mark.usefixtures("one_thread")


def attend(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def new_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(context=16, layers=1, heads=2, width=32), attend)


def small_corpus():
    data = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8)
    return Corpus("a fox", 1, data[:-200], data[-200:])


def write_files(folder, names, size=3000):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes([65 + i]) * size)


def test_the_standard_library_is_there_for_everyone():
    corpus = load_corpus(max_bytes=200_000)
    text = bytes(corpus.train.tolist())
    assert len(corpus.train) + len(corpus.val) == 200_000
    assert len(corpus.val) == 20_000
    assert b"def " in text
    assert b"\0" not in text


def test_order_of_files_depends_on_names_only(tmp_path):
    names = ["b.txt", "a.txt", "deep/c.txt", "deep/d.txt"]
    write_files(tmp_path / "one", names)
    write_files(tmp_path / "two", reversed(names))
    orders = [[file.relative_to(tmp_path / root).as_posix() for file in list_files(tmp_path / root)]
              for root in ("one", "two")]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(names)


def test_folders_leave_out_what_is_not_text(tmp_path):
    write_files(tmp_path, ["good.txt", ".hidden/secret.txt", "site-packages/other.txt", "tests/test_it.txt"])
    (tmp_path / "image.bin").write_bytes(b"PNG\0\1" * 5000)
    corpus = load_corpus(tmp_path, min_bytes=100)
    assert corpus.files == 1
    assert corpus.train.unique().tolist() == [65]


@pytest.mark.parametrize("content, message", [
    (b"short", "at least 16,384 bytes"), (b"", "got 0"), (b"\0" * 99999, "binary"),
])
def test_bad_text_is_one_clear_error(tmp_path, content, message):
    file = tmp_path / "text"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(file)


def test_missing_text_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_corpus(tmp_path / "nothing")


def test_a_batch_is_a_function_of_seed_and_step():
    data = torch.arange(256, dtype=torch.uint8).repeat(20)
    x, y = batch(data, 7, size=5, context=9, seed=3)
    assert x.shape == y.shape == (5, 9)
    assert torch.equal(y, (x + 1) % 256)            # targets are the following bytes
    again = batch(data, 7, size=5, context=9, seed=3)
    assert torch.equal(x, again[0])
    assert not torch.equal(x, batch(data, 8, size=5, context=9, seed=3)[0])
    assert not torch.equal(x, batch(data, 7, size=5, context=9, seed=4)[0])


def test_batches_reach_both_ends_of_the_data():
    data = torch.arange(10, dtype=torch.uint8)
    x, y = batch(data, 0, size=500, context=4, seed=0)
    assert x.min() == 0
    assert y.max() == 9


def test_learning_rate_warms_up_and_falls_to_its_share():
    recipe = Recipe(steps=100, lr=1.0, final_lr=0.1, warmup=10)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)


def test_norms_do_not_decay_and_nothing_is_left_out():
    model = new_model()
    decayed, kept = make_optimizer(model, RECIPE).param_groups
    assert {weight.dim() for weight in decayed["params"]} == {2}
    assert {weight.dim() for weight in kept["params"]} == {1}
    assert kept["weight_decay"] == 0 < decayed["weight_decay"]
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def run(seed=0, **changes):
    return list(train(new_model(), small_corpus(), replace(RECIPE, seed=seed, **changes)))


def test_training_repeats_bit_for_bit_and_follows_its_seed():
    losses = [[point.loss for point in run(seed)] for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_training_learns_and_validates_when_due():
    points = run(steps=60)
    assert [point.step for point in points if point.val_loss is not None] == [*range(0, 60, 5), 59]
    assert points[0].loss == pytest.approx(math.log(256), abs=0.2)
    assert points[-1].val_loss < 2.0
    assert all(point.seconds > 0 for point in points)


def test_autocast_trains_about_the_same():
    exact, rounded = run(steps=30), run(steps=30, bf16=True)
    differences = [abs(a.loss - b.loss) for a, b in zip(exact, rounded, strict=True)]
    assert 0 < max(differences) < 0.1


def test_bits_per_byte_of_a_uniform_guess_is_eight():
    assert bits_per_byte(math.log(256)) == pytest.approx(8)
