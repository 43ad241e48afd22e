"""Sequences of unequal length: packed, beside the same padded to the longest, and one after another.

Everyone finds its inputs as it wants them: nothing is packed or padded while the clock runs. A padded peer may use whatever is
right: under a causal mask no query sees the padding behind it, so that is_causal suffices, which is its fastest.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tilewise as tw
from tilewise.bench.contest import BOTH, FORWARD, PASSES, Entrant, Outcome, race
from tilewise.bench.gate import Expected, Found
from tilewise.bench.peers import CUDA_ONLY, function_of
from tilewise.bench.suite import Bars, Trial
from tilewise.bench.tolerance import Verdict
from tilewise.packing import cu_seqlens, pad, unpad

BARS = {(FORWARD, "sdpa padded"): 1.5}
FORWARD_ONLY = "its backward tells no more, and takes long"


@dataclass(frozen=True)
class Setting:
    """Self-attention of sequences whose lengths are log-uniform. seconds: for all contenders and passes together."""
    sequences: int
    causal: bool
    heads: int = 16
    head_dim: int = 64
    shortest: int = 16
    longest: int = 4096
    dtype: str = "bfloat16"
    seconds: float = 3.0

    def lengths(self) -> list[int]:
        share = torch.rand(self.sequences, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return (self.shortest * (self.longest / self.shortest) ** share).long().tolist()

    def __str__(self) -> str:
        return f"{self.sequences} sequences, {'causal' if self.causal else 'full'}"


def settings(device: torch.device, quick: bool = False) -> list[Setting]:
    if quick:
        return [Setting(4, causal, 2, longest=256, dtype="float32", seconds=1.0) for causal in (False, True)]
    if device.type == "cuda":
        return [Setting(32, causal) for causal in (True, False)]
    return [Setting(16, causal, 2, dtype="float32", seconds=20.0) for causal in (False, True)]


def trial(setting: Setting, device: torch.device, *, part: str = "packed", modes: tuple[str, ...] = PASSES,
          only: Sequence[str] | None = None, bars: Bars | None = None) -> Trial:
    """only: those that take part beside ours."""
    lengths = setting.lengths()
    padding = 1 - sum(lengths) / (len(lengths) * max(lengths))
    facts = asdict(setting) | {"batch": setting.sequences, "lengths": lengths, "padding": padding}
    return Trial(part, str(setting), facts, modes, partial(measure, setting, device, modes, only), bars or {})


class Inputs(NamedTuple):
    """q, k and v, which require gradients, and dout."""
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def leaves(tensors: Iterable[Tensor]) -> Inputs:
    q, k, v, dout = tensors
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


class Batch:
    """The same numbers packed [total, H, D] and padded with zeros [B, H, S, D]."""

    def __init__(self, setting: Setting, device: torch.device):
        generator, lengths = torch.Generator(device).manual_seed(0), setting.lengths()
        self.setting, self.longest, self.total, self.device = setting, max(lengths), sum(lengths), device
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.cu_seqlens = cu_seqlens(self.lengths)
        drawn = [torch.randn(self.total, setting.heads, setting.head_dim, generator=generator, device=device,
                             dtype=getattr(torch, setting.dtype)) for _ in range(4)]
        padded = [self.padded(x) for x in drawn]
        self.packed, self.dense = leaves(drawn), leaves(padded)
        self.tokens = torch.arange(self.longest, device=device) < self.lengths[:, None]

    def padded(self, x: Tensor) -> Tensor:
        places = torch.cat([b * self.longest + torch.arange(n) for b, n in enumerate(self.setting.lengths())]).to(self.device)
        return pad(x, places, len(self.lengths), self.longest).transpose(1, 2).contiguous()

    def flat(self, x: Tensor) -> Tensor:
        """Packed [total, H, ...] from either."""
        return x if x.dim() == 3 else unpad(x.transpose(1, 2), self.lengths).packed


class Contender(NamedTuple):
    """attend(q, k, v), of these inputs; or why it is absent. forward_only: why its backward is."""
    name: str
    attend: Callable[..., Tensor] | None
    inputs: Inputs
    reason: str = ""
    forward_only: str = ""

    def forward(self, turn: int) -> Tensor:
        assert self.attend is not None
        return self.attend(*self.inputs.leaves)

    def both(self, turn: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(turn), self.inputs.leaves, self.inputs.dout)

    def found(self, batch: Batch, gradients: bool = True) -> Found:
        """out and gradients, of the last head; as packed tensors [1, total, 1, D]."""
        tensors = [self.forward(0)]
        if gradients:
            tensors += torch.autograd.grad(tensors[0], self.inputs.leaves, self.inputs.dout)
        return {name: batch.flat(x.detach())[None, :, -1:] for name, x in zip(("out", "dq", "dk", "dv"), tensors, strict=False)}

    def entrant(self, batch: Batch, expected: Expected, alone: bool) -> Entrant:
        """alone: the forward pass, which keeps nothing for a backward."""
        def check() -> Sequence[Verdict]:
            return expected.verdicts(self.found(batch, gradients=not alone))

        if self.attend is None:
            return Entrant(self.name, reason=self.reason)
        if alone:
            return Entrant(self.name, {FORWARD: torch.no_grad()(self.forward)}, check)
        return Entrant(self.name, {FORWARD: self.forward} | ({} if self.forward_only else {BOTH: self.both}), check,
                       reason=self.forward_only)


def contenders(batch: Batch) -> list[Contender]:
    """All that may take part, ours first."""
    causal, mask = batch.setting.causal, None if batch.setting.causal else batch.tokens[:, None, None]
    varlen: dict[str, Any] = dict(cu_seqlens_q=batch.cu_seqlens, max_seqlen_q=batch.longest, causal=causal)
    return [
        Contender("tilewise", partial(tw.attention_varlen, **varlen), batch.packed),
        Contender("sdpa padded", partial(sdpa, attn_mask=mask, is_causal=causal), batch.dense),
        Contender("sdpa in a loop", partial(in_a_loop, batch.setting.lengths(), causal), batch.packed),
        nested(batch), flash_attn(batch),
        Contender("tilewise padded", partial(tw.attention, mask=tw.key_lengths(batch.lengths), causal=causal, layout="bhsd"),
                  batch.dense, forward_only=FORWARD_ONLY),
        Contender("standard in a loop", partial(tw.attention_varlen, **varlen, backend="reference"), batch.packed,
                  forward_only=FORWARD_ONLY)]


def in_a_loop(lengths: Sequence[int], causal: bool, *inputs: Tensor) -> Tensor:
    """One call for each sequence."""
    parts = zip(*(x.transpose(0, 1)[None].split(list(lengths), 2) for x in inputs), strict=True)
    return torch.cat([sdpa(q, k, v, is_causal=causal) for q, k, v in parts], 2)[0].transpose(0, 1)


def nested(batch: Batch) -> Contender:
    """torch's jagged tensors, whose kernels for packed sequences run on CUDA."""
    if batch.device.type != "cuda":
        return Contender("sdpa nested", None, batch.packed, CUDA_ONLY)

    def attend(*inputs: Tensor) -> Tensor:
        ends = batch.cu_seqlens.long()
        q, k, v = (torch.nested.nested_tensor_from_jagged(x, ends, min_seqlen=1, max_seqlen=batch.longest).transpose(1, 2)
                   for x in inputs)
        return sdpa(q, k, v, is_causal=batch.setting.causal).transpose(1, 2).values()

    return Contender("sdpa nested", attend, batch.packed)


def flash_attn(batch: Batch) -> Contender:
    function, reason = function_of("flash_attn", "flash_attn_varlen_func", batch.device)
    if function is None:
        return Contender("flash_attn", None, batch.packed, reason)
    return Contender("flash_attn", partial(
        function, cu_seqlens_q=batch.cu_seqlens, cu_seqlens_k=batch.cu_seqlens, max_seqlen_q=batch.longest,
        max_seqlen_k=batch.longest, causal=batch.setting.causal), batch.packed)


def measure(setting: Setting, device: torch.device, modes: Sequence[str] = PASSES,
            only: Sequence[str] | None = None) -> dict[str, Outcome]:
    """All contenders in turns."""
    batch, alone = Batch(setting, device), tuple(modes) == (FORWARD,)
    right = expected(batch, gradients=not alone)
    field = [c.entrant(batch, right, alone) for c in contenders(batch) if only is None or c.name in ("tilewise", *only)]
    return race(field, device, modes, seconds=setting.seconds)


def expected(batch: Batch, gradients: bool = True) -> Expected:
    """The right out and gradients of the last head of all sequences, by standard attention of each sequence."""
    last = [x.detach()[:, -1:] for x in batch.packed]
    attend = partial(tw.attention_varlen, cu_seqlens_q=batch.cu_seqlens, causal=batch.setting.causal, backend="reference")
    truth, standard = (Contender("standard", attend, leaves(x.to(dtype) for x in last)).found(batch, gradients)
                       for dtype in (torch.float64, last[0].dtype))
    q, k, v, _ = (x[None] for x in last)
    return Expected(truth, standard, (q, k, v))
