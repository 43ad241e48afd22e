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
    from tilewise.bench.resident import GIVE_BACK

    peaks = [int(subprocess.run([sys.executable, __file__, mode, str(n)], env=os.environ | GIVE_BACK, check=True,
                                capture_output=True, text=True).stdout) for n in lengths]
    return [b / a for a, b in itertools.pairwise(peaks)]


def peak(mode: str, n: int) -> int:
    """Bytes of resident memory gained at the peak, beyond inputs of [1, n, 4, 32]. Linux only."""
    import torch

    import tilewise as tw
    from tilewise.bench.resident import restart_peak, status_bytes

    def run(length: int) -> int:
        q, k, v = (torch.randn(1, length, 4, 32, requires_grad=True) for _ in range(3))
        restart_peak()
        before = status_bytes("VmRSS")
        mask = tw.window(512, None) if mode == "double_backward" else None
        out = tw.attention(q, k, v, causal=True, mask=mask, backend="tiled")
        grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=mode == "double_backward")
        if mode == "double_backward":
            torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))
        return status_bytes("VmHWM") - before

    run(1024)  # what torch loads on first use, and the tiles themselves, are not the length's
    return run(n)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    print(peak(sys.argv[1], int(sys.argv[2])))
