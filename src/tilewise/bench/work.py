"""One call of attention under functions of the indices, long sequences included: what is timed, and whether it is right.

No one could hold the matrices of 16k queries in fp64: a sample of the queries is checked, with dout 0 elsewhere.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import tilewise as tw
from tilewise.bench.contest import BOTH, FORWARD, Entrant
from tilewise.bench.gate import Expected, Found
from tilewise.bench.tolerance import Verdict
from tilewise.masks import Mask

SAMPLE = 128            # queries that are checked


@dataclass(frozen=True)
class Work:
    """score: the score function for a table, tensors["table"]. attend: who does the work; None: Tilewise."""
    tensors: dict[str, Tensor]          # q, k, v [1, N, H, D], and "table"
    dout: Tensor
    mask: Callable | None = None
    score: Callable[[Tensor | None], Callable] | None = None
    blocks: Mask | None = None          # the mask as ours is given it when timed
    attend: Callable[..., Tensor] | None = None     # of the tensors by name

    @property
    def learned(self) -> list[str]:
        return [name for name, x in self.tensors.items() if x.requires_grad]

    def forward(self, turn: int = 0) -> Tensor:
        """The call that is timed."""
        if self.attend is not None:
            return self.attend(**self.tensors)
        mask = self.mask if self.blocks is None else self.blocks
        score = None if self.score is None else self.score(self.tensors.get("table"))
        return tw.attention(*(self.tensors[name] for name in "qkv"), mask=mask, score_mod=score)

    def both(self, turn: int = 0) -> tuple[Tensor, ...]:
        """The call that is timed, with its gradients."""
        return torch.autograd.grad(self.forward(), [self.tensors[name] for name in self.learned], self.dout)

    def entrant(self, name: str, modes: Sequence[str] = (FORWARD, BOTH), reason: str = "") -> Entrant:
        """modes: FORWARD, BOTH or both of these; the forward pass alone keeps nothing. reason: why there are no more."""
        alone = tuple(modes) == (FORWARD,)
        calls = {FORWARD: torch.no_grad()(self.forward) if alone else self.forward, BOTH: self.both}
        return Entrant(name, {mode: calls[mode] for mode in modes}, lambda: self.verdicts(not alone), "refused", reason)

    def verdicts(self, gradients: bool = True) -> list[Verdict]:
        """On a sample of the queries."""
        q, k, v = (self.tensors[name] for name in "qkv")
        rows = sample(q)
        truth, standard = (self.standard(rows, dtype, gradients) for dtype in (torch.float64, q.dtype))
        right = Expected(truth, standard, (q[:, rows], k, v))
        return right.verdicts(self.sampled(rows, gradients))

    def standard(self, rows: Tensor, dtype: torch.dtype, gradients: bool = True) -> Found:
        """Some queries' out and gradients by standard attention in a dtype."""
        x = {name: (t[:, rows] if name == "q" else t).detach().to(dtype) for name, t in self.tensors.items()}
        for name in self.learned:
            x[name].requires_grad_(gradients)
        score = None if self.score is None else moved(self.score(x.get("table")), rows)
        mask = None if self.mask is None else moved(self.mask, rows)
        out = tw.attention(x["q"], x["k"], x["v"], mask=mask, score_mod=score, backend="reference")
        if not gradients:
            return {"out": out}
        return self._named(out, torch.autograd.grad(out, [x[name] for name in self.learned], self.dout[:, rows].to(dtype)))

    def sampled(self, rows: Tensor, gradients: bool = True) -> Found:
        """The same of the call that is timed: all queries, dout 0 but for the chosen ones."""
        if not gradients:
            with torch.no_grad():
                return {"out": self.forward()[:, rows]}
        out = self.forward()
        dout = torch.zeros_like(self.dout).index_copy_(1, rows, self.dout[:, rows])
        found = self._named(out[:, rows], torch.autograd.grad(out, [self.tensors[name] for name in self.learned], dout))
        return found | {"dq": found["dq"][:, rows]}

    def _named(self, out: Tensor, gradients: Sequence[Tensor]) -> Found:
        return {"out": out.detach()} | {f"d{name}": g for name, g in zip(self.learned, gradients, strict=True)}


def moved(function: Callable, rows: Tensor) -> Callable:
    """A mask or score function for queries that were picked out."""
    def at(*arguments):
        *first, q, k = arguments
        return function(*first, rows[q], k)
    return at


def draw(length: int, heads: int, head_dim: int, device: torch.device,
         dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """q, k and v, which require gradients, and dout."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (torch.randn((1, length, heads, head_dim), generator=generator, device=device, dtype=dtype)
                     for _ in range(4))
    return {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}, dout


def sample(q: Tensor) -> Tensor:
    """Which of the queries are checked, ascending."""
    return torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(1))[:SAMPLE].sort().values.to(q.device)
