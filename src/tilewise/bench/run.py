"""Attention benchmark: correctness first, then time, beside everything else that this machine has.

    python -m tilewise.bench.run [--quick] [--out FILE]

On a GPU the protocol of the FlashAttention-2 paper: 16k tokens and 2048 channels in all, in bf16. Elsewhere smaller
shapes in fp32. A FLOP is counted as the field does: forward 4 B H S^2 D, half of it under a causal mask; backward 2.5
times that. The forward pass keeps what the backward needs; backward is the difference of both together and forward alone.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewise import backends
from tilewise.bench import record, table
from tilewise.bench.gate import Gate
from tilewise.bench.peers import Attend, Contender, discover, ours
from tilewise.bench.timing import Timing, alive, compare, minus, times_faster
from tilewise.bench.workers import part, run_slices
from tilewise.problem import make

PATIENCE = 200.0                        # seconds after which no further shape begins
SECONDS = {"cuda": 2.0, "cpu": 8.0}     # for one shape, all contenders together
WORK = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """Self-attention to be timed: q [batch, seqlen, heads, head_dim], k and v with kv_heads."""
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    dtype: str

    def flops(self) -> float:
        """Of the forward pass."""
        return 4 * self.batch * self.heads * self.seqlen**2 * self.head_dim / (2 if self.causal else 1)

    def draw(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, which require gradients, and dout."""
        generator = torch.Generator(device).manual_seed(seed)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        q, k, v, dout = (torch.randn((self.batch, self.seqlen, h, self.head_dim), generator=generator, device=device,
                                     dtype=getattr(torch, self.dtype)) for h in heads)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    @property
    def matrix_bytes(self) -> int:
        """About what a forward and backward pass holds in matrices of scores, of which some are fp32."""
        return 5 * 4 * self.batch * self.heads * self.seqlen**2


def shapes(device: torch.device, quick: bool = False, head_dims: Sequence[int] | None = None,
           lengths: Sequence[int] | None = None) -> list[Shape]:
    """The shapes for a device, most telling first."""
    dims: Sequence[int]
    sizes: Sequence[int]
    if device.type == "cuda":
        tokens, channels, dtype = 16384, 2048, "bfloat16"
        dims, sizes = (128, 64, 256), (4096, 16384, 1024, 8192, 2048, 512)
    else:
        tokens, channels, dtype = 2048, 512, "float32"
        dims, sizes = (64, 128), (1024, 2048, 256)
    if quick:
        tokens, dims, sizes = tokens // 4, dims[:1], (1024,) if device.type == "cuda" else (256,)
    return [Shape(max(1, tokens // s), s, channels // d, channels // d, d, causal, dtype)
            for d in head_dims or dims for s in lengths or sizes for causal in (True, False)]


def contenders(shape: Shape, device: torch.device, also: Sequence[str] = ()) -> list[Contender]:
    """Our backends that volunteer, in the order of backend="auto", `tiled` only where it is all there is; those of `also` that
    can; then the peers."""
    q, k, v, _ = Shape(1, 16, shape.heads, shape.kv_heads, shape.head_dim, shape.causal, shape.dtype).draw(device, 0)
    problem, _ = make(q, k, v, causal=shape.causal)
    serving = [name for name in backends.AUTO if backends.load(name).volunteers(problem) is None]
    asked = [name for name in also if name not in serving and backends.load(name).supports(problem) is None]
    return [ours(name) for name in [*serving, *asked] if name != "tiled" or serving[0] == name] + discover(device)


def measure(shape: Shape, field: Sequence[Contender], device: torch.device) -> dict[str, Any]:
    """One row: each contender's state ("timed", "wrong", "refused" or "absent"), times and ratios."""
    row: dict[str, Any] = {"shape": asdict(shape), "contenders": {}, "times_faster": {}}
    sets = [shape.draw(device, seed) for seed in (0, 1)]
    if device.type == "cuda":
        torch.compiler.reset()      # shapes are compiled apart, and torch.compile gives up after a few
    gate = Gate(*sets[0], shape.causal)
    for contender in field:
        row["contenders"][contender.name] = admit(contender, shape, gate, device)
    found = time_passes({c.name: c.attend for c in field if c.attend and row["contenders"][c.name]["state"] == "timed"},
                        shape, sets, device)
    for name, timings in found.items():
        for mode, timing in timings.items():
            rate = WORK[mode] * shape.flops() / timing.median / 1e12
            row["contenders"][name][mode] = timing.summary() | {"tflops": rate}
            if field[0].name in found:
                row["times_faster"].setdefault(mode, {})[name] = times_faster(found[field[0].name][mode], timing)
    return row


def time_passes(field: Mapping[str, Attend], shape: Shape, sets: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
                device: torch.device) -> dict[str, dict[str, Timing]]:
    """By contender and pass. All take turns, so that the backward's difference is taken within a round."""
    def forward(attend: Attend, turn: int) -> Tensor:
        q, k, v, _ = sets[turn % len(sets)]
        return attend(q, k, v, shape.causal)

    def both(attend: Attend, turn: int) -> tuple[Tensor, ...]:
        q, k, v, dout = sets[turn % len(sets)]
        return torch.autograd.grad(forward(attend, turn), (q, k, v), dout)

    calls = {(name, mode): partial(run, attend) for name, attend in field.items()
             for mode, run in (("forward", forward), ("forward+backward", both))}
    timed = compare(calls, device, seconds=SECONDS[device.type])
    found: dict[str, dict[str, Timing]] = {}
    for name in field:
        once, twice = timed[name, "forward"], timed[name, "forward+backward"]
        found[name] = {"forward": once, "backward": minus(twice, once), "forward+backward": twice}
    return found


def admit(contender: Contender, shape: Shape, gate: Gate, device: torch.device) -> dict[str, Any]:
    """A contender's state before timing, with the errors found."""
    if contender.attend is None:
        return {"state": "absent", "reason": contender.reason}
    if contender.dense and device.type == "cuda" and shape.matrix_bytes > torch.cuda.mem_get_info(device)[1] // 2:
        return {"state": "refused", "reason": f"needs about {shape.matrix_bytes / 2**30:.0f} GiB"}
    try:
        verdicts = gate.verdicts(contender.attend)
    except Exception as error:  # whatever a library raises on a shape it does not take
        if not alive(device):
            raise SystemExit(f"{contender.name} on {shape}: {record.words(error)}; the device no longer answers") from None
        return {"state": "refused", "reason": record.words(error)}
    wrong = [f"{v.name}: {v.note or f'error {v.error:.1e}, allowed {v.allowed:.1e}'}" for v in verdicts if not v.ok]
    errors = {v.name: [v.error, v.allowed] for v in verdicts}
    return {"state": "wrong" if wrong else "timed", "reason": "; ".join(wrong), "errors": errors}


def benchmark(which: Sequence[Shape], device: torch.device, *, seconds: float, out: Path | None = None,
              also: Sequence[str] = (), progress: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """Measures shape after shape, and after each writes the result so far to `out`. No shape begins after `seconds`."""
    deadline = time.monotonic() + seconds
    result: dict[str, Any] = record.stamp() | {"rows": [], "not_reached": [], "lines": []}
    for shape in which:
        if time.monotonic() > deadline:
            result["not_reached"].append(asdict(shape))
            continue
        progress(str(shape))
        try:
            result["rows"].append(measure(shape, contenders(shape, device, also), device))
        except Exception as error:  # one shape's failure, such as memory, must not cost the others
            result["rows"].append({"shape": asdict(shape), "error": record.words(error)})
            if not alive(device):
                raise SystemExit(f"{shape}: {record.words(error)}; the device no longer answers") from None
        result["lines"] = table.lines(result["rows"])
        record.write(out, result)
    return result


def warm(which: Sequence[Shape], device: torch.device, also: Sequence[str], text: str) -> None:
    """Compiles what one slice of shapes and contenders needs, by running it; results and errors are left to `measure`."""
    pairs = [(shape, c) for shape in which for c in contenders(shape, device, also) if c.compiles]
    for shape, contender in part(pairs, text):
        torch.compiler.reset()
        q, k, v, dout = shape.draw(device, 0)
        try:
            assert contender.attend is not None
            torch.autograd.grad(contender.attend(q, k, v, shape.causal), (q, k, v), dout)
        except Exception as error:  # measure() will meet it again and report it
            print(f"{contender.name} {shape}: {record.words(error)}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.run", description="Attention benchmark.")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--head-dims", type=_numbers, help="such as 64,128")
    parser.add_argument("--lengths", type=_numbers, help="such as 1024,4096")
    parser.add_argument("--also", action="append", default=[], metavar="BACKEND",
                        help="of ours that do not volunteer, such as hopper")
    parser.add_argument("--seconds", type=float, default=PATIENCE, help=f"begin no shape after so long ({PATIENCE:.0f})")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile ahead (default none)")
    parser.add_argument("--slice", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    begin, device = time.monotonic(), torch.device(options.device)
    which = shapes(device, options.quick, options.head_dims, options.lengths)
    if options.slice:
        warm(which, device, options.also, options.slice)
        return
    if options.jobs:
        passed_on = [f"--{name}={','.join(map(str, value))}" for name, value in
                     (("head-dims", options.head_dims), ("lengths", options.lengths)) if value]
        passed_on += [f"--also={name}" for name in options.also]
        run_slices("tilewise.bench.run", [*passed_on, *["--quick"] * options.quick], options.jobs, options.seconds / 2)
    left = options.seconds - (time.monotonic() - begin)
    result = benchmark(which, device, seconds=left, out=options.out, also=options.also,
                       progress=lambda words: print(words, file=sys.stderr, flush=True))
    print("\n".join(result["lines"]))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
