"""When a result is right: its error against fp64 is measured against that of standard attention in the same precision.

    max|x - truth| <= m * max|standard - truth| + 4 eps max(1, max|truth|)

per tensor, over finite entries, infinities in the same places; m is 2 for out, lse and statistics, 3 for gradients; lse and
statistics have fp32's eps; sums over rows (sinks, broadcast bias, tables) have eps times the square root of the rows summed.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.bench.cases import Call
from tilewise.statistics import Statistics

IN_FP32 = ("lse", *Statistics._fields)


class Results(NamedTuple):
    """out, lse and gradients, or statistics, by name, of one run."""
    tensors: dict[str, Tensor]


class Verdict(NamedTuple):
    name: str
    error: float
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed and not self.note


def run(call: Call, backend: str, dtype: torch.dtype | None = None) -> Results:
    """Forward and backward of a call; `dtype`: on copies of the floating inputs in that dtype."""
    copies = {}
    for name, x in call.differentiable.items():
        copies[name] = (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()
    out, lse = call.run(copies, backend)
    dout, dlse = _gradients_of_outputs(out, lse)
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    found = torch.autograd.grad((out * dout).sum() + (finite * dlse).sum(), list(copies.values()))
    named = {f"d{name}": g for name, g in zip(copies, found, strict=True)}
    return Results({"out": out.detach(), "lse": lse.detach(), **named})


def _gradients_of_outputs(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The same random dout and dlse for every run on a shape."""
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).bfloat16()  # exact in every dtype
    dlse = torch.randn(lse.shape, generator=generator).bfloat16()
    return dout.to(out.device, out.dtype), dlse.to(lse.device, lse.dtype)


def judge(call: Call, results: Results, truth: Results, standard: Results) -> list[Verdict]:
    """A verdict for each tensor of `results`."""
    dtype = call.q.dtype
    rows = max(1, call.q.numel() // max(1, call.q.shape[-1]))
    return [_verdict(name, x, truth.tensors[name], standard.tensors[name], dtype, rows, call)
            for name, x in results.tensors.items()]


def _verdict(name: str, x: Tensor, truth: Tensor, standard: Tensor, dtype: torch.dtype, rows: int, call: Call) -> Verdict:
    eps = torch.finfo(torch.float32 if name in IN_FP32 and dtype != torch.float64 else dtype).eps
    if name in ("dsinks", "dtable") or (name == "dbias" and call.options["bias"].numel() < call.scores):
        eps *= rows ** 0.5
    return verdict(name, x, truth, standard, eps, 2 if name in ("out", *IN_FP32) else 3)


def verdict(name: str, x: Tensor, truth: Tensor, standard: Tensor, eps: float, factor: int) -> Verdict:
    """The rule, for one tensor."""
    if x.shape != truth.shape:
        return Verdict(name, 0.0, 0.0, f"shape {list(x.shape)}, expected {list(truth.shape)}")
    x, standard = x.double(), standard.double()
    finite = truth.isfinite()
    if not torch.equal(x.isfinite(), finite) or not torch.equal(x[~finite], truth[~finite]):
        return Verdict(name, 0.0, 0.0, f"not finite in {int((x.isfinite() != finite).sum())} other places than it should be")
    if not finite.any():
        return Verdict(name, 0.0, 0.0)
    error = (x - truth)[finite].abs().max().item()
    of_standard = (standard - truth)[finite].abs().max().item()
    floor = 4 * eps * max(1.0, truth[finite].abs().max().item())
    return Verdict(name, error, factor * of_standard + floor)


def check(call: Call, backend: str) -> list[Verdict]:
    """Runs a call on a backend and judges out, lse and all gradients."""
    return judge(call, run(call, backend), run(call, "reference", torch.float64), run(call, "reference"))
