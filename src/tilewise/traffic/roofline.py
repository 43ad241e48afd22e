"""How long attention takes at least, and what bounds it: the model of a roofline with four roofs.

Products, exponentials, other arithmetic and slow memory have a unit each; all can work at the same time, so the time is that of
the busiest. A real kernel is slower: its units wait for each other. Bytes are between two numbers: every tensor moved once, as
if a cache held the rest, and every request to slow memory (`docs/traffic.md`). The lower one decides where a head's keys and
values fit into half of the last cache, the higher one elsewhere.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewise import costs
from tilewise.backends import cpu
from tilewise.costs import Blocks
from tilewise.devices import UNITS, Device, width_of
from tilewise.problem import Operands, Problem
from tilewise.traffic.kernels import Kernel, predicted, shipped, sizes


@dataclass(frozen=True)
class Estimate:
    """name: of the algorithm. seconds: of each unit by itself, in the order of `UNITS`. least, most: bytes; moved: those that
    decide."""
    name: str
    flops: int
    least: int
    most: int
    moved: int
    seconds: dict[str, float]

    @property
    def time(self) -> float:
        return max(self.seconds.values())

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda unit: self.seconds[unit])

    @property
    def intensity(self) -> float:
        """FLOPs of products per byte."""
        return self.flops / max(1, self.moved)


def timed(device: Device, width: str, name: str, work: tuple[int, int, int], least: int, most: int, moved: int) -> Estimate:
    return Estimate(name, work[0], least, most, moved, device.seconds(width, *work, moved))


def standard(problem: Problem, device: Device, backward: bool) -> Estimate:
    """Standard attention without mask kernels: every pass over the scores from and to slow memory."""
    s = sizes(problem)
    moved = costs.standard_forward(s)
    work = costs.standard_work(s)
    if backward:
        moved += costs.standard_backward(s)
        work += costs.Work(2 * work.products, 0, 4 * s.scores)          # four products; dP - sum, P *, and the sum
    return timed(device, width_of(problem.dtype, problem.precision), "standard", work, moved.total, moved.total, moved.total)


def tilewise(problem: Problem, x: Operands, device: Device, backward: bool, splits: int = 1) -> Estimate:
    """The Triton kernels in the tiles shipped for the device's architecture; on a CPU in its backend's tiles.

    Raises ValueError where none is shipped, NotImplementedError for what has no closed form.
    """
    if device.name == "cpu":
        tiles = Blocks(*cpu.tile_sizes(problem))
        found = predicted(problem, x, tiles, backward, splits)
        work = work_of(predicted(problem, x, tiles, False, splits))
        if backward:        # one kernel, with five products of each tile, where the two for GPUs have seven
            work += costs.Work(5 * work.products // 2, work.exponentials, work_of(found).arithmetic - work.arithmetic)
    else:
        found = shipped(problem, x, device.arch, backward, splits)
        work = work_of(found)
    s = sizes(problem)
    most = sum(kernel.bytes for kernel in found)
    parts = sum(n for kernel in found for table in (kernel.read, kernel.written) for name, n in table.items()
                if name in ("parts", "part_lse"))
    least = costs.least_forward(s) + (costs.least_backward(s) if backward else 0) + parts
    cached = (s.k + s.v) // max(1, s.batch * s.kv_heads) <= device.l2 // 2
    least = min(least, most)
    return timed(device, width_of(problem.dtype, problem.precision), "Tilewise", work, least, most, least if cached else most)


def work_of(kernels: Sequence[Kernel]) -> costs.Work:
    return costs.Work(*(sum(getattr(kernel, unit) or 0 for kernel in kernels) for unit in UNITS[:3]))
