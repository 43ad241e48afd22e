"""Does it work on this GPU? Each Triton kernel once, forward and backward, caches, then CUDA graphs and torch.compile.

    python -m tilewise.bench.smoke [--out FILE]

Under a minute, compilation included.
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
from tilewise.bench import record, tolerance
from tilewise.bench.cases import Case, draw, named
from tilewise.bench.timing import alive

DEVICE = torch.device("cuda")
KERNEL_OF = {"out": "forward", "lse": "forward", "dq": "query_gradients", "dk": "key_gradients", "dv": "key_gradients",
             "dbias": "summed_gradient"}
CAUSAL = Case("causal", seqlen_q=300, seqlen_k=300, heads=4, kv_heads=2, head_dim=64, options=lambda m: dict(causal=True))
BIASED = Case("shared bias", seqlen_q=100, seqlen_k=130, head_dim=128, options=lambda m: dict(bias=m.normal(2, 100, 130)))


def kernels(case: Case) -> str:
    """Verdicts of the tolerance rule on one case in bf16; `preprocess` shows in every gradient."""
    verdicts = tolerance.check(draw(case, torch.bfloat16, DEVICE), "triton")
    words = ", ".join(f"{v.name} {v.error:.1e} of {v.allowed:.1e}" for v in verdicts)
    wrong = [v for v in verdicts if not v.ok]
    if wrong:
        blamed = ", ".join(sorted({KERNEL_OF[v.name] for v in wrong}))
        raise AssertionError(f"wrong: {blamed}: {words} {' '.join(v.note for v in wrong)}")
    return words


def cache() -> str:
    """A prompt of 300, then single tokens: appended with rotary and attended to, in a slot, in pages and in fp8."""
    rotary = tw.Rotary.of(64, 400, device=DEVICE)
    worst = 0.0
    for make in (lambda: tw.KVCache(2, 400, 2, 64, device=DEVICE), lambda: paged(torch.bfloat16),
                 lambda: paged(torch.float8_e4m3fn)):
        ours, theirs = make(), make()
        for n in (300, 1, 1, 5):
            tokens = _tokens(n)
            where: dict[str, Any] = dict(cache_batch_idx=[0, 1]) if isinstance(ours, tw.PagedKVCache) else {}
            a, b = (tw.attention_with_kv_cache(tokens[0], of, *tokens[1:], rotary=rotary, causal=True, backend=backend, **where)
                    for of, backend in ((ours, "triton"), (theirs, "reference")))
            worst = max(worst, (a - b).abs().max().item() / b.abs().max().item())
            assert worst <= 3e-2, f"{ours} after {n} tokens: differs from the reference by {worst:.1e}"
            assert torch.equal(ours.lengths, theirs.lengths), f"{ours}: other lengths"
    return f"within {worst:.1e} of the reference"


def paged(dtype: torch.dtype) -> tw.PagedKVCache:
    found = tw.PagedKVCache(80, 16, 2, 64, max_sequences=2, dtype=dtype, device=DEVICE)
    found.new(), found.new()
    return found


def graph_cache() -> str:
    """A captured decoding step appends and attends; replays go on where the last one stopped."""
    ours, theirs = (tw.KVCache(2, 400, 2, 64, device=DEVICE) for _ in range(2))
    prompt, step = _tokens(200), _tokens(1)
    for of in (ours, theirs):
        tw.attention_with_kv_cache(prompt[0], of, *prompt[1:], causal=True)
    start = ours.lengths.clone()
    replay, out = _captured(lambda: tw.attention_with_kv_cache(step[0], ours, *step[1:]))
    ours.lengths.copy_(start)           # warming up wrote too
    for _ in range(3):
        for x, new in zip(step, _tokens(1), strict=True):
            x.copy_(new)
        replay()
        expected = tw.attention_with_kv_cache(step[0], theirs, *step[1:])
        assert torch.equal(out, expected), "a replay differs from eager"
    assert torch.equal(ours.lengths, theirs.lengths), f"lengths {ours.lengths.tolist()}, eager {theirs.lengths.tolist()}"
    return "three replays equal eager"


def _tokens(n: int) -> list[Tensor]:
    return [torch.randn(2, n, heads, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (8, 2, 2)]


def chosen() -> str:
    """backend="auto" serves CUDA tensors with Triton."""
    q = _inputs()[0]
    plan = tw.explain(q, q, q, causal=True)
    assert plan.backend != "tiled", str(plan)
    return f"{plan.backend}, tiles {plan.tiles[0]} x {plan.tiles[1]}"


def graph() -> str:
    """A captured forward pass replays: on new inputs the same bits as eager."""
    q, k, v = _inputs()
    replay, out = _captured(lambda: tw.attention(q, k, v, causal=True))
    q.copy_(torch.randn_like(q))
    replay()
    assert torch.equal(out, tw.attention(q, k, v, causal=True)), "a replay differs from eager"
    return "replay equals eager"


def graph_dropout() -> str:
    """Each replay draws a fresh dropout mask."""
    q, k, v = _inputs()
    replay, out = _captured(lambda: tw.attention(q, k, v, causal=True, dropout_p=0.5))
    found = []
    for _ in range(3):
        replay()
        found.append(out.clone())
    assert all(x.isfinite().all() for x in found), "not finite"
    assert not torch.equal(found[0], found[1]), "two replays dropped the same elements"
    assert not torch.equal(found[1], found[2]), "two replays dropped the same elements"
    return "fresh masks on each replay"


def compiled() -> str:
    """torch.compile without graph breaks, forward and backward."""
    leaves = [x.requires_grad_() for x in _inputs()]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tw.attention(q, k, v, causal=True)

    found = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        off = (a - b).abs().max().item()
        assert off <= 2e-2 * a.abs().max().item(), f"{name} differs from eager by {off:.1e}"
    return "agrees with eager"


def _inputs() -> list[Tensor]:
    return [torch.randn(2, 300, 4, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]


def _captured(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(replay, output) of a CUDA graph, captured after a warm-up on a side stream as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = function()
    return captured.replay, out


CHECKS: dict[str, Callable[[], str]] = {
    "auto": chosen, "kernels": lambda: kernels(CAUSAL), "kernels with bias": lambda: kernels(BIASED),
    "packed": lambda: kernels(named("packed causal")), "cache": cache,
    "CUDA graph": graph, "CUDA graph dropout": graph_dropout, "CUDA graph of a cache": graph_cache, "torch.compile": compiled}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.smoke", description="Does Tilewise work on this GPU?")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = record.stamp() | {"checks": {}}
    machine = result["machine"]
    lines = result["lines"] = [f"{machine['GPU']}; torch {machine['torch']}; triton {machine['triton']}; {result['commit']}"]
    record.write(options.out, result)
    for name, check in CHECKS.items():
        begin = time.monotonic()
        try:
            words, ok = check(), True
        except Exception as error:  # the next check may still tell something
            words, ok = record.words(error), False
        seconds = time.monotonic() - begin
        result["checks"][name] = {"ok": ok, "words": words, "seconds": seconds}
        lines.append(f"{'ok  ' if ok else 'FAIL'} {name} ({seconds:.0f} s): {words}")
        print(lines[-1], flush=True)
        record.write(options.out, result)
        if not alive(DEVICE):
            raise SystemExit("the device no longer answers")
    if not all(entry["ok"] for entry in result["checks"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
