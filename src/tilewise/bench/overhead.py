"""What a call costs beside its arithmetic: tiny calls, in microseconds, against PyTorch's own attention.

    python -m tilewise.bench.overhead           where the time of a call goes, stage by stage

Each contender has its tensors in the order it likes best: [B, S, H, D] here, [B, H, S, D] there. `instructions` counts instead
of timing, which noise cannot touch.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tilewise as tw
from tilewise import calls
from tilewise.backends.cpu.launch import Launch
from tilewise.bench import timing
from tilewise.bench.contest import Entrant, Outcome, race
from tilewise.bench.record import Row
from tilewise.bench.suite import Trial, Wanted
from tilewise.bench.tolerance import Verdict
from tilewise.problem import DENSE

B, S, H, D = 1, 16, 2, 16
CAPACITY, PAGE = 64, 16                 # of the cache; keys of a page
LENGTHS = 6, 10                         # of packed sequences
TOGETHER = 5                            # calls that are timed as one
BAR = 1.5                               # times PyTorch's time, at most
OURS, THEIRS = "tilewise", "sdpa"
WHOLE = "whole call"
CPU = torch.device("cpu")
Call = Callable[[], Any]
sdpa: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention


class Case(NamedTuple):
    """One call and PyTorch's for the same; truth: PyTorch's in fp64.

    recorded: gradients are wanted, otherwise the calls are made under `torch.no_grad`.
    turned: PyTorch's results are [B, H, S, D].
    """
    name: str
    ours: Call
    theirs: Call
    truth: Call
    setting: dict[str, Any]
    recorded: bool = False
    turned: bool = False


def cases() -> list[Case]:
    """All calls, on fresh tensors."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, S, H, D) for _ in range(3))
    there = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    close = (torch.arange(S)[:, None] - torch.arange(S)).abs() <= 3
    thirds = (torch.arange(S)[:, None] - torch.arange(S)) % 3 == 0
    chosen = tw.mask_mod(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 == 0)
    return [
        forward("plain", there, lambda: tw.attention(q, k, v)),
        forward("causal", there, lambda: tw.attention(q, k, v, causal=True), is_causal=True),
        forward("window", there, lambda: tw.attention(q, k, v, mask=tw.window(3, 3)), attn_mask=close),
        forward("mask function", there, lambda: tw.attention(q, k, v, mask=chosen), attn_mask=thirds),
        forward("boolean mask", there, lambda: tw.attention(q, k, v, mask=close), attn_mask=close),
        recorded("recorded", q, k, v, there, backward=False),
        recorded("differentiated", q, k, v, there, backward=True),
        packed(q[0], k[0], v[0]),
        decode("decoding step"),
        decode("decoding step, GQA", heads=4 * H),
        decode("paged step", paged=True),
    ]


def forward(name: str, there: list[Tensor], ours: Call, **options: Any) -> Case:
    return Case(name, ours, lambda: sdpa(*there, **options), lambda: sdpa(*[x.double() for x in there], **options),
                dict(mode="forward"), turned=True)


def recorded(name: str, q: Tensor, k: Tensor, v: Tensor, there: list[Tensor], backward: bool) -> Case:
    """Inputs need gradients: the forward alone, or with the backward, whose results are the gradients."""
    here = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(B, S, H, D)

    def of(dtype: torch.dtype) -> Call:
        own = [x.to(dtype).requires_grad_() if dtype != x.dtype else x.clone().requires_grad_() for x in there]
        own_dout = dout.transpose(1, 2).contiguous().to(dtype)
        return (lambda: torch.autograd.grad(sdpa(*own), own, own_dout)) if backward else (lambda: sdpa(*own))

    ours = (lambda: torch.autograd.grad(tw.attention(*here), here, dout)) if backward else (lambda: tw.attention(*here))
    return Case(name, ours, of(torch.float32), of(torch.float64), dict(mode="forward+backward" if backward else "forward"),
                recorded=True, turned=True)


def packed(q: Tensor, k: Tensor, v: Tensor) -> Case:
    """Two sequences; PyTorch is called for each."""
    cu_seqlens = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)

    def theirs(dtype: torch.dtype = torch.float32) -> Tensor:
        parts = zip(*(x.to(dtype).transpose(0, 1)[None].split(LENGTHS, 2) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*part) for part in parts], 2)[0].transpose(0, 1)

    return Case("packed", lambda: tw.attention_varlen(q, k, v, cu_seqlens), theirs, lambda: theirs(torch.float64),
                dict(mode="forward", lengths=list(LENGTHS)))


def decode(name: str, heads: int = H, paged: bool = False) -> Case:
    """One step: a new key and value, then attention to all. Both take the step back before; PyTorch's cache is a tensor."""
    q, (k, v) = torch.randn(B, 1, heads, D), (torch.randn(B, 1, H, D) for _ in range(2))
    held = [torch.randn(B, S - 1, H, D) for _ in range(2)]
    cache: Any
    if paged:
        cache, which = tw.PagedKVCache(CAPACITY // PAGE, PAGE, H, D, max_sequences=1, dtype=torch.float32), [0]
        cache.append(*held, sequences=[cache.new()])
    else:
        cache, which = tw.KVCache(B, CAPACITY, H, D, dtype=torch.float32), None
        cache.append(*held)
    before = cache.lengths.clone()
    keys, values = (torch.cat([x, x.new_zeros(B, CAPACITY - S + 1, H, D)], 1).transpose(1, 2).contiguous() for x in held)
    q_there, k_there, v_there = (x.transpose(1, 2) for x in (q, k, v))

    def ours() -> Tensor:
        if which is None:
            cache.lengths.copy_(before)
        else:
            cache.truncate(0, S - 1)
        return tw.attention_with_kv_cache(q, cache, k, v, cache_batch_idx=which)

    def theirs(dtype: torch.dtype = torch.float32) -> Tensor:
        keys[:, :, S - 1:S], values[:, :, S - 1:S] = k_there, v_there
        if dtype == torch.float32:
            return sdpa(q_there, keys[:, :, :S], values[:, :, :S], enable_gqa=heads > H)
        return sdpa(*(x.to(dtype) for x in (q_there, keys[:, :, :S], values[:, :, :S])), enable_gqa=heads > H)

    setting = dict(mode="forward", cache=CAPACITY, heads=heads) | (dict(page_size=PAGE) if paged else {})
    return Case(name, ours, theirs, lambda: theirs(torch.float64), setting, turned=True)


def right(case: Case) -> dict[str, list[float]]:
    """Per result [error, allowed] by the tolerance rule, PyTorch in fp32 being the standard."""
    found = {}
    results = [x if isinstance(x, (tuple, list)) else [x] for x in (case.ours(), case.theirs(), case.truth())]
    for i, (mine, standard, truth) in enumerate(zip(*results, strict=True)):
        if case.turned:
            standard, truth = standard.transpose(1, 2), truth.transpose(1, 2)
        largest = max(1.0, truth.abs().max().item())
        allowed = 3 * (standard - truth).abs().max().item() + 4 * torch.finfo(mine.dtype).eps * largest
        found[f"result {i}"] = [(mine - truth).abs().max().item(), allowed]
    return found


def verdicts(case: Case) -> list[Verdict]:
    return [Verdict(name, error, allowed) for name, (error, allowed) in right(case).items()]


def trials(wanted: Wanted) -> list[Trial]:
    """All cases, on one thread. The calls run on the CPU whatever the device."""
    return [trial(case, 0.1 if wanted.quick else 2.0) for case in cases()]


def trial(case: Case, seconds: float) -> Trial:
    mode = case.setting["mode"]

    def measure() -> dict[str, Outcome]:
        entrants = [Entrant(OURS, {mode: repeated(case.ours)}, partial(verdicts, case), factor=1 / TOGETHER),
                    Entrant(THEIRS, {mode: repeated(case.theirs)}, list, factor=1 / TOGETHER)]
        with one_thread(), torch.set_grad_enabled(case.recorded):
            return race(entrants, CPU, (mode,), seconds=seconds, least=20, most=20000)

    setting = dict(batch=B, seqlen=S, heads=H, kv_heads=H, head_dim=D, dtype="float32", threads=1) | case.setting
    return Trial("overhead", case.name, setting, (mode,), measure, {(mode, THEIRS): 1 / BAR})


def repeated(call: Call) -> timing.Call:
    def several(_turn: int) -> None:
        for _ in range(TOGETHER):
            call()

    return several


def lines(rows: Sequence[Row], wanted: Wanted) -> list[str]:
    """A table for a terminal: microseconds of a call, and how many times PyTorch's that is."""
    found = [f"{'microseconds of a call':40} {OURS:>12} {THEIRS:>12} {'times':>8}"]
    for row in rows:
        cells = [f"{entry['seconds'] * 1e6:.1f}" if "seconds" in entry else entry["state"]
                 for entry in row["contenders"].values()]
        times = [f"{1 / faster['median']:.2f}" for faster in row["times_faster"].values()]
        found.append(" ".join([f"{row['case']:40}", *(f"{cell:>12}" for cell in cells), *(f"{cell:>8}" for cell in times)]))
    return found


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Threads that wait for each other would be most of what is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stages() -> dict[str, Call]:
    """Parts of the plain forward, each by itself; the first is all of it."""
    q, k, v = (torch.randn(B, S, H, D) for _ in range(3))
    options = calls.Options()
    known, x = calls.find(q, k, v, options, "cpu", DENSE)
    launch, (out, lse) = known.launch, known.run(x)
    assert isinstance(launch, Launch)
    frame = launch.new_frame()
    told: dict[str, Any] = dict(q=q, k=k, v=v, out=out, lse=lse)        # alive as long as the kernel may run
    for name, t in told.items():
        setattr(frame.told, name, t.data_ptr())

    def kernel() -> None:
        assert told
        launch.kernel(frame.address)

    return {
        WHOLE: lambda: tw.attention(q, k, v, backend="cpu"),
        "is it plain": lambda: calls.plain(q, k, v, None, None),
        "known by its key": lambda: calls.find(q, k, v, options, "cpu", DENSE),
        "out allocated": lambda: torch.empty_like(known.out),
        "kernel told": lambda: launch(x, out=out),
        "kernel run": kernel,
    }


def profile(seconds: float = 2.0) -> list[str]:
    """Where the time of the plain forward goes: each stage by itself, in turns."""
    with one_thread(), torch.no_grad():
        parts = {name: repeated(call) for name, call in (stages() | {THEIRS: cases()[0].theirs}).items()}
        timed = timing.compare(parts, CPU, seconds=seconds, least=20, most=20000)
    each = {name: min(one.rounds) / TOGETHER * 1e6 for name, one in timed.items()}
    whole, theirs = each.pop(WHOLE), each.pop(THEIRS)
    each["kernel told"] -= each["kernel run"]
    each["the rest: arguments, result"] = max(0.0, whole - sum(each.values()))
    return [f"{'stage of the plain forward':32} {'us':>6}", *(f"{name:32} {us:>6.2f}" for name, us in each.items()),
            f"{WHOLE:32} {whole:>6.2f}", f"{THEIRS:32} {theirs:>6.2f}"]


if __name__ == "__main__":
    print("\n".join(profile()))
