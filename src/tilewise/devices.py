"""What devices can do at most: `devices.tsv` for GPUs, with the source of each row, and this machine's CPU, measured.

    arch                whose tile sizes it takes (`backends/triton/configs.tsv`); a T4, which has no kernels, those of sm_80
    half, tf32, fp32    10^12 FLOP/s of products of 16-bit inputs, of fp32 rounded to tf32, and of plain fp32 arithmetic
    special_per_clock   exponentials per clock of each of `units` multiprocessors, at `clock` 10^9 per second
    bandwidth           10^12 bytes per second of slow memory
    fast, l2            KiB of L1 and shared memory of one multiprocessor; MiB of the last cache before slow memory
    capacity            GB of slow memory
"""
from __future__ import annotations

import csv
import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewise.backends.cpu import compiler
from tilewise.backends.cpu.peak import measured

TABLE = Path(__file__).with_name("devices.tsv")
ROUNDS = 5
UNITS = ("products", "exponentials", "arithmetic", "slow memory")


@dataclass(frozen=True)
class Device:
    """Rates per second; sizes in bytes, 0: not known. products: by the width of inputs, "half", "tf32" or "fp32"."""
    name: str
    arch: str
    products: dict[str, float]
    arithmetic: float
    exponentials: float
    bandwidth: float
    fast: int
    l2: int
    capacity: int
    source: str

    def seconds(self, width: str, products: float, exponentials: float, arithmetic: float,
                moved: float) -> dict[str, float]:
        """Of each of `UNITS` by itself, for FLOPs, exponentials and bytes. The roofline is the longest: all work at once."""
        return dict(zip(UNITS, (products / self.rate(width), exponentials / self.exponentials, arithmetic / self.arithmetic,
                                moved / self.bandwidth), strict=True))

    def rate(self, width: str) -> float:
        """Of products. Raises ValueError for a width that the device lacks."""
        if width not in self.products:
            raise ValueError(f"dtype: expected one that {self.name} multiplies ({', '.join(self.products)}), got {width}")
        return self.products[width]


def width_of(dtype: torch.dtype, precision: str) -> str:
    """The width of products of a dtype, fp32 in a precision of `problem.PRECISIONS`."""
    return "half" if dtype != torch.float32 else "tf32" if precision == "tf32" else "fp32"


@functools.cache
def table() -> dict[str, Device]:
    """The GPUs of `devices.tsv`, by name."""
    found = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            products = {width: float(row[width]) * 1e12 for width in ("half", "tf32", "fp32") if row[width]}
            found[row["name"]] = Device(
                row["name"], row["arch"], products, products["fp32"],
                float(row["special_per_clock"]) * float(row["units"]) * float(row["clock"]) * 1e9,
                float(row["bandwidth"]) * 1e12, int(row["fast"]) << 10, int(row["l2"]) << 20, int(float(row["capacity"]) * 1e9),
                row["source"])
    return found


def device(name: str) -> Device:
    """By name, capitals aside; "cpu" is this machine's, measured now. Raises ValueError naming those there are."""
    if name.lower() == "cpu":
        return this_cpu()
    for known, found in table().items():
        if known.lower() == name.lower():
            return found
    raise ValueError(f"device: expected cpu or one of {', '.join(table())}, got {name!r}")


def serving(where: torch.device) -> Device | None:
    """That of a torch device: of a GPU the row whose name stands in the driver's, None without one; of the CPU, measured."""
    if where.type == "cpu":
        return this_cpu()
    words = torch.cuda.get_device_name(where).lower().replace("-", " ").split()
    rows = [row for name, row in table().items() if set(name.lower().replace("-", " ").split()) <= set(words)]
    return max(rows, key=lambda row: len(row.name), default=None)


# ---- this machine's CPU ------------------------------------------------------------------------------------------------

def seconds(work: Callable[[], object]) -> float:
    """The best of a few rounds: what the machine can do, not what else it does."""
    work()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def products_per_second(dtype: torch.dtype, n: int = 1024) -> float:
    a, b = (torch.ones(n, n, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)


def elements_per_second(work: Callable[[torch.Tensor, torch.Tensor], object], n: int = 1 << 14, repeats: int = 64) -> float:
    """Of an elementwise operation on what fits into the nearest cache."""
    x, out = torch.rand(n), torch.empty(n)

    def many() -> None:
        for _ in range(repeats):
            work(x, out)

    return repeats * n / seconds(many)


def bytes_per_second(working_set: int) -> float:
    """Of copying between two buffers of together so many bytes, read and written."""
    n = max(1 << 10, working_set // 8)
    x, out = torch.zeros(n), torch.zeros(n)
    repeats = max(1, (1 << 26) // (8 * n))

    def many() -> None:
        for _ in range(repeats):
            out.copy_(x)

    return repeats * 8 * n / seconds(many)


def cache_sizes() -> dict[str, int]:
    """Bytes of this CPU's data caches by level, as Linux tells them; nothing elsewhere."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        match = re.fullmatch(r"(\d+)([KM])", size)
        if kind != "Instruction" and match:
            found[f"L{level}"] = int(match[1]) << (10 if match[2] == "K" else 20)
    return found


@functools.cache
def this_cpu() -> Device:
    """Measured in about two seconds, with torch's threads. Fast memory is the second-level cache of one core.

    Rates are those of compiled loops in registers, which no kernel exceeds; without a compiler what torch's operations reach.
    """
    caches, threads = cache_sizes(), torch.get_num_threads()
    last = max(caches.values(), default=32 << 20)
    if compiler.compiler():
        peak = measured()
        products, exponentials = {"fp32": peak.products, "half": peak.pairs}, peak.exponentials
        arithmetic, source = peak.products, f"measured now with {threads} threads, in registers"
    else:
        products = {"fp32": products_per_second(torch.float32), "half": products_per_second(torch.bfloat16, 512)}
        arithmetic = 2 * elements_per_second(lambda x, out: torch.addcmul(x, x, x, out=out))
        exponentials = elements_per_second(lambda x, out: torch.exp(x, out=out))
        source = f"measured now with {threads} threads, by torch's operations"
    return Device("cpu", "", products, arithmetic, exponentials, bytes_per_second(4 * last), caches.get("L2", 1 << 20), last, 0,
                  source)


def levels() -> list[tuple[str, int, float]]:
    """(name, bytes, bytes per second from beyond it): each cache as a fast memory, the next, or memory, as the slow one."""
    caches = sorted(cache_sizes().items(), key=lambda item: item[1])
    found = []
    for i, (name, fast) in enumerate(caches):
        beyond = caches[i + 1][1] // 2 if i + 1 < len(caches) else 4 * fast
        found.append((name, fast, bytes_per_second(beyond)))
    return found
