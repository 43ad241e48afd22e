"""What this CPU's cores compute at most, all together: loops in registers, compiled like the kernels."""
from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tilewise.backends.cpu import compiler, threads

ROUNDS, STEPS = 40, 100_000     # a millisecond each, in which perhaps nothing else runs
NOTHING = 6 * "|"       # a program without a function


class Peak(NamedTuple):
    """Per second: FLOPs of fp32 products and of 16-bit ones, and exponentials."""
    products: float
    pairs: float
    exponentials: float


def measured() -> Peak:
    """In a fifth of a second, once it is compiled. Raises RuntimeError where that fails."""
    library, count = compiler.library("peak", NOTHING, ()), threads.count()
    widths = {name: getattr(library, name)() for name in ("peak_width", "peak_pairs_width")}

    def rate(name: str, width: str) -> float:
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_long], ctypes.c_float
        best = float("inf")
        with ThreadPoolExecutor(count) as pool:             # a call lets other Python threads run
            for _ in range(ROUNDS):
                start = time.perf_counter()
                list(pool.map(function, [STEPS] * count))
                best = min(best, time.perf_counter() - start)
        return count * STEPS * widths[width] / best

    return Peak(2 * rate("peak_products", "peak_width"), 2 * rate("peak_pairs", "peak_pairs_width"),
                rate("peak_exponentials", "peak_width"))
