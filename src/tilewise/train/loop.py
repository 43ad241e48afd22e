"""The training loop: AdamW, warm-up and cosine decay, clipped gradients, one Point for every step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewise.train.text import Corpus, batch


@dataclass(frozen=True)
class Recipe:
    """How to train. Lengths are in tokens; `final_lr` is a share of `lr`; bf16 means autocast with fp32 weights."""

    steps: int = 200
    batch: int = 8
    context: int = 256
    lr: float = 3e-3
    final_lr: float = 0.1
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    val_every: int = 50
    val_batches: int = 4
    seed: int = 0
    bf16: bool = False


class Point(NamedTuple):
    """One step: mean loss in nats per byte, validation loss where it was taken, seconds of the step itself."""

    step: int
    loss: float
    val_loss: float | None
    seconds: float


def train(model: nn.Module, corpus: Corpus, recipe: Recipe) -> Iterator[Point]:
    """Trains `model` (tokens to logits) step by step; each step happens when its Point is asked for."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, recipe)
    for step in range(recipe.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        x, y = batch(corpus.train, step, size=recipe.batch, context=recipe.context, seed=recipe.seed)
        loss = _loss(model, x.to(device), y.to(device), recipe.bf16)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        value = loss.item()                                             # also waits for the device
        seconds = time.perf_counter() - began
        due = step == recipe.steps - 1 or (recipe.val_every and step % recipe.val_every == 0)
        yield Point(step, value, validate(model, corpus, recipe) if due else None, seconds)


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus, recipe: Recipe) -> float:
    """Mean loss over the same few validation batches every time, in nats per byte."""
    device = next(model.parameters()).device
    total = 0.0
    for i in range(recipe.val_batches):
        x, y = batch(corpus.val, i, size=recipe.batch, context=recipe.context, seed=recipe.seed)
        total += _loss(model, x.to(device), y.to(device), recipe.bf16).item()
    return total / recipe.val_batches


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    weights = list(model.parameters())
    return torch.optim.AdamW([
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ], lr=recipe.lr, betas=(0.9, 0.95))


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear up to `lr` over `warmup` steps, then a half cosine down to `final_lr * lr` at the last step."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def bits_per_byte(loss: float) -> float:
    """A loss in nats per byte, in bits."""
    return loss / math.log(2)


def _loss(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> Tensor:
    """Mean cross-entropy in fp32 of model(x) [B, S, V] against y [B, S]."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        logits = model(x)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
