"""Sequences of unequal length: packed, beside the same padded to the longest, and one after another.

Everyone finds its inputs as it wants them: nothing is packed or padded while the clock runs. A padded peer may use whatever is
right: under a causal mask no query sees the padding behind it, so that is_causal suffices, which is its fastest.
"""
from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tilewise as tw
from tilewise.bench.serving.contest import Found, Gate, Row, admit, ratio, summaries, why
from tilewise.bench.timing import Call, Timing, compare
from tilewise.packing import cu_seqlens, pad, unpad

MODES = "forward", "both"
PROMISED = 1.5          # times the forward pass of SDPA on the padded batch, on the CPU


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
    promised: float | None = None

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
    return [Setting(16, causal, 2, dtype="float32", seconds=20.0, promised=PROMISED) for causal in (False, True)]


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
    """attend(q, k, v), of these inputs; or why it is absent. modes: the passes that are timed."""
    name: str
    attend: Callable[..., Tensor] | None
    inputs: Inputs
    reason: str = ""
    modes: Sequence[str] = MODES

    def forward(self, turn: int) -> Tensor:
        assert self.attend is not None
        return self.attend(*self.inputs.leaves)

    def both(self, turn: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(turn), self.inputs.leaves, self.inputs.dout)

    def found(self, batch: Batch) -> Found:
        """out and gradients, of the last head; as packed tensors [1, total, 1, D]."""
        out = self.forward(0)
        gradients = torch.autograd.grad(out, self.inputs.leaves, self.inputs.dout)
        return {name: batch.flat(x.detach())[None, :, -1:] for name, x in zip(("out", "dq", "dk", "dv"), (out, *gradients),
                                                                              strict=True)}


def contenders(batch: Batch) -> list[Contender]:
    """All that may take part, ours first."""
    causal, mask = batch.setting.causal, None if batch.setting.causal else batch.tokens[:, None, None]
    varlen: dict[str, Any] = dict(cu_seqlens_q=batch.cu_seqlens, max_seqlen_q=batch.longest, causal=causal)
    return [
        Contender("tilewise", partial(tw.attention_varlen, **varlen), batch.packed),
        Contender("sdpa padded", partial(sdpa, attn_mask=mask, is_causal=causal), batch.dense),
        Contender("sdpa in a loop", partial(in_a_loop, batch.setting.lengths(), causal), batch.packed),
        nested(batch), flash_attn(batch),
        # The backward of these two tells no more, and takes long.
        Contender("tilewise padded", partial(tw.attention, mask=tw.key_lengths(batch.lengths), causal=causal, layout="bhsd"),
                  batch.dense, modes=("forward",)),
        Contender("standard in a loop", partial(tw.attention_varlen, **varlen, backend="reference"), batch.packed,
                  modes=("forward",))]


def in_a_loop(lengths: Sequence[int], causal: bool, *inputs: Tensor) -> Tensor:
    """One call for each sequence."""
    parts = zip(*(x.transpose(0, 1)[None].split(list(lengths), 2) for x in inputs), strict=True)
    return torch.cat([sdpa(q, k, v, is_causal=causal) for q, k, v in parts], 2)[0].transpose(0, 1)


def nested(batch: Batch) -> Contender:
    """torch's jagged tensors, whose kernels for packed sequences run on CUDA."""
    if batch.device.type != "cuda":
        return Contender("sdpa nested", None, batch.packed, "it runs on CUDA only")

    def attend(*inputs: Tensor) -> Tensor:
        ends = batch.cu_seqlens.long()
        q, k, v = (torch.nested.nested_tensor_from_jagged(x, ends, min_seqlen=1, max_seqlen=batch.longest).transpose(1, 2)
                   for x in inputs)
        return sdpa(q, k, v, is_causal=batch.setting.causal).transpose(1, 2).values()

    return Contender("sdpa nested", attend, batch.packed)


def flash_attn(batch: Batch) -> Contender:
    reason = "it runs on CUDA only" if batch.device.type != "cuda" else "it is not installed"
    if batch.device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
        return Contender("flash_attn", None, batch.packed, reason)
    try:
        function = importlib.import_module("flash_attn").flash_attn_varlen_func
    except Exception as error:  # as in tilewise.bench.peers
        return Contender("flash_attn", None, batch.packed, f"{type(error).__name__}: {error}"[:200])
    return Contender("flash_attn", partial(
        function, cu_seqlens_q=batch.cu_seqlens, cu_seqlens_k=batch.cu_seqlens, max_seqlen_q=batch.longest,
        max_seqlen_k=batch.longest, causal=batch.setting.causal), batch.packed)


def measure(setting: Setting, device: torch.device) -> Row:
    """Forward, and forward with backward, of all contenders in turns."""
    batch = Batch(setting, device)
    field, gate = contenders(batch), gate_of(batch)
    rows: dict[str, Row] = {c.name: {"state": "absent", "reason": c.reason} if c.attend is None else
            admit(partial(c.found, batch), gate, device) for c in field}
    calls: dict[tuple[str, str], Call] = {(c.name, mode): getattr(c, mode) for mode in MODES for c in field
                                          if mode in c.modes and rows[c.name]["state"] == "timed"}
    timed = compare(calls, device, seconds=setting.seconds)
    for mode in MODES:
        own = {name: timing for (name, what), timing in timed.items() if what == mode}
        for name, entry in summaries(own, "tilewise").items():
            rows[name][mode] = entry
    return asdict(setting) | {"lengths": setting.lengths(), "padding": 1 - batch.total / (setting.sequences * batch.longest),
                              "contenders": rows} | promise(setting, timed)


def gate_of(batch: Batch) -> Gate:
    """The right out and gradients of the last head of all sequences, by standard attention of each sequence."""
    last = [x.detach()[:, -1:] for x in batch.packed]
    attend = partial(tw.attention_varlen, cu_seqlens_q=batch.cu_seqlens, causal=batch.setting.causal, backend="reference")
    truth, standard = (Contender("standard", attend, leaves(x.to(dtype) for x in last)).found(batch)
                       for dtype in (torch.float64, last[0].dtype))
    q, k, v, _ = (x[None] for x in last)
    return Gate(truth, standard, (q, k, v))


def promise(setting: Setting, timed: dict[tuple[str, str], Timing]) -> Row:
    pair = [timed.get((name, "forward")) for name in ("tilewise", "sdpa padded")]
    if pair[0] is None or pair[1] is None:
        return {}
    return {"than_padded": ratio(pair[0], pair[1]) | {"promised": setting.promised}}


# ---- the table ------------------------------------------------------------------------------------------------------------

def lines(rows: Sequence[Row]) -> list[str]:
    """A line for each contender: seconds, and how many times faster ours is."""
    found = []
    for row in rows:
        found.append(f"packed, {row['sequences']} sequences of {min(row['lengths'])} to {max(row['lengths'])} "
                     f"({row['padding']:.0%} of the padded batch is padding), H {row['heads']} D {row['head_dim']}, "
                     f"{'causal' if row['causal'] else 'full'}")
        found.append(f"  {'':20} {'fwd ms':>9} {'ours is times faster':>22} {'fwd+bwd ms':>12} {'times faster':>20}")
        for name, entry in row["contenders"].items():
            if entry["state"] != "absent":
                found.append(f"  {name:20} " + (cells(entry) if entry["state"] == "timed" else why(entry)))
        if (x := row.get("than_padded")) and x["promised"]:
            found.append(f"  forward {x['median']:.2f} ({x['quartiles'][0]:.2f} to {x['quartiles'][1]:.2f}) times SDPA padded; "
                         f"promised {x['promised']:g}")
    return found


def cells(entry: Row) -> str:
    found = ""
    for mode, widths in zip(MODES, ((9, 22), (12, 20)), strict=True):
        if mode not in entry:
            continue
        x = entry[mode].get("times_faster")
        words = f"{x['median']:.2f} ({x['quartiles'][0]:.2f}-{x['quartiles'][1]:.2f})" if x else ""
        found += f"{1000 * entry[mode]['seconds']:>{widths[0]}.1f} {words:>{widths[1]}} "
    return found.rstrip()
