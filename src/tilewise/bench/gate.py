"""Who may be timed: those whose results on the very problem to be timed pass the tolerance rule.

Sequences and heads are independent, so truth is computed for one group of heads of the last sequence only.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise.bench.cases import Call, Case
from tilewise.bench.peers import Attend, ours
from tilewise.bench.tolerance import Results, Verdict, judge


class Gate:
    """Judges implementations on inputs q [B, S, H, D], k and v [B, S, H_kv, D], dout like q."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool):
        self.inputs, self.dout, self.causal = (q, k, v), dout, causal
        self.group = q.shape[2] // k.shape[2]
        q, k, v, dout = self._last((q, k, v, dout))
        self.call = Call(Case("timed"), q, k, v, {"causal": causal})
        standard = ours("reference").attend
        assert standard is not None
        self.truth = _results(standard, (q.double(), k.double(), v.double()), dout.double(), causal)
        self.standard = _results(standard, (q, k, v), dout, causal)

    def verdicts(self, attend: Attend) -> list[Verdict]:
        """Runs `attend` forward and backward on the whole problem; a verdict for out, dq, dk and dv."""
        found = _results(attend, self.inputs, self.dout, self.causal).tensors
        found = dict(zip(found, self._last(tuple(found.values())), strict=True))
        return judge(self.call, Results(found), self.truth, self.standard)

    def _last(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The last sequence's last key head of k- and v-like tensors, and its query heads of q-like ones."""
        heads = self.inputs[0].shape[2]
        return [x[-1:, :, -(self.group if x.shape[2] == heads else 1):].detach() for x in tensors]


def _results(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor, causal: bool) -> Results:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = attend(q, k, v, causal)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    return Results({"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))})
