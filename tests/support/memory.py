"""Peak memory of a pass, each length in a fresh process.

    python tests/support/memory.py backward 8192      prints the bytes that forward and backward took at their peak
"""
import itertools
import os
import subprocess
import sys
from pathlib import Path


def peak_growth(mode: str, lengths: tuple[int, ...]) -> list[float]:
    """Ratio of the peaks of neighbouring lengths."""
    return [b / a for a, b in itertools.pairwise([peak_apart(mode, n) for n in lengths])]


def peak_apart(mode: str, n: int) -> int:
    """The peak in a process of its own."""
    from tilewise.bench.resident import GIVE_BACK

    settings = os.environ | GIVE_BACK | {"OMP_NUM_THREADS": "1"}  # threads would wait for each other most of the time
    return int(subprocess.run([sys.executable, __file__, mode, str(n)], env=settings, check=True, capture_output=True,
                              text=True).stdout)


def peak(mode: str, n: int) -> int:
    """Bytes of resident memory gained at the peak, beyond inputs of [1, n, 4, 32]. Linux only.

    mode: "backward" or "double_backward" of one sequence, "native_double_backward" by kernels; "statistics": its forward pass
    with all of them; "packed": forward and backward of 8 of unequal length, "padded": of the same, each as long as the
    longest, beyond inputs of that size.
    """
    import torch

    import tilewise as tw
    from tilewise.bench.resident import restart_peak, status_bytes
    from tilewise.packing import cu_seqlens

    def run(length: int) -> int:
        lengths = [length * n // 36 for n in range(1, 9)]
        shape = {"packed": (sum(lengths), 4, 32), "padded": (8, max(lengths), 4, 32)}.get(mode, (1, length, 4, 32))
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        restart_peak()
        before = status_bytes("VmRSS")
        mask = tw.window(512, None) if mode == "double_backward" else None
        backend = "cpu" if mode == "native_double_backward" else "tiled"
        if mode == "statistics":
            with torch.no_grad():
                tw.attention(q, k, v, causal=True, return_stats=("max_score", "entropy", "key_mass"), backend="tiled")
            return status_bytes("VmHWM") - before
        if mode == "packed":
            out = tw.attention_varlen(q, k, v, cu_seqlens(torch.tensor(lengths)), causal=True, backend="tiled")
        else:
            out = tw.attention(q, k, v, causal=True, mask=mask, backend=backend)
        twice = mode.endswith("double_backward")
        grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=twice)
        if twice:
            torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))
        return status_bytes("VmHWM") - before

    run(1024)  # what torch loads on first use, and the tiles themselves, are not the length's
    return run(n)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    print(peak(sys.argv[1], int(sys.argv[2])))
