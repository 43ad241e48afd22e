"""Which backends can run in this process, and where."""
import importlib.util

import torch

GPU = torch.cuda.is_available()


def _triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton
    return GPU or triton.knobs.runtime.interpret


INTERPRETING = not GPU and _triton()
DEVICE = "cuda" if GPU else "cpu"
# where Triton is interpreted, the other backends run in the other process
AVAILABLE = ["triton"] if INTERPRETING else ["reference", "tiled", "triton" if GPU else "cpu"]
