"""Dropout by counter: the definition, in torch, of which probabilities are dropped.

Philox4x32-10 (Salmon et al. 2011) turns a key and a counter into 128 random bits, with no state between calls: any
backend, with any tile size, draws the same mask, and a backward pass draws it again instead of reading it back.

    key      the seed's low and high 32 bits
    counter  (column group, row, sequence * H_q + head, offset mod 2^32)

One call gives 16 bits to each of the 8 columns of a group: column c belongs to group 4 (c // 32) + (c % 8) // 2 and takes
the 16 bits number 2 ((c % 32) // 8) + c % 2 (two per word, low half first). That order is the one in which the tensor cores'
result registers hold a row, so a kernel draws the bits where it needs them. An element is kept iff its bits are at least
t = round(p * 65536), and kept elements are multiplied by 65536 / (65536 - t).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Rng:
    """Where dropout's random bits come from: the same Rng gives the same mask on every backend and tile size.

    seed: 64 bits; offset: counted mod 2^32, for a further mask from one seed; first_sequence: the number of the batch's
    first sequence, so that parts of a batch draw what the whole would.
    """
    seed: int
    offset: int = 0
    first_sequence: int = 0

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Rng: {name}: expected an integer, got {value!r}")

    def tensor(self, device: torch.device) -> Tensor:
        """[seed, offset, first_sequence] as kernels read it: int64 [3]."""
        seed = self.seed & 0xFFFFFFFFFFFFFFFF
        values = seed - (seed >> 63 << 64), self.offset & LOW, self.first_sequence
        return torch.stack([torch.full((), x, dtype=torch.int64, device=device) for x in values])  # waits for no copy


def draw(device: torch.device) -> Tensor:
    """A fresh rng tensor from the device's default generator: int64 [3]. Safe under CUDA graph capture."""
    seed_and_offset = torch.randint(-2**63, 2**63 - 1, (2,), dtype=torch.int64, device=device)
    return torch.nn.functional.pad(seed_and_offset, (0, 1))


def threshold(p: float) -> int:
    """t of the module's text. Raises if p cannot be told from 0 or 1 in 16 bits."""
    t = round(p * 65536)
    if (p > 0 and t == 0) or (p < 1 and t == 65536):
        raise ValueError(f"dropout_p: expected 0 or a probability between 2**-17 and 1 - 2**-17, got {p!r}")
    return t


def rescale(t: int) -> float:
    """What a kept probability is multiplied by."""
    return 65536 / (65536 - t)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits. All values are int64 holding 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # mod 2^64, all that 32 x 32 bits need
        high0, high1 = product0 >> 32 & LOW, product1 >> 32 & LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & LOW, high0 ^ c3 ^ k1, product0 & LOW
        k0, k1 = k0 + WEYL[0] & LOW, k1 + WEYL[1] & LOW
    return c0, c1, c2, c3


def keep(rng: Tensor, t: int, sequence: Tensor, head: Tensor, heads: int, row: Tensor, column: Tensor) -> Tensor:
    """True where an element is kept.

    rng: int64 [3]; sequence, head, row, column: integer tensors that broadcast to the block's shape; heads: H_q.
    """
    seed, offset, first = rng.unbind()
    row, column = row.long(), column.long()
    group = (column // 32) * 4 + column % 8 // 2
    stream = (sequence + first) * heads + head
    words = philox(tuple(torch.broadcast_tensors(group & LOW, row & LOW, stream & LOW, offset & LOW)),
                   (seed & LOW, seed >> 32 & LOW))
    pair = column % 32 // 8
    bits = torch.stack(words, -1).gather(-1, pair.expand(words[0].shape)[..., None])[..., 0]
    return (bits >> 16 * (column % 2) & 0xFFFF) >= t
