"""Is the `hopper` backend right on this GPU, each time it runs?

    python -m tilewise.bench.hopper.correctness [--out FILE] [--seconds 120] [--repeats 200]

Each case, in bf16, fp16 and, without gradients, fp8, is held to the tolerance rule, then repeated with its memory poisoned: a
race shows as another result. The same bits must come each time; only gradients of q that are added in any order may differ by
rounding.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from tilewise.backends import hopper
from tilewise.bench import fp8, record, tolerance
from tilewise.bench.cases import CASES, Call, Case, draw, packed
from tilewise.bench.timing import alive
from tilewise.fp8 import FP8

DTYPES = (torch.bfloat16, torch.float16, FP8)
LONG: dict[str, Any] = dict(batch=1, seqlen_q=200, seqlen_k=330, head_dim=64)       # several tiles and stages
LONGER = (
    Case("long", **LONG),
    Case("long causal", **LONG, options=lambda m: dict(causal=True)),
    Case("long grouped", **LONG, heads=4, kv_heads=1, options=lambda m: dict(causal=True, sinks=m.normal(4))),
    Case("long window", **LONG, options=lambda m: dict(mask=tw.window(100, 30))),
    Case("long wide", **LONG | dict(head_dim=128)),
    Case("long values narrower", **LONG | dict(head_dim=128, head_dim_v=64), options=lambda m: dict(causal=True)),
    Case("long values wider", **LONG | dict(head_dim=40, head_dim_v=128), options=lambda m: dict(causal=True)),
    Case("long latent", **LONG | dict(head_dim=192, head_dim_v=128), options=lambda m: dict(causal=True)),
    Case("long 192", **LONG | dict(head_dim=168, head_dim_v=192), options=lambda m: dict(mask=tw.window(100, 30))),
    Case("long 256", **LONG | dict(head_dim=256), options=lambda m: dict(causal=True)),
    Case("long dropout", **LONG, options=lambda m: dict(causal=True, dropout_p=0.3, rng=tw.Rng(7))),
    Case("long softcap", **LONG, options=lambda m: dict(score_mod=[tw.alibi(m.uniform(2)), tw.softcap(5.0)], causal=True)),
    Case("long blocks", **LONG, options=lambda m: dict(mask=tw.block_mask(m.uniform(2, 4, 6) < 0.4, block_size=64))),
    Case("long prefix or window", **LONG, options=lambda m: dict(mask=tw.prefix(m.values([70])) | tw.window(20, 5))),
    Case("long repeatable", **LONG, kv_heads=1, options=lambda m: dict(causal=True, deterministic=True)),
    Case("long repeatable wide", **LONG | dict(head_dim=128, head_dim_v=64), options=lambda m: dict(
        deterministic=True, mask=tw.window(100, 30))),
    Case("long repeatable softcap", **LONG | dict(head_dim=128), options=lambda m: dict(
        deterministic=True, score_mod=tw.softcap(5.0), mask=tw.block_mask(m.uniform(2, 4, 6) < 0.4, block_size=64))),
    Case("long widest", **LONG | dict(head_dim=256), kv_heads=1, options=lambda m: dict(causal=True)),
    Case("long widest values narrower", **LONG | dict(head_dim=192, head_dim_v=128)),
    Case("long rows without keys", **LONG | dict(seqlen_q=330, seqlen_k=100), options=lambda m: dict(causal=True)),
    packed("packed long causal", ((200, 330), (0, 5), (130, 129)), head_dim=64,
           options=lambda m: dict(causal=True, **m.longest)),
    packed("packed long repeatable", ((200, 330), (0, 5), (130, 129)), head_dim=64, kv_heads=1,
           options=lambda m: dict(causal=True, deterministic=True, **m.longest)),
    packed("packed long repeatable dropout", ((200, 330), (130, 129)), head_dim=128, heads=2, kv_heads=1,
           options=lambda m: dict(dropout_p=0.3, rng=tw.Rng(2, first_sequence=3), deterministic=True, **m.longest)),
    packed("packed long wide", ((200, 330), (0, 5), (130, 129)), head_dim=192, head_dim_v=128,
           options=lambda m: dict(causal=True, **m.longest)),
    packed("packed long used", ((200, 330), (9, 5), (130, 129)), ((190, 300), (0, 0), (130, 129)), head_dim=64,
           options=lambda m: dict(causal=True, sinks=m.normal(2), **m.longest)),
)


def served(device: torch.device) -> list[tuple[Case, torch.dtype]]:
    """The cases that the backend computes, the longer ones first."""
    return [(case, dtype) for case in (*LONGER, *CASES) for dtype in DTYPES
            if "table" not in drawn(case, dtype, device).options and drawn(case, dtype, device).supported("hopper")]


def drawn(case: Case, dtype: torch.dtype, device: torch.device) -> Call:
    return fp8.drawn(case, device) if dtype == FP8 else draw(case, dtype, device)


def results(call: Call) -> dict[str, Tensor]:
    """Out, lse and, unless the inputs are fp8, gradients."""
    if call.q.dtype == FP8:
        return dict(zip(("out", "lse"), fp8.run(call, "hopper"), strict=True))
    return tolerance.run(call, "hopper").tensors


def check(case: Case, dtype: torch.dtype, device: torch.device, repeats: int) -> str:
    """"", or what is wrong with a case."""
    call = drawn(case, dtype, device)
    wrong = [verdict for verdict in (fp8 if dtype == FP8 else tolerance).check(call, "hopper") if not verdict.ok]
    if wrong:
        return "; ".join(map(str, wrong))
    first = results(call)
    for turn in range(repeats):
        poison = [torch.full_like(x, torch.nan) for x in first.values()]
        del poison      # what is allocated next finds it
        if words := differs(first, results(call), call):
            return f"repeat {turn}: {words}"
    return ""


def differs(first: dict[str, Tensor], again: dict[str, Tensor], call: Call) -> str:
    """Where a second run gives something else: other bits, or for a dq of sums in any order more than that explains."""
    any_order = "dq" in first and not hopper.repeatable(call.described()[0])
    for name, x in first.items():
        same = torch.equal(x.nan_to_num(), again[name].nan_to_num())
        if not same and name == "dq" and any_order:
            allowed = 4 * torch.finfo(call.q.dtype).eps * x.nan_to_num().abs().max()
            same = bool(((x - again[name]).nan_to_num().abs() <= allowed).all())
        if not same:
            off = (x.double() - again[name].double()).abs().nan_to_num(torch.inf)
            return f"{name} differs by {off.max().item():.1e} at {off.argmax().item()}"
    return ""


def run(device: torch.device, *, seconds: float, repeats: int, out: Path | None = None,
        progress: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """Cases in turn until the time is over, first each once, then all repeats; written after each."""
    begin = time.monotonic()
    every = served(device)
    result: dict[str, Any] = record.stamp() | {"cases": len(every), "failures": {}, "once": 0, "repeated": 0, "lines": []}
    for key, times in (("once", 1), ("repeated", repeats)):
        for case, dtype in every:
            name = f"{case} {str(dtype)[6:]}"
            if time.monotonic() - begin > seconds or name in result["failures"]:
                continue
            progress(name)
            try:
                words = check(case, dtype, device, times)
            except Exception as error:  # one case's failure must not hide the others
                words = record.words(error)
            result[key] += not words
            if words:
                result["failures"][name] = words
            result["lines"] = lines(result, repeats)
            record.write(out, result)
            if words and device.type == "cuda" and not alive(device):
                raise SystemExit(f"{name}: {words}; the device no longer answers")
    return result


def lines(result: dict[str, Any], repeats: int) -> list[str]:
    counts = f"{result['once']} of {result['cases']} cases right, {result['repeated']} of them {repeats} times"
    return [counts, *(f"{name}: {words}"[:160] for name, words in result["failures"].items())]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.hopper.correctness", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--seconds", type=float, default=120, help="begin no further case after so long")
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args(arguments)
    result = run(torch.device("cuda"), seconds=options.seconds, repeats=options.repeats, out=options.out, progress=print)
    print("\n".join(result["lines"]))
    raise SystemExit(bool(result["failures"]))


if __name__ == "__main__":
    main()
