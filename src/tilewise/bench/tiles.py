"""Finding which tiles a mask function shows, beside FlexAttention's create_block_mask: time, memory, and what is wrong."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from tilewise.bench.contest import Outcome, gib, outcome
from tilewise.bench.record import Entry
from tilewise.bench.resident import GIVE_BACK, restart_peak, status_bytes
from tilewise.bench.timing import Timing
from tilewise.bench.work import SAMPLE
from tilewise.bench.workers import apart
from tilewise.trace.bounds import EMPTY, FULL, PARTIAL

CLASSIFY = "classify"
FLEX_BYTES = 10                         # of create_block_mask, for each score: measured
MOST_BYTES = 2**31                      # that it may take
DOCUMENT = 4096                         # tokens, on average


def documents(length: int) -> Callable:
    """A causal mask function of documents whose lengths are random."""
    generator = torch.Generator().manual_seed(length)
    starts = torch.rand(length, generator=generator) < 1 / min(DOCUMENT, max(1, length // 8))
    ids = starts.cumsum(0, dtype=torch.int32)
    return lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k)


def our_blocks(function: Callable, length: int, block: int) -> Tensor:
    return tw.mask_mod(function).classify(1, 1, length, length, block, block)[0, 0]


def flex_blocks(function: Callable, length: int, block: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(function, None, None, length, length, device="cpu", BLOCK_SIZE=block)


CLASSIFIERS: dict[str, Callable[[Callable, int, int], Any]] = {"tilewise": our_blocks, "create_block_mask": flex_blocks}


def measure(length: int, block: int) -> dict[str, Outcome]:
    """Each in processes of its own: for its memory, with settings that make allocation slow, and for its time."""
    contenders: dict[str, Entry] = {}
    timed = {}
    for who in CLASSIFIERS:
        needed = FLEX_BYTES * length**2
        if who == "create_block_mask" and needed > MOST_BYTES:
            contenders[who] = {"state": "refused", "reason": f"it evaluates every score: about {gib(needed)}"}
            continue
        memory, found = (apart("tiles", "classified", who, length, block, environment=settings) for settings in (GIVE_BACK, {}))
        wrong = memory["wrong"] + found["wrong"]
        contenders[who] = {"state": "wrong" if wrong else "timed", "reason": f"{wrong} tiles" if wrong else ""}
        if not wrong:
            timed[who] = Timing(found["seconds"], found["seconds"])
            contenders[who] |= {"bytes": memory["bytes"], "count": found["kept"]}
    result = outcome(timed) if "tilewise" in timed else Outcome(contenders={}, times_faster={})
    for name, own in result["contenders"].items():
        contenders[name] |= own
    return {CLASSIFY: Outcome(contenders=contenders, times_faster=result["times_faster"])}


def classified(who: str, length: int, block: int) -> dict[str, Any]:
    """Seconds and peak memory of classifying, in this process, beyond what it held before; then whether it is right."""
    classify, function = CLASSIFIERS[who], documents(length)
    classify(documents(16 * block), 16 * block, block)          # what libraries load on first use
    restart_peak()
    before = status_bytes("VmRSS")
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        found = classify(function, length, block)
        seconds.append(time.perf_counter() - begin)
    beyond = max(0, status_bytes("VmHWM") - before)
    classes = classes_of(found)
    wrong, loose = misjudged(classes, function, length, block)
    return {"seconds": seconds, "bytes": beyond, "kept": int((classes != EMPTY).sum()), "wrong": wrong, "loose": loose}


def classes_of(found: Any) -> Tensor:
    """EMPTY, PARTIAL or FULL of each tile, from a tensor of them or from FlexAttention's lists."""
    if isinstance(found, Tensor):
        return found
    classes = torch.zeros(found.to_dense()[0, 0].shape, dtype=torch.uint8)
    for kind, counts, indices in ((PARTIAL, found.kv_num_blocks, found.kv_indices),
                                  (FULL, found.full_kv_num_blocks, found.full_kv_indices)):
        for row, (count, columns) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].long(), strict=True)):
            classes[row, columns[:count]] = kind
    return classes


def misjudged(classes: Tensor, function: Callable, length: int, block: int) -> tuple[int, int]:
    """Of a sample of tiles: how many are EMPTY or FULL and should not be; how many PARTIAL ones could be either."""
    wrong = loose = 0
    generator = torch.Generator().manual_seed(2)
    inside = torch.arange(block)
    for kind in (EMPTY, PARTIAL, FULL):
        where = (classes == kind).flatten().nonzero()[:, 0]
        chosen = where[torch.randint(len(where), (SAMPLE,), generator=generator)] if len(where) else where
        rows, cols = ((t * block)[:, None] + inside for t in (chosen // classes.shape[1], chosen % classes.shape[1]))
        q, k = rows.clamp(max=length - 1)[:, :, None], cols.clamp(max=length - 1)[:, None]
        seen = function(0, 0, q, k).flatten(1)
        every, some = seen.all(1), seen.any(1)
        wrong += int({EMPTY: some, PARTIAL: torch.zeros_like(some), FULL: ~every}[kind].sum())
        loose += int((every | ~some).sum()) if kind == PARTIAL else 0
    return wrong, loose
