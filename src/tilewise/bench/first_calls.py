"""The first call with a new mask or score function, and at a new length, beside the same call again."""
from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tilewise.bench.attention import SLOW_TO_COMPILE
from tilewise.bench.contest import Outcome, admit, outcome
from tilewise.bench.peers import flex_attend
from tilewise.bench.timing import Timing, finish
from tilewise.bench.work import Work, draw
from tilewise.bench.workers import apart

NEW_FUNCTION, NEW_LENGTH = "first with a new function", "first at a new length"
MODES = NEW_FUNCTION, NEW_LENGTH
AGAIN = "the same again"


@dataclass(frozen=True)
class Setting:
    """repeats: new functions, and lengths."""
    seqlen: int = 1024
    heads: int = 4
    head_dim: int = 64
    repeats: int = 5


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


def measure(what: str, setting: Setting, device: torch.device, compiled: bool) -> dict[str, Outcome]:
    """First calls beside the same calls again, in a process whose compilers have kept nothing; FlexAttention's first calls."""
    work = FUNCTIONS[what](*draw(setting.seqlen, setting.heads, setting.head_dim, device), 0)
    state = admit(work.entrant("tilewise"), device)
    if state["state"] != "timed":
        return dict.fromkeys(MODES, Outcome(contenders={"tilewise": state}, times_faster={}))
    found = {}
    for mode in MODES:
        first, again = in_new_process(what, "tilewise", mode, setting, device)
        timed = {"tilewise": first, AGAIN: again}
        if compiled:
            timed["flex"] = in_new_process(what, "flex", mode, replace(setting, repeats=1), device)[0]
        found[mode] = outcome(timed)
        if not compiled:
            found[mode]["contenders"]["flex"] = {"state": "absent", "reason": SLOW_TO_COMPILE}
    return found


def in_new_process(what: str, who: str, mode: str, setting: Setting, device: torch.device) -> tuple[Timing, Timing]:
    with tempfile.TemporaryDirectory() as cache:
        places = {name: cache for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        first, again = apart("first_calls", "seconds_of", what, who, mode, asdict(setting), str(device), environment=places,
                             patience=600.0)
    return Timing(first, first), Timing(again, again)


def seconds_of(what: str, who: str, mode: str, fields: dict[str, Any], device: str) -> tuple[list[float], list[float]]:
    """Seconds of first calls with new functions or at new lengths, and of the same calls again."""
    setting, where = Setting(**fields), torch.device(device)
    first, again = [], []
    for index in range(setting.repeats + 1):
        length, function = (setting.seqlen, index) if mode == NEW_FUNCTION else (setting.seqlen + 16 * index, 0)
        work = FUNCTIONS[what](*draw(length, setting.heads, setting.head_dim, where), function)
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
