"""Decoding on the `hopper` backend: is it right on this GPU, each time it runs, and how near to the speed of memory?

    python -m tilewise.bench.hopper.decoding [--out FILE] [--seconds 120] [--repeats 20] [--jobs N]

Each case is held to the tolerance rule, then repeated with its memory poisoned: it must give the same bits. Then one query for
each sequence, with caches of 64 MB and more: the bandwidth is that of keys and values, read once, beside that of a copy.
"""
from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from tilewise.backends.hopper import configs, decoding
from tilewise.backends.hopper.configs import Config
from tilewise.bench import record
from tilewise.bench.hopper.cached import CASES, draw
from tilewise.bench.hopper.correctness import DTYPES
from tilewise.bench.serving.contest import Gate, Row, admit
from tilewise.bench.serving.decode import COPIED, copying, gate_of, sampled
from tilewise.bench.serving.rivals import Setting, World, paged, sdpa
from tilewise.bench.timing import Timing, alive, compare
from tilewise.bench.workers import part, run_slices
from tilewise.kv_cache import FP8

SECONDS = 0.4                           # for one setting, all contenders together
SETTINGS = tuple(Setting(*of) for of in (       # batch, context, heads, key heads, head dims
    (8, 8192, 32, 8, 128, 128), (1, 16384, 32, 8, 128, 128), (1, 131072, 32, 8, 128, 128), (64, 2048, 32, 8, 128, 128),
    (8, 4096, 32, 32, 128, 128), (8, 16384, 64, 8, 64, 64), (8, 4096, 16, 4, 256, 256), (1, 2048, 32, 8, 128, 128)))
TUNED = SETTINGS[0], SETTINGS[5], SETTINGS[6]


def check(result: Row, device: torch.device, until: float, repeats: int, progress: Callable[[str], None]) -> None:
    """All cases, into result["failures"], until the time is over."""
    for dtype in DTYPES:
        for case in CASES:
            name = f"{case} {str(dtype)[6:]}"
            if time.monotonic() > until:
                return
            progress(name)
            try:
                words = faults(draw(case, dtype, device), repeats)
            except Exception as error:  # one case's failure must not hide the others
                words = record.words(error)
            result["right"] += not words
            if words:
                result["failures"][name] = words
            if words and device.type == "cuda" and not alive(device):
                raise SystemExit(f"{name}: {words}; the device no longer answers")


def faults(call: Any, repeats: int) -> str:
    """"", or what is wrong with a call, the first time or a later one."""
    words = call.faults("hopper")
    if words:
        return words
    first = call.run("hopper")
    for turn in range(repeats):
        poison = [torch.full_like(x, torch.nan) for x in first.values()]
        del poison      # what is allocated next finds it
        for name, x in call.run("hopper").items():
            if not torch.equal(x, first[name]):
                return f"repeat {turn}: {name} has other bits"
    return ""


@torch.inference_mode()
def measure(setting: Setting, device: torch.device) -> Row:
    """Seconds of each that is right, and its bandwidth as a share of a copy's."""
    world = World(setting, device)
    stored, rounded = in_fp8(world)
    gate, gate_fp8 = gate_of(world, 0), gate_of(rounded, 0)
    calls: dict[str, tuple[Callable[[int], Tensor], Gate]] = {}
    for backend in ("hopper", "triton"):
        calls[backend] = attend(world, world.cache, None, backend), gate
        calls[f"{backend} pages 16"] = attend(world, *paged(world, 16), backend), gate
        calls[f"{backend} fp8"] = attend(world, stored, None, backend), gate_fp8
    q, (k, v) = world.q.transpose(1, 2), world.contiguous
    k, v = k[:, :, :setting.context], v[:, :, :setting.context]
    calls["sdpa"] = (lambda turn: sdpa(q, k, v).transpose(1, 2)), gate
    states = {name: admit(partial(sampled, world, call), of, device) for name, (call, of) in calls.items()}
    right = {name: call for name, (call, _) in calls.items() if states[name]["state"] == "timed"}
    timed = compare({**right, **copying(min(setting.nbytes(), COPIED), device)}, device, seconds=SECONDS)
    copied = 2 * min(setting.nbytes(), COPIED) / timed["copy"].median
    return asdict(setting) | {"title": str(setting), "states": states, "copy_bandwidth": copied, "of_copy": {
        name: share(name, setting, timed[name], copied) for name in right}, "seconds": {
        name: timing.median for name, timing in timed.items()}}


def share(name: str, setting: Setting, timing: Timing, copied: float) -> float:
    """Of a copy's bandwidth."""
    return setting.nbytes() / (2 if "fp8" in name else 1) / timing.median / copied


def attend(world: World, cache: Any, sequences: list[int] | None, backend: str) -> Callable[[int], Tensor]:
    return lambda turn: tw.attention_with_kv_cache(world.q, cache, cache_batch_idx=sequences, backend=backend)


def in_fp8(world: World) -> tuple[tw.KVCache, World]:
    """The cache in fp8; and the world as it is then, in the queries' dtype."""
    k, v = world.cache.k.to(FP8), world.cache.v.to(FP8)
    rounded = object.__new__(World)
    rounded.__dict__.update(world.__dict__)
    rounded.cache = tw.KVCache.wrap(k.to(world.setting.kind), v.to(world.setting.kind), world.cache.lengths)
    return tw.KVCache.wrap(k, v, world.cache.lengths), rounded


# ---- which variant ----------------------------------------------------------------------------------------------------------

def candidates(head_dim: int) -> list[Config]:
    """The table's variant, then others: tiles of 32 to 128 keys, rings for one program on a multiprocessor and for two."""
    shipped = configs.table()["decode", head_dim, head_dim, "plain"]
    tile, queries = 4 * head_dim, 2 * 64 * head_dim         # bytes of a key and its value; of Q
    others = []
    for keys in (32, 64, 128):
        for programs in (2, 1):
            stages = (decoding.SHARED // programs - decoding.RESERVED - 512 - queries) // (tile * keys)
            if stages >= 2:
                others.append(shipped._replace(BLOCK_N=keys, STAGES=min(stages, 8)))
    return [shipped, *(config for config in dict.fromkeys(others) if config != shipped)]


@contextlib.contextmanager
def configured(config: Config) -> Iterator[None]:
    """Launches take this variant."""
    table = decoding.chosen
    decoding.chosen = lambda problem: config
    try:
        yield
    finally:
        decoding.chosen = table


@torch.inference_mode()
def tune(setting: Setting, device: torch.device) -> Row:
    """Seconds of each variant that is right."""
    world = World(setting, device)
    gate = gate_of(world, 0)
    call = attend(world, world.cache, None, "hopper")
    found: dict[str, Callable[[int], Tensor]] = {}
    failed = {}
    for config in candidates(setting.head_dim):
        one = in_variant(config, call)
        state = admit(partial(sampled, world, one), gate, device)
        if state["state"] == "timed":
            found[str(tuple(config))] = one
        else:
            failed[str(tuple(config))] = state["reason"]
    timed = compare(found, device, seconds=SECONDS) if found else {}
    return {"title": str(setting), "head_dim": setting.head_dim, "failed": failed,
            "seconds": {name: timing.median for name, timing in timed.items()}}


def in_variant(config: Config, call: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    def run(turn: int) -> Tensor:
        with configured(config):
            return call(turn)

    return run


# ---- the command ------------------------------------------------------------------------------------------------------------

def lines(result: Row) -> list[str]:
    found = [f"{result['right']} of {len(CASES) * len(DTYPES)} cases right, each {result['repeats'] + 1} times"]
    found += [f"{name}: {words}"[:160] for name, words in result["failures"].items()]
    for row in result["rows"]:
        shares = ", ".join(f"{name} {of:.2f}" for name, of in row["of_copy"].items())
        found.append(f"{row['title']}: of a copy's {row['copy_bandwidth'] / 1e12:.2f} TB/s {shares}")
        found += [f"  {name}: {state['state']}: {state['reason']}"[:126] for name, state in row["states"].items()
                  if state["state"] != "timed"]
    for row in result["tuned"]:
        if row["seconds"]:
            best = min(row["seconds"], key=lambda name: row["seconds"][name])
            shipped = row["seconds"].get(str(tuple(configs.table()["decode", row["head_dim"], row["head_dim"], "plain"])))
            found.append("\t".join(["decode", *[str(row["head_dim"])] * 2, "plain", *best.strip("()").split(", ")])
                         + ("" if shipped is None else f"   {shipped / row['seconds'][best]:.2f} times the table's speed"))
    return found


def run(device: torch.device, *, seconds: float, repeats: int, out: Path | None = None,
        progress: Callable[[str], None] = lambda words: None) -> Row:
    """Correctness for at most half of the time, then speed; written as it goes."""
    begin = time.monotonic()
    result: Row = record.stamp() | {"right": 0, "repeats": repeats, "failures": {}, "rows": [], "tuned": [], "lines": []}
    check(result, device, begin + seconds / 2, repeats, progress)
    for key, measured, settings in (("rows", measure, SETTINGS), ("tuned", tune, TUNED)):
        for setting in settings:
            if time.monotonic() > begin + seconds:
                break
            progress(f"{setting}")
            result[key].append(measured(setting, device))
            result["lines"] = lines(result)
            record.write(out, result)
    result["lines"] = lines(result)
    record.write(out, result)
    return result


def warm(device: torch.device, text: str) -> None:
    """Compiles one slice of what is needed, by running it; errors are left to `run`."""
    calls = [partial(draw(case, DTYPES[0], device).run, "hopper") for case in CASES]
    calls += [partial(measure, setting, device) for setting in SETTINGS] + [partial(tune, setting, device) for setting in TUNED]
    for call in part(calls, text):
        try:
            call()
        except Exception as error:
            print(error)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.hopper.decoding", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing further after so long")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile ahead (default none)")
    parser.add_argument("--slice", help=argparse.SUPPRESS)
    options, begin = parser.parse_args(arguments), time.monotonic()
    if options.slice:
        warm(torch.device("cuda"), options.slice)
        return
    if options.jobs:
        run_slices("tilewise.bench.hopper.decoding", [], options.jobs, options.seconds / 2)
    left = options.seconds - (time.monotonic() - begin)
    result = run(torch.device("cuda"), seconds=left, repeats=options.repeats, out=options.out, progress=print)
    print("\n".join(result["lines"]))
    raise SystemExit(bool(result["failures"]))


if __name__ == "__main__":
    main()
