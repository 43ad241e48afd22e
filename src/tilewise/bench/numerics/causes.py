"""Which rounding costs what: attention in fp32 whose results are rounded to the inputs' dtype, and one thing more before."""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tilewise.bench.gate import Found
from tilewise.bench.numerics.inputs import Inputs

SCORES, PROBABILITIES, OUT, GRADIENTS = "scores", "P", "out before delta", "dS"
CAUSES = "results alone", SCORES, PROBABILITIES, OUT, GRADIENTS


def computed(cause: str, x: Inputs) -> Found:
    """out, lse, dq, dk and dv of square attention without a mask. cause: one of CAUSES, what else is rounded.

    delta = rowsum(dout * out) is taken from out (FlashAttention, appendix B.2), which kernels have in the inputs' dtype.
    """
    q, k, v, dout = (t.float().transpose(1, 2) for t in x)
    scale, rounded = q.shape[3] ** -0.5, partial(round_if, cause, x.q.dtype)
    s = rounded(SCORES, scale * q @ k.mT)
    lse = torch.logsumexp(s, -1)
    p = rounded(PROBABILITIES, torch.exp(s - lse[..., None]))
    out = p @ v
    delta = (dout * rounded(OUT, out)).sum(-1, keepdim=True)
    ds = rounded(GRADIENTS, p * (dout @ v.mT - delta))
    found = {"out": out, "dq": scale * ds @ k, "dk": scale * ds.mT @ q, "dv": p.mT @ dout}
    return {"lse": lse} | {name: t.transpose(1, 2).to(x.q.dtype) for name, t in found.items()}


def round_if(cause: str, dtype: torch.dtype, what: str, t: Tensor) -> Tensor:
    return t.to(dtype).float() if cause == what else t
