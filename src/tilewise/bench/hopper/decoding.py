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
from tilewise.bench import record, table
from tilewise.bench.caches import Setting, World, paged, sdpa
from tilewise.bench.contest import Entrant, Outcome, race
from tilewise.bench.decode import ATTEND, expected, verdicts, yardsticks
from tilewise.bench.gate import Expected
from tilewise.bench.hopper.cached import CASES, draw
from tilewise.bench.hopper.correctness import DTYPES
from tilewise.bench.record import Row
from tilewise.bench.timing import Call, alive
from tilewise.bench.workers import part, run_slices
from tilewise.fp8 import FP8

SECONDS = 0.4                           # for one setting, all contenders together
SETTINGS = tuple(Setting(*of) for of in (       # batch, context, heads, key heads, head dims
    (8, 8192, 32, 8, 128, 128), (1, 16384, 32, 8, 128, 128), (1, 131072, 32, 8, 128, 128), (64, 2048, 32, 8, 128, 128),
    (8, 4096, 32, 32, 128, 128), (8, 16384, 64, 8, 64, 64), (8, 4096, 16, 4, 256, 256), (1, 2048, 32, 8, 128, 128)))
TUNED = SETTINGS[0], SETTINGS[5], SETTINGS[6]


def check(result: dict[str, Any], device: torch.device, until: float, repeats: int, progress: Callable[[str], None]) -> None:
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
    """Attention alone. The copy moves the bytes of a 16-bit cache: times faster than it is our share of its bandwidth."""
    world = World(setting, device)
    stored, rounded = in_fp8(world)
    right, right_fp8 = expected(world, 0), expected(rounded, 0)
    calls: dict[str, tuple[Call, Expected]] = {}
    for backend in ("hopper", "triton"):
        calls[backend] = attend(world, world.cache, None, backend), right
        calls[f"{backend} pages 16"] = attend(world, *paged(world, 16), backend), right
        calls[f"{backend} fp8"] = attend(world, stored, None, backend), right_fp8
    q, (k, v) = world.q.transpose(1, 2), world.contiguous
    k, v = k[:, :, :setting.context], v[:, :, :setting.context]
    calls["sdpa"] = (lambda turn: sdpa(q, k, v).transpose(1, 2)), right
    entrants = [Entrant(name, {ATTEND: call}, partial(verdicts, world, call, of)) for name, (call, of) in calls.items()]
    found = race([*entrants, *yardsticks(setting.nbytes(), device)], device, (ATTEND,), seconds=SECONDS)
    return row_of("speed", setting, found[ATTEND])


def row_of(part: str, setting: Setting, found: Outcome) -> Row:
    return {"part": part, "case": f"{setting}, {part}", "setting": asdict(setting) | {"mode": ATTEND}, **found}


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
    """A row whose contenders are the variants, the table's first."""
    world = World(setting, device)
    right, call = expected(world, 0), attend(world, world.cache, None, "hopper")
    entrants = []
    for config in candidates(setting.head_dim):
        one = in_variant(config, call)
        entrants.append(Entrant(str(tuple(config)), {ATTEND: one}, partial(verdicts, world, one, right)))
    return row_of("variants", setting, race(entrants, device, (ATTEND,), seconds=SECONDS)[ATTEND])


def in_variant(config: Config, call: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    def run(turn: int) -> Tensor:
        with configured(config):
            return call(turn)

    return run


# ---- the command ------------------------------------------------------------------------------------------------------------

def lines(result: dict[str, Any]) -> list[str]:
    """What is right, the speeds, and for each tuned setting the best variant as a row of the table."""
    found = [f"{result['right']} of {len(CASES) * len(DTYPES)} cases right, each {result['repeats'] + 1} times"]
    found += [f"{name}: {words}"[:160] for name, words in result["failures"].items()]
    found += table.lines([row for row in result["rows"] if row["part"] == "speed"])
    for row in result["rows"]:
        seconds = {name: x["seconds"] for name, x in row["contenders"].items() if "seconds" in x}
        if row["part"] == "variants" and seconds:
            best, head_dim = min(seconds, key=lambda name: seconds[name]), str(row["setting"]["head_dim"])
            shipped = seconds.get(next(iter(row["contenders"])))
            found.append("\t".join(["decode", head_dim, head_dim, "plain", *best.strip("()").split(", ")])
                         + ("" if shipped is None else f"   {shipped / seconds[best]:.2f} times the table's speed"))
    return found


def run(device: torch.device, *, seconds: float, repeats: int, out: Path | None = None,
        progress: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """Correctness for at most half of the time, then speed; written as it goes."""
    begin = time.monotonic()
    head = record.new("hopper decoding", device.type, False)
    result: dict[str, Any] = {**head, "right": 0, "repeats": repeats, "failures": {}}
    check(result, device, begin + seconds / 2, repeats, progress)
    for measured, setting in [*((measure, s) for s in SETTINGS), *((tune, s) for s in TUNED)]:
        if time.monotonic() > begin + seconds:
            break
        progress(f"{setting}")
        result["rows"].append(measured(setting, device))
        result["lines"] = lines(result)
        record.write(out, result)
    result["complete"] = len(result["rows"]) == len(SETTINGS) + len(TUNED)
    result["lines"] = lines(result)
    record.write(out, result)
    return result


def warm(device: torch.device, text: str) -> None:
    """Compiles one slice of what is needed, by running it; errors are left to `run`."""
    calls: list[Callable[[], object]] = [partial(draw(case, DTYPES[0], device).run, "hopper") for case in CASES]
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
