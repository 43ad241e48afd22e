"""Decoding: one query for each sequence, over all that its cache holds; one layer.

Attention alone, on a context of fixed length, and whole steps, which append a token first; contexts then grow by one with
every step, everyone's alike. The bandwidth is that of the keys and values, read once; beside it that of a copy.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

import tilewise as tw
from tilewise.bench.serving.contest import CHECKED, Found, Gate, Row, admit, free_bytes, gib, ratio, summaries
from tilewise.bench.serving.rivals import STEPS, Decoder, Setting, World, decoders
from tilewise.bench.timing import Call, Timing, compare
from tilewise.bench.workers import part

LLAMA_8B = 32, 8, 128, 128          # heads, key heads, head dims of k and v
LLAMA_70B = 64, 8, 128, 128
MHA = 32, 32, 128, 128
MLA = 128, 1, 576, 512
COPIED = 2**30          # bytes at most: more is not copied any faster
PROMISED = 2.0          # times SDPA with grouped heads, the faster of its two layouts


def settings(device: torch.device, quick: bool = False) -> list[Setting]:
    """What is measured on a device, most telling first."""
    if device.type == "cuda":
        contexts, batches = ((2048,), (1, 8)) if quick else ((8192, 131072, 32768, 512, 2048), (1, 8, 64))
        return [Setting(batch, context, *layout) for context in contexts for layout in (LLAMA_8B, MLA, LLAMA_70B, MHA)
                for batch in batches]
    if quick:
        return [Setting(1, 1024, *LLAMA_8B, "float32"), Setting(4, 256, 16, 1, 96, 64)]
    return [Setting(1, 32768, *LLAMA_8B, "float32", 12.0, PROMISED),
            *(Setting(1, context, *LLAMA_8B, "float32", 3.0) for context in (512, 2048, 8192)),
            Setting(1, 8192, *LLAMA_8B, "bfloat16", 3.0), Setting(8, 2048, *LLAMA_8B, "float32", 3.0),
            Setting(1, 2048, *MHA, "float32", 3.0), Setting(1, 8192, *LLAMA_70B, "float32", 3.0),
            Setting(1, 4096, *MLA, "float32", 3.0)]


@torch.inference_mode()
def measure(setting: Setting, device: torch.device) -> Row:
    """Attention alone and whole steps, ours beside the others in turns."""
    row: Row = asdict(setting) | {"state": "timed", "reason": "", "bytes": setting.nbytes(), "device": device.type}
    size, free = setting.nbytes(setting.context + STEPS), free_bytes(device)
    if 3 * size > free:
        return row | {"state": "skipped", "reason": f"a cache of {gib(size)} is more than a third of the free {gib(free)}"}
    world = World(setting, device)
    field = decoders(world)
    copy = copying(min(setting.nbytes(), COPIED), device)
    row["attention"], timed = compete(world, {d.name: d.attend for d in field}, field, copy, appended=0)
    row["step"], _ = compete(world, {d.name: d.step for d in field if d.name != "standard"}, field, {}, appended=1)
    return row | bandwidth(setting, timed) | promise(setting, timed)


def compete(world: World, calls: dict[str, Call | None], field: Sequence[Decoder], copy: dict[str, Call],
            appended: int) -> tuple[dict[str, Row], dict[str, Timing]]:
    """The state of each, times of those that are right, and a copy's; and all times."""
    gate, reasons = gate_of(world, appended), {d.name: d.reason for d in field}
    rows = {name: {"state": "absent", "reason": reasons[name]} if call is None else
            admit(partial(sampled, world, call), gate, world.device)
            for name, call in calls.items()}
    admitted = {name: call for name, call in calls.items() if call is not None and rows[name]["state"] == "timed"}
    timed = compare(admitted | copy, world.device, seconds=world.setting.seconds / (1 + appended), most=STEPS - 8)
    for name, entry in summaries(timed, "tilewise").items():
        if name in rows:
            rows[name] |= entry
    return rows, timed


def gate_of(world: World, appended: int) -> Gate:
    """The right out, for some heads that share a key head and for the first sequence and the last."""
    s = world.setting
    k, v = (torch.cat([x[[0, -1], :s.context, -1:], new[[0, -1], :appended, -1:]], 1)
            for x, new in ((world.cache.k, world.k_new), (world.cache.v, world.v_new)))
    inputs = world.q[[0, -1]][:, :, -checked(s):], k, v
    truth, standard = ({"out": tw.attention(*(x.to(dtype) for x in inputs), backend="reference")}
                       for dtype in (torch.float64, s.kind))
    return Gate(truth, standard, inputs)


def sampled(world: World, call: Call) -> Found:
    """What the gate looks at, of the first call."""
    out = call(0)
    assert isinstance(out, Tensor)
    return {"out": out[[0, -1]][:, :, -checked(world.setting):]}


def checked(setting: Setting) -> int:
    return min(CHECKED, setting.heads // setting.kv_heads)


def copying(size: int, device: torch.device) -> dict[str, Call]:
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    return {"copy": lambda turn: target.copy_(source)}


def bandwidth(setting: Setting, timed: dict[str, Timing]) -> Row:
    """Bytes a second of a copy, read and written, and of our attention, of the cache; tokens a second of this one layer."""
    if "tilewise" not in timed:
        return {}
    copied = 2 * min(setting.nbytes(), COPIED) / timed["copy"].median
    read = setting.nbytes() / timed["tilewise"].median
    return {"copy_bandwidth": copied, "bandwidth": read, "of_copy": read / copied,
            "tokens_per_second": setting.batch / timed["tilewise"].median}


def promise(setting: Setting, timed: dict[str, Timing]) -> Row:
    """How many times faster than SDPA with grouped heads, on the layout of the cache that serves it better."""
    layouts = [name for name in ("sdpa", "sdpa contiguous") if name in timed]
    if "tilewise" not in timed or not layouts:
        return {}
    better = min(layouts, key=lambda name: timed[name].median)
    return {"than_sdpa": ratio(timed["tilewise"], timed[better]) | {"layout": better, "promised": setting.promised}}


def warm(which: Sequence[Setting], device: torch.device, text: str) -> None:
    """Compiles what one slice of settings needs, ours only, by running it; errors are left to `measure`."""
    layouts = {(s.heads, s.kv_heads, s.head_dim, s.head_dim_v, s.dtype) for s in which}
    sizes = (1, 512), (1, 32768), (8, 2048)
    for batch, context, layout in part([(*size, layout) for size in sizes for layout in sorted(layouts)], text):
        try:
            world = World(Setting(batch, context, *layout), device)
            for decoder in decoders(world)[:3]:
                for call in (decoder.attend, decoder.step):
                    if call is not None:
                        call(0)
        except Exception as error:  # measure() will meet it again and report it
            print(f"{batch} {context} {layout}: {error}")


# ---- the table ------------------------------------------------------------------------------------------------------------

PEERS = {"pages 16": "pages16", "pages 256": "pages256", "sdpa": "sdpa", "sdpa contiguous": "contig", "sdpa folded": "folded",
         "standard": "standard", "flash_attn": "flash"}


def lines(rows: Sequence[Row]) -> list[str]:
    """A line for each setting, the promised one's ratio with quartiles, and why there are gaps."""
    done = [row for row in rows if row["state"] == "timed"]
    shown = {name: short for name, short in PEERS.items() if any(row["attention"][name]["state"] != "absent" for row in done)}
    host = any(row["device"] == "cuda" for row in done)
    found = ["decode, one layer: ms of attention, of a step with append; tokens/s; GB/s of cache read, as a share of a copy's;",
             f"then how many times faster than   {'attend':>8} {'step':>8} {'host ' if host else ''}{'tok/s':>8} "
             f"{'GB/s':>6} {'copy':>5} " + " ".join(f"{short:>8}" for short in shown.values())]
    for row in rows:
        title = (f"B{row['batch']:<3} {length(row['context']):>4} {row['heads']}/{row['kv_heads']}/{row['head_dim']} "
                 f"{row['dtype'].replace('bfloat', 'bf').replace('float', 'fp')}")
        found.append(f"  {title:24} " + (cells(row, list(shown), host) if row["state"] == "timed" else row["reason"]))
    return found + promises(done) + remarks(done)


def length(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def cells(row: Row, peers: Sequence[str], host: bool) -> str:
    mine, step = row["attention"]["tilewise"], row["step"]["tilewise"]
    if mine["state"] != "timed":
        return f"{mine['state']}: {mine['reason']}"[:96]
    found = [f"{1000 * x['seconds']:>8.3f}" if "seconds" in x else f"{x['state']:>8}" for x in (mine, step)]
    found += [f"{1000 * mine['host_seconds']:>4.2f}"] if host else []
    found += [f"{row['tokens_per_second']:>8.4g}", f"{row['bandwidth'] / 1e9:>6.4g}", f"{row['of_copy']:>5.2f}"]
    ratios = [row["attention"][name].get("times_faster") for name in peers]
    return " ".join(found + [f"{x['median']:>8.2f}" if x else f"{'-':>8}" for x in ratios])


def promises(rows: Sequence[Row]) -> list[str]:
    return [f"  B{row['batch']} {length(row['context'])}: {x['median']:.2f} times faster ({x['quartiles'][0]:.2f} to "
            f"{x['quartiles'][1]:.2f}) than SDPA with grouped heads, on its better layout ({x['layout']}); "
            f"promised {x['promised']:g}"
            for row in rows if (x := row.get("than_sdpa")) and x["promised"]]


def remarks(rows: Sequence[Row]) -> list[str]:
    """Why there is no number, one line for each contender and reason."""
    reasons: dict[tuple[str, str, str], int] = {}
    for row in rows:
        for what in ("attention", "step"):
            for name, entry in row[what].items():
                if entry["state"] != "timed" and (what == "attention" or row["attention"][name]["state"] == "timed"):
                    key = f"{name}, {what}", entry["state"], entry["reason"]
                    reasons[key] = reasons.get(key, 0) + 1
    return [f"  {name}: {state}{f' {times} times' if times > 1 else ''}: {reason}"[:126]
            for (name, state, reason), times in reasons.items()]
