"""What masks and score functions cost: capturing them, finding their tiles, gradients of the tables that they read."""
from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tilewise as tw
from tilewise.bench.attention import SLOW_TO_COMPILE
from tilewise.bench.contest import BOTH, Entrant, Outcome, admit, gib, outcome, race
from tilewise.bench.peers import NO_GRADIENTS, flex_attend
from tilewise.bench.record import Entry
from tilewise.bench.resident import GIVE_BACK, restart_peak, status_bytes
from tilewise.bench.suite import Trial, Wanted
from tilewise.bench.timing import Timing, finish
from tilewise.bench.work import SAMPLE, Work, draw
from tilewise.bench.workers import apart
from tilewise.trace.bounds import EMPTY, FULL, PARTIAL

NEW_FUNCTION, NEW_LENGTH, CLASSIFY = "first with a new function", "first at a new length", "classify"
AGAIN = "the same again"
WITHOUT = "without its gradient"
BARS = {(BOTH, WITHOUT): 1 / 1.3}       # the gradient of a captured table costs at most so much
FLEX_BYTES = 10                         # of create_block_mask, for each score: measured
MOST_BYTES = 2**31                      # that it may take
DOCUMENT = 4096                         # tokens, on average


@dataclass(frozen=True)
class Sizes:
    """What is measured. repeats: new functions, and lengths. seconds: for one table."""
    functions: int = 1024
    classified: tuple[int, ...] = (4096, 16384, 131072, 1048576)
    captured: int = 2048
    repeats: int = 5
    seconds: float = 7.0
    heads: int = 4
    head_dim: int = 64
    block: int = 128


QUICK = Sizes(classified=(4096,), captured=512, repeats=1, seconds=1.0)


def trials(wanted: Wanted) -> list[Trial]:
    sizes, device = QUICK if wanted.quick else Sizes(), wanted.device
    shape = {"batch": 1, "heads": sizes.heads, "head_dim": sizes.head_dim, "dtype": "float32"}
    found = [Trial("functions", f"{what}, N {sizes.functions}", shape | {"seqlen": sizes.functions},
                   (NEW_FUNCTION, NEW_LENGTH), partial(functions, what, sizes, device, not wanted.quick)) for what in FUNCTIONS]
    found += [Trial("tiles", f"N {n}", {"seqlen": n, "block": sizes.block}, (CLASSIFY,),
                    partial(tiles, n, sizes.block)) for n in sizes.classified]
    return found + [Trial("tables", f"{name}, N {sizes.captured}", shape | {"seqlen": sizes.captured},
                          (BOTH,), partial(captured, name, sizes, device), BARS) for name in tables(1, 1)]


# ---- 1. functions: the first call with a new one, and at a new length -----------------------------------------------------

def new_mask(index: int) -> Callable:
    """A causal mask function, whose graph is another for each index from 0 to 2^8 - 1, at the same cost."""
    def visible(b, h, q, k):
        kept = q >= k
        for bit in range(8):
            kept = kept & (q - k != -1 - bit) if index >> bit & 1 else kept & (k - q != 1 + bit)
        return kept
    return visible


def new_score(index: int) -> Callable:
    """A score function, whose graph is another for each index from 0 to 2^8 - 1, at about the same cost."""
    def score_mod(s, b, h, q, k):
        for bit in range(8):
            s = s + 0.001 * bit if index >> bit & 1 else s - 0.001 * bit
        return s
    return score_mod


def with_mask(tensors: dict[str, Tensor], dout: Tensor, index: int) -> Work:
    return Work(tensors, dout, mask=new_mask(index))


def with_score(tensors: dict[str, Tensor], dout: Tensor, index: int) -> Work:
    function = new_score(index)
    return Work(tensors, dout, score=lambda _: function)


FUNCTIONS: dict[str, Callable[[dict[str, Tensor], Tensor, int], Work]] = {"mask": with_mask, "score": with_score}


def functions(what: str, sizes: Sizes, device: torch.device, compiled: bool) -> dict[str, Outcome]:
    """First calls beside the same calls again, in a process whose compilers have kept nothing; FlexAttention's first calls."""
    state = admit(FUNCTIONS[what](*draw(sizes.functions, sizes.heads, sizes.head_dim, device), 0).entrant("tilewise"), device)
    if state["state"] != "timed":
        return dict.fromkeys((NEW_FUNCTION, NEW_LENGTH), Outcome(contenders={"tilewise": state}, times_faster={}))
    found = {}
    for mode in (NEW_FUNCTION, NEW_LENGTH):
        first, again = in_new_process(what, "tilewise", mode, sizes, device)
        timed = {"tilewise": first, AGAIN: again}
        if compiled:
            timed["flex"] = in_new_process(what, "flex", mode, replace(sizes, repeats=1), device)[0]
        found[mode] = outcome(timed)
        if not compiled:
            found[mode]["contenders"]["flex"] = {"state": "absent", "reason": SLOW_TO_COMPILE}
    return found


def in_new_process(what: str, who: str, mode: str, sizes: Sizes, device: torch.device) -> tuple[Timing, Timing]:
    with tempfile.TemporaryDirectory() as cache:
        places = {name: cache for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        first, again = apart("masks", "first_calls", what, who, mode, asdict(sizes), str(device), environment=places,
                             patience=600.0)
    return Timing(first, first), Timing(again, again)


def first_calls(what: str, who: str, mode: str, fields: dict[str, Any], device: str) -> tuple[list[float], list[float]]:
    """Seconds of first calls with new functions or at new lengths, and of the same calls again."""
    sizes, where = Sizes(**fields), torch.device(device)
    first, again = [], []
    for index in range(sizes.repeats + 1):
        length, function = (sizes.functions, index) if mode == NEW_FUNCTION else (sizes.functions + 16 * index, 0)
        work = FUNCTIONS[what](*draw(length, sizes.heads, sizes.head_dim, where), function)
        if who == "flex":
            attend = flex_attend(where, work.mask, work.score and work.score(None))
            work = replace(work, attend=attend)
        one, *others = (stopwatch(work.forward, where) for _ in range(4))
        if index:                       # with the very first, libraries wake up
            first.append(one)
            again.append(sorted(others)[1])
    return first, again


def stopwatch(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until the result is there."""
    finish(device)
    begin = time.perf_counter()
    call()
    finish(device)
    return time.perf_counter() - begin


# ---- 2. which tiles a mask function shows ---------------------------------------------------------------------------------

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


def tiles(length: int, block: int) -> dict[str, Outcome]:
    """Each in processes of its own: for its memory, with settings that make allocation slow, and for its time."""
    contenders: dict[str, Entry] = {}
    timed = {}
    for who in CLASSIFIERS:
        needed = FLEX_BYTES * length**2
        if who == "create_block_mask" and needed > MOST_BYTES:
            contenders[who] = {"state": "refused", "reason": f"it evaluates every score: about {gib(needed)}"}
            continue
        memory, found = (apart("masks", "classified", who, length, block, environment=settings) for settings in (GIVE_BACK, {}))
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


# ---- 3. gradients of captured tables ----------------------------------------------------------------------------------------

class Table(NamedTuple):
    """A score function that reads a table."""
    shape: tuple[int, ...]
    score: Callable[[Any], Callable]


def tables(length: int, heads: int) -> dict[str, Table]:
    return {
        "relative position": Table((heads, 2 * length - 1),
                                   lambda t: lambda s, b, h, q, k: s + t[h, q - k + (length - 1)]),
        "pair bias": Table((heads, length, length), lambda t: lambda s, b, h, q, k: s + t[h, q, k]),
        "scalar per head": Table((heads,), lambda t: lambda s, b, h, q, k: s + t[h] * s),
    }


def captured(name: str, sizes: Sizes, device: torch.device) -> dict[str, Outcome]:
    """Forward and backward with the gradient of a captured table, and without, in turns."""
    inputs, dout = draw(sizes.captured, sizes.heads, sizes.head_dim, device)
    shape, score = tables(sizes.captured, sizes.heads)[name]
    fixed = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device)
    table = fixed.clone().requires_grad_()
    entrants = [Work(inputs | {"table": table}, dout, score=score).entrant("tilewise", (BOTH,)),
                Work(inputs | {"table": fixed}, dout, score=score).entrant(WITHOUT, (BOTH,))]
    if device.type == "cuda":
        flex = Work(inputs | {"table": table}, dout, score=score,
                    attend=lambda q, k, v, table: flex_attend(device, score=score(table))(q, k, v))
        entrants.append(flex.entrant("flex", (BOTH,)))
    else:
        entrants.append(Entrant("flex", reason=NO_GRADIENTS))
    return race(entrants, device, (BOTH,), seconds=sizes.seconds, least=sizes.repeats + 1)
