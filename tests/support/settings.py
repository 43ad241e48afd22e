"""Settings of PyTorch that decide how attention is computed."""
import contextlib

import torch

SETTINGS = "threads", "deterministic", "precision"


@contextlib.contextmanager
def another(setting):
    """One of SETTINGS is another one meanwhile."""
    was = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    try:
        if setting == "threads":
            torch.set_num_threads(was[0] + 1)
        elif setting == "deterministic":
            torch.use_deterministic_algorithms(not was[1])
        else:
            torch.set_float32_matmul_precision("high" if was[2] != "high" else "highest")
        yield
    finally:
        torch.set_num_threads(was[0])
        torch.use_deterministic_algorithms(was[1])
        torch.set_float32_matmul_precision(was[2])
