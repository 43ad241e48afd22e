"""Decoding: one query for each sequence, over all that its cache holds; one layer.

Attention alone, on a context of fixed length, and whole steps, which append a token first; contexts then grow by one with
every step, everyone's alike. The bandwidth is that of the keys and values, read once. Two yardsticks move as many bytes as
these have: a copy, half of them read and half written, and a sum, which reads them all.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from tilewise.bench.caches import STEPS, Decoder, Setting, World, decoders
from tilewise.bench.contest import Entrant, Outcome, free_bytes, gib, race
from tilewise.bench.gate import Expected
from tilewise.bench.suite import Bars, Trial, Wanted
from tilewise.bench.timing import Call
from tilewise.bench.tolerance import Verdict

ATTEND, STEP = "attend", "step"
LLAMA_8B = 32, 8, 128, 128          # heads, key heads, head dims of k and v
LLAMA_70B = 64, 8, 128, 128
MHA = 32, 32, 128, 128
MLA = 128, 1, 576, 512
COPIED = 2**30          # bytes at most that yardsticks hold: more is not moved any faster
CHECKED = 4             # heads of a group whose results are looked at
BARS = {(ATTEND, "sdpa"): 2.0, (ATTEND, "sdpa contiguous"): 2.0}       # for SDPA with grouped heads, on either layout


def settings(device: torch.device, quick: bool = False) -> list[Setting]:
    """What is measured on a device, most telling first."""
    if device.type == "cuda":
        contexts, batches = ((2048,), (1, 8)) if quick else ((8192, 131072, 32768, 512, 2048), (1, 8, 64))
        return [Setting(batch, context, *layout) for context in contexts for layout in (LLAMA_8B, MLA, LLAMA_70B, MHA)
                for batch in batches]
    if quick:
        return [Setting(1, 1024, *LLAMA_8B, "float32"), Setting(4, 256, 16, 1, 96, 64)]
    return [Setting(1, 32768, *LLAMA_8B, "float32", 12.0),
            *(Setting(1, context, *LLAMA_8B, "float32", 3.0) for context in (512, 2048, 8192)),
            Setting(1, 8192, *LLAMA_8B, "bfloat16", 3.0), Setting(8, 2048, *LLAMA_8B, "float32", 3.0),
            Setting(1, 2048, *MHA, "float32", 3.0), Setting(1, 8192, *LLAMA_70B, "float32", 3.0),
            Setting(1, 4096, *MLA, "float32", 3.0)]


def trials(wanted: Wanted) -> list[Trial]:
    found = settings(wanted.device, wanted.quick)
    return [trial(setting, wanted.device, bars=BARS if setting == found[0] else None) for setting in found]


def trial(setting: Setting, device: torch.device, *, part: str = "decode", only: Sequence[str] | None = None,
          modes: tuple[str, ...] = (ATTEND, STEP), bars: Bars | None = None) -> Trial:
    """only: those that take part beside ours and the yardsticks."""
    facts = asdict(setting) | {"seqlen_q": 1, "seqlen_k": setting.context}
    return Trial(part, str(setting), facts, modes, partial(measure, setting, device, only, modes), bars or {})


@torch.inference_mode()
def measure(setting: Setting, device: torch.device, only: Sequence[str] | None = None,
            modes: Sequence[str] = (ATTEND, STEP)) -> dict[str, Outcome]:
    """Attention alone and whole steps, ours beside the others in turns."""
    size, free = setting.nbytes(setting.context + STEPS), free_bytes(device)
    if 3 * size > free:
        raise MemoryError(f"a cache of {gib(size)} is more than a third of the free {gib(free)}")
    world = World(setting, device)
    field = [d for d in decoders(world) if only is None or d.name in ("tilewise", *only)]
    entrants = {ATTEND: [entrant(world, d, d.attend, ATTEND, 0) for d in field] + yardsticks(setting.nbytes(), device),
                STEP: [entrant(world, d, d.step, STEP, 1) for d in field if d.name != "standard"]}
    found: dict[str, Outcome] = {}
    for mode in modes:
        found |= race(entrants[mode], device, (mode,), seconds=setting.seconds / len(modes), most=STEPS - 8,
                      rates=partial(bandwidth, setting))
    return found


def entrant(world: World, decoder: Decoder, call: Call | None, mode: str, appended: int) -> Entrant:
    if call is None:
        return Entrant(decoder.name, reason=decoder.reason)
    return Entrant(decoder.name, {mode: call}, partial(verdicts, world, call, expected(world, appended)))


def verdicts(world: World, call: Call, right: Expected) -> Sequence[Verdict]:
    """Of one call, for some heads that share a key head and for the first sequence and the last."""
    out = call(0)
    assert isinstance(out, Tensor)
    return right.verdicts({"out": out[[0, -1]][:, :, -checked(world.setting):]})


def expected(world: World, appended: int) -> Expected:
    """The right out, after so many appended tokens."""
    s = world.setting
    k, v = (torch.cat([x[[0, -1], :s.context, -1:], new[[0, -1], :appended, -1:]], 1)
            for x, new in ((world.cache.k, world.k_new), (world.cache.v, world.v_new)))
    return Expected.of(world.q[[0, -1]][:, :, -checked(s):], k, v)


def checked(setting: Setting) -> int:
    return min(CHECKED, setting.heads // setting.kv_heads)


def yardsticks(size: int, device: torch.device) -> list[Entrant]:
    """A copy that moves `size` bytes and a sum that reads them."""
    held = min(size, COPIED)
    source, target = torch.zeros(held // 4, device=device), torch.zeros(held // 8, device=device)
    return [Entrant("copy", {ATTEND: lambda turn: target.copy_(source[:len(target)])}, factor=size / held),
            Entrant("sum", {ATTEND: lambda turn: source.sum()}, factor=size / held)]


def bandwidth(setting: Setting, mode: str, seconds: float) -> dict[str, float]:
    return {"gb_per_s": setting.nbytes() / seconds / 1e9}


def compilations(wanted: Wanted) -> list[Callable[[], object]]:
    """Calls of ours that make the compilers' caches hold what `trials` needs: layouts at a few sizes."""
    def compile_for(batch: int, context: int, layout: tuple) -> None:
        with torch.inference_mode():
            for decoder in decoders(World(Setting(batch, context, *layout), wanted.device))[:3]:
                for call in (decoder.attend, decoder.step):
                    if call is not None:
                        call(0)

    layouts = {(s.heads, s.kv_heads, s.head_dim, s.head_dim_v, s.dtype) for s in settings(wanted.device, wanted.quick)}
    sizes = (1, 512), (1, 32768), (8, 2048)
    return [partial(compile_for, *size, layout) for size in sizes for layout in sorted(layouts)]
