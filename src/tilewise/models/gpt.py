"""A GPT: pre-norm blocks, rotary positions, GELU, one matrix for both the embedding and the output.

Reads in order: GPTConfig -> Attention -> MLP -> Block -> GPT. The attention itself is handed in: `attend(q, k, v)`
takes [B, S_q, H, D] and twice [B, S_k, H, D], is causal with the last query on the last key, and returns one like q.

Shapes: B batch, S sequence, C width, H heads, D = C / H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. `context` is the number of past tokens that generation keeps; training may use any length."""

    vocab: int = 256
    context: int = 256
    layers: int = 4
    heads: int = 2
    width: int = 128

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width: expected a multiple of 2 * heads = {2 * self.heads}, got {self.width}")


class Past(NamedTuple):
    """What generation remembers: tokens seen so far, and each layer's keys and values [B, <= context, H, D]."""

    seen: int
    layers: tuple[tuple[Tensor, Tensor], ...]


def rotate(x: Tensor, start: int = 0, base: float = 10000.0) -> Tensor:
    """x [B, S, H, D] with channel pairs (d, d + D/2) turned by position * base^(-2d/D); positions count from `start`.

    The product of a turned query and a turned key depends on their distance only.
    """
    half = x.shape[-1] // 2
    position = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float32)
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.outer(position, speed)[:, None]                       # [S, 1, D/2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)                                   # each [B, S, H, D/2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention around the given `attend`."""

    def __init__(self, config: GPTConfig, attend: Attend) -> None:
        super().__init__()
        self.heads, self.context, self.attend = config.heads, config.context, attend
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, seen: int, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))            # [B, S, 3, H, D]
        q, k, v = qkv.unbind(2)                                         # each [B, S, H, D]
        q, k = rotate(q, seen), rotate(k, seen)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        y = self.attend(q, k, v).flatten(2)                             # [B, S, C]
        return self.out(y), (k[:, -self.context :], v[:, -self.context :])


class MLP(nn.Module):
    """Two layers, four times the width in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(config.width, bias=False), Attention(config, attend)
        self.norm2, self.mlp = nn.LayerNorm(config.width, bias=False), MLP(config)

    def forward(self, x: Tensor, seen: int, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, past = self.attention(self.norm1(x), seen, past)
        x = x + y
        return x + self.mlp(self.norm2(x)), past


class GPT(nn.Module):
    """Tokens [B, S] (int64) to logits [B, S, V]."""

    def __init__(self, config: GPTConfig, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # GPT-2: the 2 * layers matrices that add to the residual stream start smaller
                shrink = (2 * config.layers) ** -0.5 if name.endswith("out.weight") else 1.0
                nn.init.normal_(weight, std=0.02 * shrink)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read(tokens)[0]

    def read(self, tokens: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Logits [B, S, V] of tokens [B, S] that follow `past`, and the past that includes them."""
        seen = past.seen if past else 0
        x = self.embed(tokens)                                          # [B, S, C]
        layers = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, seen, past.layers[i] if past else None)
            layers.append(kept)
        logits = F.linear(self.norm(x), self.embed.weight)              # [B, S, V]
        return logits, Past(seen + tokens.shape[1], tuple(layers))

    @torch.no_grad()
    def generate(self, prompt: Tensor, n: int, *, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
        """prompt [B, P] followed by n sampled tokens, [B, P + n]. Temperature 0 takes the likeliest token.

        Sampling happens on the CPU, so a CPU `generator` gives the same draw on every device.
        """
        tokens, new, past = prompt, prompt, None
        for _ in range(n):
            logits, past = self.read(new, past)
            choice = _sample(logits[:, -1].float().cpu(), temperature, top_k, generator)
            new = choice.to(prompt.device)                              # [B, 1]
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    def parameter_count(self) -> int:
        """Learned numbers; the matrix that serves both ends counts once."""
        return sum(weight.numel() for weight in self.parameters())

    def training_flops(self, batch: int, seqlen: int) -> int:
        """FLOPs of one forward and backward pass over [batch, seqlen] tokens; a multiply-add is two.

        Each matrix: 6 per weight and token. Causal attention: half of S^2 pairs, two products forward and four
        backward, of 2 * C FLOPs a pair.
        """
        matrices = sum(weight.numel() for weight in self.parameters() if weight.dim() == 2)
        attention = 6 * self.config.layers * self.config.width * seqlen**2
        return batch * (6 * matrices * seqlen + attention)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row of logits [B, V]: [B, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
