"""Who may be timed: those whose results on the very problem to be timed pass the tolerance rule."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.api import attention
from tilewise.bench.cases import Call, Case
from tilewise.bench.peers import Attend, ours
from tilewise.bench.tolerance import Results, Verdict, judge
from tilewise.masks import Mask

Found = dict[str, Tensor]


class Expected(NamedTuple):
    """What is right: results in fp64, and those of standard attention in the inputs' dtype. inputs: q, k, v."""
    truth: Found
    standard: Found
    inputs: tuple[Tensor, Tensor, Tensor]
    causal: bool = False

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Expected:
        """Of out alone: standard attention of q [B, S_q, H, D], k [B, S_k, H_kv, D] and v."""
        truth, standard = ({"out": attention(*(x.to(dtype) for x in (q, k, v)), mask=mask, backend="reference")}
                           for dtype in (torch.float64, q.dtype))
        return Expected(truth, standard, (q, k, v))

    def verdicts(self, found: Found) -> list[Verdict]:
        call = Call(Case("timed"), *self.inputs, {"causal": self.causal})
        return judge(call, Results(found), Results(self.truth), Results(self.standard))


def faults(verdicts: Iterable[Verdict]) -> str:
    """What is wrong; nothing, if all is right."""
    return "; ".join(f"{v.name}: {v.note or f'error {v.error:.1e}, allowed {v.allowed:.1e}'}" for v in verdicts if not v.ok)


class Gate:
    """Judges implementations of self-attention on inputs q [B, S, H, D], k and v [B, S, H_kv, D], dout like q.

    Sequences and heads are independent, so truth is computed for one group of heads of the last sequence only.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool):
        self.inputs, self.dout, self.causal = (q, k, v), dout, causal
        self.group = q.shape[2] // k.shape[2]
        q, k, v, dout = self._last((q, k, v, dout))
        standard = ours("reference").attend
        assert standard is not None
        self.expected = Expected(_results(standard, (q.double(), k.double(), v.double()), dout.double(), causal),
                                 _results(standard, (q, k, v), dout, causal), (q, k, v), causal)

    def verdicts(self, attend: Attend, gradients: bool = True) -> list[Verdict]:
        """Runs `attend` on the whole problem; a verdict for out, and with `gradients` for dq, dk and dv."""
        found = _results(attend, self.inputs, self.dout if gradients else None, self.causal)
        return self.expected.verdicts(dict(zip(found, self._last(list(found.values())), strict=True)))

    def _last(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The last sequence's last key head of k- and v-like tensors, and its query heads of q-like ones."""
        heads = self.inputs[0].shape[2]
        return [x[-1:, :, -(self.group if x.shape[2] == heads else 1):].detach() for x in tensors]


def _results(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor | None, causal: bool) -> Found:
    q, k, v = (x.detach().requires_grad_(dout is not None) for x in inputs)
    out = attend(q, k, v, causal)
    if dout is None:
        return {"out": out}
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
