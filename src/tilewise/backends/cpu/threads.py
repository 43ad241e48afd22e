"""The threads that kernels run on: those of the OpenMP runtime that PyTorch has loaded, as many as PyTorch uses."""
from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path

import torch

from tilewise.backends import PROCESS

RUNTIME = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.(so|dylib)[^/]*$")


@functools.cache
def entry() -> int | None:
    """Address of GOMP_parallel, which every OpenMP runtime offers; None: PyTorch has none."""
    candidates = [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))]
    try:
        maps = Path("/proc/self/maps").read_text()
        candidates = sorted({line.split()[-1] for line in maps.splitlines() if "/" in line})
    except OSError:
        pass
    for path in filter(RUNTIME.search, candidates):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def count() -> int:
    """How many threads to use. One in a forked child: the threads of a runtime do not survive a fork."""
    return torch.get_num_threads() if os.getpid() == PROCESS else 1
