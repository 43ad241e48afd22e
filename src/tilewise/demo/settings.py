"""The sizes of the demo: for two CPU cores, for a GPU, and for a test."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tilewise.doctor import memory_bytes
from tilewise.models import GPTConfig
from tilewise.train import Recipe


@dataclass(frozen=True)
class Settings:
    """One GPT and how to train it; then attention of [batch, length, heads, head_dim], measured at growing lengths.

    `limit` is the memory that a measurement may use, in bytes; `seconds` is the time all of them may take together.
    """

    device: str
    dtype: str
    model: GPTConfig
    recipe: Recipe
    batch: int
    heads: int
    head_dim: int
    lengths: tuple[int, ...]
    limit: int
    seconds: float
    sample: int = 600


def choose(device: str, *, steps: int | None = None, seed: int = 0, quick: bool = False) -> Settings:
    """The settings for "auto", "cpu", "cuda" or "cuda:N"; `steps` and `seed` override the recipe's."""
    device = check_device(device)
    if quick:
        settings = for_test(device)
    else:
        settings = for_gpu(device) if device.startswith("cuda") else for_cpu()
    steps = settings.recipe.steps if steps is None else steps
    recipe = replace(settings.recipe, steps=steps, warmup=max(1, steps // 5), seed=seed)
    return replace(settings, recipe=recipe)


def check_device(name: str) -> str:
    """The device to use, or a ValueError that says which there are."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu"] + [f"cuda:{i}" for i in range(gpus)]
    name = {"auto": names[min(1, gpus)], "cuda": "cuda:0"}.get(name, name)
    if name not in names:
        raise ValueError(f"device: expected auto or one of {', '.join(names)} here, got {name}")
    return name


def for_cpu() -> Settings:
    """About three minutes on two cores."""
    return Settings(
        device="cpu", dtype="float32",
        model=GPTConfig(context=512, layers=4, heads=2, width=128),
        recipe=Recipe(steps=300, batch=2, context=512, lr=2e-3, val_batches=16),
        batch=1, heads=2, head_dim=64, lengths=doubling(512, 65536),
        limit=min(2 << 30, memory_bytes() // 2 or 2 << 30), seconds=110.0,
    )


def for_gpu(device: str) -> Settings:
    """A larger model in bf16, and contexts until the GPU is full."""
    free = torch.cuda.mem_get_info(device)[0]
    return Settings(
        device=device, dtype="bfloat16",
        model=GPTConfig(context=1024, layers=8, heads=8, width=512),
        recipe=Recipe(steps=400, batch=max(2, min(16, free >> 31)), context=1024, lr=1e-3, bf16=True),
        batch=1, heads=16, head_dim=64, lengths=doubling(1024, 1 << 20),
        limit=int(0.9 * free), seconds=90.0,
    )


def for_test(device: str) -> Settings:
    """Seconds: shows that everything works, and little about speed."""
    return Settings(
        device=device, dtype="float32" if device == "cpu" else "bfloat16",
        model=GPTConfig(context=64, layers=2, heads=2, width=32),
        recipe=Recipe(steps=20, batch=4, context=64, val_every=10, val_batches=1),
        batch=1, heads=2, head_dim=16, lengths=(512, 2048, 4096),
        limit=64 << 20, seconds=60.0, sample=40,
    )


def doubling(first: int, last: int) -> tuple[int, ...]:
    """first, 2 * first, ... up to last."""
    lengths = [first]
    while lengths[-1] * 2 <= last:
        lengths.append(lengths[-1] * 2)
    return tuple(lengths)
