"""One attention problem in plain values, as the command line, other processes and result files name it."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from tilewise.costs import Blocks
from tilewise.problem import Operands, Problem, make

DTYPES = ("float16", "bfloat16", "float32")     # of the Triton kernels


@dataclass(frozen=True)
class Shape:
    """mask: as in `tilewise mask`, "" for none; splits: shares of the keys (Flash-Decoding); kv_heads 0: as heads."""
    seqlen_q: int = 1024
    seqlen_k: int = 0
    batch: int = 1
    heads: int = 1
    kv_heads: int = 0
    head_dim: int = 64
    dtype: str = "float16"
    causal: bool = False
    mask: str = ""
    splits: int = 1

    def described(self, real: bool = False) -> tuple[Problem, Operands]:
        """The problem, of tensors in memory if `real`, otherwise of ones that take the memory of a row.

        Raises ValueError or TypeError naming the argument that is wrong.
        """
        from tilewise.mask_text import read_mask

        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        dtype = getattr(torch, self.dtype)

        def tensor(length: int, heads: int) -> torch.Tensor:
            of_row = torch.zeros(self.head_dim, dtype=dtype).expand(self.batch, length, heads, self.head_dim)
            return of_row.contiguous() if real else of_row

        q = tensor(self.seqlen_q, self.heads)
        k, v = (tensor(self.seqlen_k or self.seqlen_q, self.kv_heads or self.heads) for _ in range(2))
        mask = read_mask(self.mask) if self.mask else None
        return make(q, k, v, causal=self.causal, mask=mask, num_splits=self.splits if self.splits > 1 else None)

    @property
    def setting(self) -> dict[str, Any]:
        """For a result's row: what differs from nothing."""
        named = asdict(self) | {"seqlen_k": self.seqlen_k or self.seqlen_q, "kv_heads": self.kv_heads or self.heads}
        return {name: value for name, value in named.items() if value not in ("", False)}

    def __str__(self) -> str:
        keys = "" if self.seqlen_k in (0, self.seqlen_q) else f" x {self.seqlen_k}"
        heads = f"H {self.heads}" + ("" if self.kv_heads in (0, self.heads) else f"/{self.kv_heads}")
        extras = [word for word, there in (("causal", self.causal), (self.mask, self.mask),
                                           (f"{self.splits} shares", self.splits > 1)) if there]
        return ", ".join([f"N {self.seqlen_q}{keys}", f"d {self.head_dim}", heads, f"B {self.batch}", self.dtype, *extras])


def tiles_of(text: str) -> Blocks:
    """"128,64" -> Blocks(128, 64): queries and keys of a tile, powers of two from 16."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f'tiles: expected "queries,keys", got {text!r}')
    q, k = map(int, parts)
    if any(n < 16 or n & (n - 1) for n in (q, k)):
        raise ValueError(f"tiles: expected powers of two, at least 16, got {text}")
    return Blocks(q, k)
