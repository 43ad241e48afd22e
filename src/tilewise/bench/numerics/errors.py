"""Truth in fp64, and how far from it results are."""
from __future__ import annotations

import torch
from torch import Tensor

from tilewise.bench.gate import Found
from tilewise.bench.numerics.inputs import Inputs

CHUNK_BYTES = 2**24     # of one fp64 matrix of scores


def truth(x: Inputs, causal: bool) -> Found:
    """out [1, S_q, H, D], lse [1, H, S_q], dq, dk and dv in fp64, by the equations of FlashAttention's appendix B, some rows at
    a time: memory is linear in the lengths."""
    q, k, v, dout = (t.double().transpose(1, 2) for t in x)     # [1, H, S, D]
    rows, cols = q.shape[2], k.shape[2]
    scale, step = q.shape[3] ** -0.5, max(1, CHUNK_BYTES // (8 * cols * q.shape[1]))
    out, dq, lse = torch.empty_like(q), torch.empty_like(q), q.new_empty(q.shape[:3])
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for first in range(0, rows, step):
        own = slice(first, min(first + step, rows))
        s = scale * q[:, :, own] @ k.mT
        if causal:
            i, j = torch.arange(rows, device=q.device)[own, None], torch.arange(cols, device=q.device)
            s = torch.where(j <= i + cols - rows, s, -torch.inf)
        lse[:, :, own] = torch.logsumexp(s, -1)
        p = torch.exp(s - lse[:, :, own, None])
        out[:, :, own] = p @ v
        of_out = dout[:, :, own]
        delta = (of_out * out[:, :, own]).sum(-1, keepdim=True)
        ds = p * (of_out @ v.mT - delta)
        dv += p.mT @ of_out
        dq[:, :, own] = scale * ds @ k
        dk += scale * ds.mT @ q[:, :, own]
    return {"lse": lse} | {name: t.transpose(1, 2) for name, t in (("out", out), ("dq", dq), ("dk", dk), ("dv", dv))}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
