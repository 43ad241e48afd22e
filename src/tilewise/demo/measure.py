"""Time and peak memory of one attention layer's forward and backward pass, under a memory limit that is real.

Each measurement runs in a process of its own (`python -m tilewise.demo.measure CASE`), so that peaks do not mix and
running out of memory hurts nobody. On the CPU the limit is the process's data size (RLIMIT_DATA), on a GPU torch's
share of the device; in both, torch's own allocator says no. A system without such a limit is asked for no more than
the limit in score matrices.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from tilewise.api import attention
from tilewise.bench.resident import status_bytes


@dataclass(frozen=True)
class Case:
    """Causal self-attention of [batch, length, heads, head_dim] for each of `lengths`, in one process.

    `limit` is in bytes, beyond what the process holds before the first measurement. No pass begins when those before
    took `patience` seconds.
    """

    backend: str
    lengths: tuple[int, ...]
    batch: int
    heads: int
    head_dim: int
    dtype: str
    device: str
    limit: int
    patience: float = 5.0

    def duration(self, seconds: float) -> float:
        """About how long the measurement of a pass of so many seconds takes."""
        return min(6 * seconds + 0.3, self.patience + seconds)


@dataclass(frozen=True)
class Row:
    """One length: seconds of forward and backward, peak bytes beyond the inputs; or what the allocator said instead."""

    backend: str
    length: int
    seconds: float = 0.0
    bytes: int = 0
    refused: str = ""


def measure(case: Case) -> Iterator[Row]:
    """The rows of `case`, as they come, from a fresh process."""
    command = [sys.executable, "-m", "tilewise.demo.measure", json.dumps(asdict(case))]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as worker,
    ):
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                yield Row(**json.loads(line))
            if worker.wait() != 0:
                errors.seek(0)
                raise RuntimeError(f"measuring {case.backend} at {case.lengths} failed:\n{errors.read()[-2000:]}")
        finally:
            worker.kill()   # the reader may have seen enough


def work(case: Case) -> Iterator[Row]:
    """The rows of `case`, measured in this process, up to and with the first refusal."""
    run_length(case, 64)    # starts threads, loads kernels: their memory and time are nobody's fault
    set_limit(case)
    for length in case.lengths:
        try:
            check_scores(case, length)
            yield run_length(case, length)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield Row(case.backend, length, refused=str(error).strip().splitlines()[0])
            return


def run_length(case: Case, length: int) -> Row:
    """Time and peak memory at one length."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, length, case.heads, case.head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()

    def step() -> None:
        out = attention(q, k, v, causal=True, backend=case.backend)
        torch.autograd.grad(out, (q, k, v), grad)

    before = start_peak(device)
    seconds = time_calls(step, device, case.patience)
    return Row(case.backend, length, seconds, peak_bytes(device) - before)


def time_calls(step: Callable[[], None], device: torch.device, patience: float) -> float:
    """Median seconds of a call after a warm-up: at least 5 calls and 0.3 s, but none begun after `patience` seconds."""
    times: list[float] = []
    while sum(times) < patience and (len(times) < 6 or sum(times[1:]) < 0.3):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)


def set_limit(case: Case) -> None:
    """From here on, allocating more than `case.limit` bytes fails in torch's allocator."""
    if case.device.startswith("cuda"):
        device = torch.device(case.device)
        share = case.limit / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    elif sys.platform == "linux":
        import resource

        limit = status_bytes("VmData") + case.limit
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def check_scores(case: Case, length: int) -> None:
    """Stands in for the limit of a CPU whose system has none: standard attention keeps about four score matrices."""
    unlimited = case.device == "cpu" and sys.platform != "linux"
    scores = case.batch * case.heads * length**2 * getattr(torch, case.dtype).itemsize
    if unlimited and case.backend == "reference" and 4 * scores > case.limit:
        raise MemoryError(f"four score matrices of {scores:,} bytes exceed the limit")


def start_peak(device: torch.device) -> int:
    """Bytes held now, from which the peak is counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes held so far: resident memory of the process, or torch's allocations on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return status_bytes("VmHWM")    # getrusage would count the parent's memory as ours
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator, rather than a bug, raised `error`."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def main(text: str) -> None:
    """Prints one JSON line for each row of the case given as JSON."""
    for row in work(Case(**json.loads(text))):
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
