"""What a call costs beside its arithmetic: tiny calls, in microseconds, against PyTorch's own attention.

    python -m tilewise.bench.overhead [--quick] [--out FILE] [--profile]

Each contender has its tensors in the order it likes best: [B, S, H, D] here, [B, H, S, D] there. --profile tells where a call's
time goes, stage by stage; `instructions` counts instead of timing, which noise cannot touch.
"""
from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tilewise as tw
from tilewise import calls
from tilewise.backends.cpu.launch import Launch
from tilewise.bench import record, timing
from tilewise.problem import DENSE

B, S, H, D = 1, 16, 2, 16
CAPACITY = 64                           # of the cache
LENGTHS = 6, 10                         # of packed sequences
TOGETHER = 5                            # calls that are timed as one
BAR = 1.5                               # times PyTorch's time, at most
OURS, THEIRS = "tilewise", "torch SDPA"
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
        forward("forward", there, lambda: tw.attention(q, k, v)),
        forward("causal", there, lambda: tw.attention(q, k, v, causal=True), is_causal=True),
        forward("window", there, lambda: tw.attention(q, k, v, mask=tw.window(3, 3)), attn_mask=close),
        forward("mask function", there, lambda: tw.attention(q, k, v, mask=chosen), attn_mask=thirds),
        forward("boolean mask", there, lambda: tw.attention(q, k, v, mask=close), attn_mask=close),
        recorded("forward, recorded", q, k, v, there, backward=False),
        recorded("forward and backward", q, k, v, there, backward=True),
        packed(q[0], k[0], v[0]),
        decode(),
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


def decode() -> Case:
    """One step: a new key and value, then attention to all. Both take the step back before; PyTorch's cache is a tensor."""
    cache = tw.KVCache(B, CAPACITY, H, D, dtype=torch.float32)
    cache.append(*(torch.randn(B, S - 1, H, D) for _ in range(2)))
    before = cache.lengths.clone()
    q, k, v = (torch.randn(B, 1, H, D) for _ in range(3))
    keys, values = (x.transpose(1, 2).contiguous() for x in (cache.k, cache.v))
    q_there, k_there, v_there = (x.transpose(1, 2) for x in (q, k, v))

    def ours() -> Tensor:
        cache.lengths.copy_(before)
        return tw.attention_with_kv_cache(q, cache, k, v)

    def theirs(dtype: torch.dtype = torch.float32) -> Tensor:
        keys[:, :, S - 1:S], values[:, :, S - 1:S] = k_there, v_there
        if dtype == torch.float32:
            return sdpa(q_there, keys[:, :, :S], values[:, :, :S])
        return sdpa(*(x.to(dtype) for x in (q_there, keys[:, :, :S], values[:, :, :S])))

    return Case("decoding step", ours, theirs, lambda: theirs(torch.float64), dict(mode="forward", cache=CAPACITY), turned=True)


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


def benchmark(device: torch.device = CPU, *, quick: bool = False, out: str | Path | None = None,
              progress: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """All cases, on one thread: a result in the common schema. The calls run on CPUs whatever the device."""
    result: dict[str, Any] = record.stamp() | dict(benchmark="overhead", device="cpu", quick=quick, complete=False, rows=[],
                                                   lines=[])
    with one_thread():
        every = cases()
        for done, case in enumerate(every):
            progress("overhead", done, len(every), case.name)
            with torch.set_grad_enabled(case.recorded):
                result["rows"].append(row(case, 0.1 if quick else 2.0))
            result["lines"] = lines(result["rows"])
            record.write(out, result)
    result["complete"] = True
    record.write(out, result)
    return result


def row(case: Case, seconds: float) -> dict[str, Any]:
    errors = right(case)
    def repeated(call: Call) -> timing.Call:
        def several(_turn: int) -> None:
            for _ in range(TOGETHER):
                call()
        return several

    turns = {OURS: repeated(case.ours), THEIRS: repeated(case.theirs)}
    timed = timing.compare(turns, CPU, seconds=seconds, least=20, most=20000)
    each = {name: timing.Timing([t / TOGETHER for t in one.rounds], [t / TOGETHER for t in one.host])
            for name, one in timed.items()}
    contenders = {name: {"state": "timed", "reason": ""} | one.summary() for name, one in each.items()}
    contenders[OURS]["errors"] = errors
    if any(not error <= allowed for error, allowed in errors.values()):
        contenders[OURS] |= {"state": "wrong", "reason": "not within the tolerance of PyTorch in fp64"}
    same = len(each[OURS].rounds) == len(each[THEIRS].rounds)      # not where one call took longer than all should
    pairs = zip(each[OURS].rounds, each[THEIRS].rounds, strict=True) if same else [(each[OURS].median, each[THEIRS].median)]
    ratios = timing.Timing([b / a for a, b in pairs], [1.0])
    setting = dict(batch=B, seqlen=S, heads=H, kv_heads=H, head_dim=D, dtype="float32", threads=1) | case.setting
    return {"part": "call", "case": case.name, "setting": setting, "contenders": contenders, "bar": 1 / BAR,
            "times_faster": {THEIRS: {"median": ratios.median, "quartiles": ratios.quartiles}}}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table for a terminal: microseconds of a call, and how many times PyTorch's that is."""
    found = [f"{'microseconds of a call':24} {OURS:>12} {THEIRS:>12} {'times':>8}"]
    for one in rows:
        ours, theirs = (one["contenders"][name] for name in (OURS, THEIRS))
        cell = f"{ours['seconds'] * 1e6:.1f}" if ours["state"] == "timed" else "wrong"
        times = 1 / one["times_faster"][THEIRS]["median"]
        found.append(f"{one['case']:24} {cell:>12} {theirs['seconds'] * 1e6:>12.1f} {times:>8.2f}")
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
    def repeated(call: Call) -> timing.Call:
        return lambda _turn: [call() for _ in range(TOGETHER)]

    with one_thread(), torch.no_grad():
        parts = {name: repeated(call) for name, call in (stages() | {THEIRS: cases()[0].theirs}).items()}
        timed = timing.compare(parts, CPU, seconds=seconds, least=20, most=20000)
    each = {name: min(one.rounds) / TOGETHER * 1e6 for name, one in timed.items()}
    whole, theirs = each.pop(WHOLE), each.pop(THEIRS)
    each["kernel told"] -= each["kernel run"]
    each["the rest: arguments, result"] = max(0.0, whole - sum(each.values()))
    return [f"{'stage of the plain forward':32} {'us':>6}", *(f"{name:32} {us:>6.2f}" for name, us in each.items()),
            f"{WHOLE:32} {whole:>6.2f}", f"{THEIRS:32} {theirs:>6.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tenth of a second for each call")
    parser.add_argument("--profile", action="store_true", help="where the time of a call goes, stage by stage")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    if arguments.profile:
        print("\n".join(profile()))
        return
    print("\n".join(benchmark(quick=arguments.quick, out=arguments.out)["lines"]))


if __name__ == "__main__":
    main()
