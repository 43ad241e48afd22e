"""One query and a long cache, beside SDPA on both layouts of the cache and beside a copy of memory, and reading it."""
from __future__ import annotations

import torch

from tilewise.bench.cpu.figures import FASTER, SHARE, Ratio, ratios
from tilewise.bench.cpu.race import CPU
from tilewise.bench.serving import rivals
from tilewise.bench.serving.contest import Row
from tilewise.bench.serving.decode import LLAMA_8B, compete, copying
from tilewise.bench.serving.rivals import Setting, World
from tilewise.bench.timing import Call

TITLE = "decode, attention of one layer"
COPIED = 2**28          # bytes, which are read and written
OF_COPY = 0.7


def settings(quick: bool = False) -> list[Setting]:
    shrink, seconds = (16, 0.2) if quick else (1, 8.0)
    return [Setting(1, context // shrink, *LLAMA_8B, dtype, seconds, faster)
            for context, faster in ((32768, 3.0), (2048, None), (512, None)) for dtype in ("float32", "bfloat16")]


@torch.inference_mode()
def measure(setting: Setting) -> Row:
    world = World(setting, CPU)
    field = [rivals.ours(world, "tilewise", world.cache), rivals.growing(world, "sdpa", rivals.sdpa, *world.lying),
             rivals.growing(world, "sdpa contiguous", rivals.sdpa, *world.contiguous)]
    # Shorter caches may stay in the CPU's own, and are left there.
    copy = copying(COPIED, CPU) | summing(COPIED) if setting.promised else {}
    rows, timed = compete(world, {d.name: d.attend for d in field}, field, copy, appended=0)
    rows |= {name: {"state": "timed", "reason": ""} | timed[name].summary() for name in copy}
    return {"contenders": rows, "figures": ratios(
        [Ratio(FASTER, "SDPA, cache as is", "sdpa", "tilewise", setting.promised),
         Ratio(FASTER, "SDPA, heads first", "sdpa contiguous", "tilewise"),
         Ratio(SHARE, "a copy's bandwidth", "copy", "tilewise", OF_COPY, setting.nbytes() / (2 * COPIED)),
         Ratio(SHARE, "a sum's bandwidth", "sum", "tilewise", factor=setting.nbytes() / COPIED)], timed)}


def summing(size: int) -> dict[str, Call]:
    """A sum of numbers: what can be read in a time."""
    source = torch.zeros(size // 4)
    return {"sum": lambda turn: source.sum()}
