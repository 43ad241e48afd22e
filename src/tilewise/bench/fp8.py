"""Cases of fp8 inputs, and when a result of theirs is right.

truth      `reference` in fp64, of the numbers themselves: stored times scale
standard   what backends are measured against that copy in bf16: `reference` on the same call, by matrices in bf16. Against
           kernels that multiply in fp8 (`rounds_probabilities`): exact probabilities, each relative to its row's largest and
           times 256 rounded to e4m3, as such kernels store them, times exact values

    max|x - truth| <= 2 max|standard - truth| + 4 eps max(1, max|truth|)

with the eps of bf16 for out and of fp32 for lse, whose standard is that of `reference` for all.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tilewise import plan
from tilewise.bench.cases import Call, Case, draw
from tilewise.bench.tolerance import Verdict, verdict
from tilewise.fp8 import FP8, LARGEST, WIDE

SCALES = ("q_scale", "k_scale", "v_scale")


def drawn(case: Case, device: torch.device | str = "cpu", seed: int = 0, per_sequence: bool = True) -> Call:
    """A case's inputs in fp8, stored numbers up to 400, with scales [B, H_kv], or [H_kv]."""
    call = draw(case, WIDE, device, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.kv_heads) if per_sequence else (case.kv_heads,)
    scales = {name: (0.01 + 0.01 * torch.rand(shape, generator=generator)).to(device) for name in SCALES}
    options = call.options | scales | ({"table": call.options["table"].detach()} if "table" in call.options else {})
    q, k, v = (narrowed(x, of_rows(call, side, scale)) for side, x, scale in zip(
        (0, 1, 1), (call.q, call.k, call.v), scales.values(), strict=True))
    return Call(case, q, k, v, options)


def of_rows(call: Call, side: int, scale: Tensor) -> Tensor:
    """A scale for each row and head of queries (side 0) or keys (1), to multiply q, k or v by."""
    case, x = call.case, (call.q, call.k)[side]
    scale = scale.expand(case.batch, case.kv_heads)
    if side == 0:
        scale = scale.repeat_interleave(case.heads // case.kv_heads, 1)
    if case.packed is not None:
        return scale[sequences(call, side)][:, :, None]
    return (scale[:, None] if case.layout == "bshd" else scale[:, :, None])[..., None] if x.dim() == 4 else scale


def sequences(call: Call, side: int) -> Tensor:
    """Of each row of a packed call the sequence whose room it is in; of those behind the last, the last."""
    assert call.case.packed is not None
    rooms = torch.tensor([n[side] for n in call.case.packed])
    of_rows = torch.arange(call.case.batch).repeat_interleave(rooms)
    rest = len((call.q, call.k)[side]) - len(of_rows)
    return torch.cat([of_rows, of_rows.new_full((rest,), call.case.batch - 1)]).to(call.q.device)


def narrowed(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in fp8: a view into a larger buffer of NaN, as `draw` has them, whose rows TMA can read if D is right."""
    room = [n + 1 for n in x.shape[-3:-1]]
    buffer = torch.full((*x.shape[:-3], *room, x.shape[-1] + (16 if x.shape[-1] % 16 == 0 else 1)), torch.nan, device=x.device)
    view = buffer.to(FP8)[..., :x.shape[-3], :x.shape[-2], :x.shape[-1]]
    return view.copy_((x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8))


def exact(call: Call) -> Call:
    """The same in fp64, without scales."""
    scales = [call.options[name].double() for name in SCALES]
    q, k, v = (x.double() * of_rows(call, side, scale) for side, x, scale in zip(
        (0, 1, 1), (call.q, call.k, call.v), scales, strict=True))
    wide = {name: call.options[name].double() for name in ("bias", "sinks", "table") if name in call.options}
    return Call(call.case, q, k, v, {name: x for name, x in call.options.items() if name not in SCALES} | wide)


def check(call: Call, backend: str) -> list[Verdict]:
    """Runs a call on a backend and judges out and lse."""
    truth = run(exact(call), "reference")
    standard = run(call, "reference")
    if rounds_probabilities(call, backend):
        standard = rounded(exact(call), truth[0]), standard[1]
    return [verdict(name, x, t, s, torch.finfo(dtype).eps, 2) for name, x, t, s, dtype in zip(
        ("out", "lse"), run(call, backend), truth, standard, (WIDE, torch.float32), strict=True)]


def rounds_probabilities(call: Call, backend: str) -> bool:
    """Whether probabilities are rounded to fp8."""
    return plan.takes_fp8(call.described()[0], backend)


@torch.no_grad()
def run(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    return call.run(call.differentiable, backend)


def rounded(call: Call, out: Tensor) -> Tensor:
    """Standard attention in fp64 with its probabilities in e4m3, in the shape of its `out`.

    Attention of values that are the rows of a unit matrix gives the probabilities.
    """
    case = call.case
    if case.seqlen_k == 0:
        return torch.zeros_like(out)
    unit = torch.eye(case.seqlen_k, dtype=torch.float64, device=call.q.device)
    values = call.v.nan_to_num(0.0)                     # what is not seen may hold NaN
    if case.packed is None:
        heads_last = case.layout == "bshd"
        unit = unit[None, :, None] if heads_last else unit[None, None]
        p = run(replace(call, v=unit.expand(*call.v.shape[:3], case.seqlen_k)), "reference")[0]
        q, v = (p, values) if heads_last else (p.transpose(1, 2), values.transpose(1, 2))
        found = product(in_e4m3(q), v)
        return found if heads_last else found.transpose(1, 2)
    of_queries, of_keys = sequences(call, 0), sequences(call, 1)
    inside = torch.cat([torch.arange(n[1]) for n in case.packed])
    inside = torch.cat([inside, inside.new_zeros(len(of_keys) - len(inside))]).clamp(max=case.seqlen_k - 1)
    p = run(replace(call, v=unit[inside.to(unit.device)][:, None].expand(-1, case.kv_heads, -1)), "reference")[0]
    found = torch.zeros_like(out)
    for b in range(case.batch):
        rows, v = of_queries == b, values[of_keys == b][:case.seqlen_k]
        found[rows] = product(in_e4m3(p[rows][None])[..., :len(v)], v[None])[0]
    return found


def product(p: Tensor, v: Tensor) -> Tensor:
    """P V of p [B, S_q, H, S_k] and v [B, S_k, H_kv, D_v]."""
    return torch.einsum("bqhk,bkhd->bqhd", p, v.repeat_interleave(p.shape[2] // v.shape[2], 2))


def in_e4m3(p: Tensor) -> Tensor:
    """Probabilities as fp8 kernels store them."""
    if p.shape[-1] == 0:
        return p
    largest = p.amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return (256 * p / largest).float().to(FP8).double() * largest / 256
