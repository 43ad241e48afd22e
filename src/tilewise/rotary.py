"""Rotary position embedding (Su et al. 2021, "RoFormer", eq. 34).

Pairs (x_1, x_2) of a head's entries turn by an angle that grows with the position m,

    x_1' = x_1 cos(m θ_i) - x_2 sin(m θ_i),   x_2' = x_1 sin(m θ_i) + x_2 cos(m θ_i),   θ_i = base^(-2 i / rotary_dim)

so that the product of a rotated query and a rotated key depends on the difference of their positions alone.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.trace.memo import readable


@dataclass(frozen=True, eq=False)
class Rotary:
    """Cosines and sines of the angles at every position, for the first rotary_dim entries of a head.

    cos, sin: floating, [max_position, rotary_dim / 2].
    interleaved: False: entry i pairs with i + rotary_dim / 2 (GPT-NeoX, Llama); True: entries 2 i and 2 i + 1 pair (GPT-J).
    """
    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def __post_init__(self):
        for name, x in (("cos", self.cos), ("sin", self.sin)):
            if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name}: expected a floating tensor, got {got}")
            if x.dim() != 2 or 0 in x.shape:
                raise ValueError(f"{name}: expected [max_position, rotary_dim / 2], got {list(x.shape)}")
        for name in ("shape", "dtype", "device"):
            if getattr(self.sin, name) != getattr(self.cos, name):
                raise ValueError(f"sin: expected cos's {name} {getattr(self.cos, name)}, got {getattr(self.sin, name)}")

    @staticmethod
    def of(rotary_dim: int, max_position: int, base: float = 10000.0, interleaved: bool = False, device=None,
           dtype: torch.dtype = torch.float32) -> Rotary:
        """The tables of the paper: angles m θ_i in fp64, their cosines and sines rounded to dtype."""
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim: expected an even number >= 2, got {rotary_dim}")
        if max_position < 1:
            raise ValueError(f"max_position: expected a number of positions >= 1, got {max_position}")
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
        angles = torch.arange(max_position, dtype=torch.float64, device=device)[:, None] * base ** -exponents
        return Rotary(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)

    @property
    def max_position(self) -> int:
        """Positions 0 to max_position - 1 have angles."""
        return self.cos.shape[0]

    @property
    def rotary_dim(self) -> int:
        """How many entries of a head turn."""
        return 2 * self.cos.shape[1]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x with every row turned to its position: a new tensor of x's dtype and memory order. Differentiable in x.

        x: [..., S, D], heads before rows; positions: integers that broadcast to x.shape[:-1]. Computed in fp32, fp64 for fp64.
        Raises IndexError for positions without angles where positions are on the CPU.
        """
        self._check(x, positions)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = (table[positions].to(dtype) for table in (self.cos, self.sin))
        a, b = (part.to(dtype) for part in self._pairs(x))
        turned = x.clone()
        turned_a, turned_b = self._pairs(turned)
        turned_a.copy_(a * cos - b * sin)
        turned_b.copy_(a * sin + b * cos)
        return turned

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """First and second entries of the pairs, views of x."""
        if self.interleaved:
            return x[..., 0:self.rotary_dim:2], x[..., 1:self.rotary_dim:2]
        return x[..., :self.rotary_dim // 2], x[..., self.rotary_dim // 2:self.rotary_dim]

    def _check(self, x: Tensor, positions: Tensor) -> None:
        if not x.dtype.is_floating_point:
            raise TypeError(f"x: expected a floating tensor, got {x.dtype}")
        if x.dim() < 2 or x.shape[-1] < self.rotary_dim:
            raise ValueError(f"x: expected [..., S, D] with D >= rotary_dim {self.rotary_dim}, got {list(x.shape)}")
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"positions: expected int32 or int64, got {positions.dtype}")
        rows = x.shape[:-1]
        if positions.dim() > len(rows) or any(size not in (1, want) for size, want in
                                              zip(positions.shape[::-1], rows[::-1], strict=False)):
            raise ValueError(f"positions: expected a shape that broadcasts to {list(rows)}, got {list(positions.shape)}")
        for name, tensor in (("x", x), ("positions", positions)):
            if tensor.device != self.cos.device:
                raise ValueError(f"{name}: expected the tables' device {self.cos.device}, got {tensor.device}")
        if readable(positions) and positions.numel():
            low, high = (int(p) for p in positions.aminmax())
            if low < 0 or high >= self.max_position:
                raise IndexError(f"positions: expected values from 0 to {self.max_position - 1}, "
                                 f"got values from {low} to {high}")
