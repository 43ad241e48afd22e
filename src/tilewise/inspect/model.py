"""How fast could a Hopper kernel be? Busy cycles of a multiprocessor's units, counted in the machine code.

A model, not a measurement. In one trip of a loop every unit is busy for some cycles; the busiest one bounds the speed.
Waits, latency, memory, the producer's instructions, loads from global memory, shuffles and lower clocks under a power limit
are left out; instructions that a branch may skip are counted. It ranks variants and shows bad machine code.

Rates per multiprocessor and cycle: CUDA C++ Programming Guide, table of arithmetic throughput, compute capability 9.0; tensor
cores: H100 architecture whitepaper, 989 TFLOP/s of dense bf16 with 132 multiprocessors at 1.83 GHz.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.table import Table
from triton.compiler import CompiledKernel

from tilewise.inspect.build import KernelCase
from tilewise.inspect.sass import Instruction, Loop, disassemble, hot_loops, least_overlap

MULTIPROCESSORS = 132
CLOCK = 1.98e9  # Hz, the highest of an H100 or H200 SXM

SCHEDULERS = 4  # each issues one instruction of a warp per cycle
SHARED_BYTES = 128  # per cycle, read or written
LANES = {"MUFU": 16, "FMA": 128, "ALU": 64, "CONVERT": 64}  # threads per cycle; IMAD is counted as FMA
UNITS = ("tensor", "shared", "issue", *LANES)

WARPGROUP = 128  # threads
KEYS = "k_desc", "v_desc"
STREAMED = {"forward": KEYS, "dq": KEYS, "backward": ("q_desc", "do_desc")}  # a tile of each comes in a trip, by TMA
REDUCED = "dq_desc"  # a tile of it leaves in a trip of a loop that has UTMAREDG


@dataclass(frozen=True)
class Trip:
    """One trip of a loop by all warpgroups of a CTA that multiply."""

    loops: tuple[Loop, ...]  # one for each partition, which has its own copy
    cycles: dict[str, float]  # unit -> how long it is busy
    flops: float  # of the matrix products that are issued, hidden scores and repeated products included

    @property
    def busiest(self) -> str:
        return max(self.cycles, key=lambda unit: self.cycles[unit])

    @property
    def ceiling(self) -> float:
        """FLOP/s of the GPU if the busiest unit never waited."""
        return self.flops / self.cycles[self.busiest] * MULTIPROCESSORS * CLOCK


def trips(compiled: CompiledKernel, case: KernelCase) -> list[Trip]:
    """The loops of a warp-specialised kernel that multiply, in order of address: of partial tiles, then of whole ones.

    The partitions that multiply have case.num_warps each; one warpgroup, the last, holds the producer.
    """
    multiplying = max(case.num_warps, compiled.metadata.num_warps - 4)
    loops = [loop for loop in hot_loops(disassemble(compiled.asm["cubin"])) if loop.units["MMA"]]
    kinds = len(loops) * case.num_warps // multiplying  # all kinds of one partition come before those of the next
    return [trip(loops[kind::kinds], case) for kind in range(kinds)]


def trip(copies: Iterable[Loop], case: KernelCase) -> Trip:
    """What a trip costs when each of `copies` is executed by case.num_warps warps."""
    loops = tuple(copies)
    warpgroups = case.num_warps / 4
    body = [instruction for loop in loops for instruction in loop.body]
    units = {unit: sum(i.unit == unit for i in body) * warpgroups * WARPGROUP / lanes for unit, lanes in LANES.items()}
    names = STREAMED[case.direction] + ((REDUCED,) if any(i.opcode.startswith("UTMAREDG") for i in body) else ())
    traffic = warpgroups * sum(map(shared_bytes, body)) + sum(block_bytes(case.signature[name]) for name in names)
    cycles = {
        "tensor": warpgroups * sum(map(tensor_cycles, body)),
        "shared": traffic / SHARED_BYTES,
        "issue": warpgroups * 4 * len(body) / SCHEDULERS,
    }
    return Trip(loops, cycles | units, warpgroups * sum(2 * math.prod(shape(i)) for i in body))


def shape(instruction: Instruction) -> tuple[int, int, int]:
    """(m, n, k) of a wgmma, else zeros."""
    match = re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode)
    return (int(match[1]), int(match[2]), int(match[3])) if match else (0, 0, 0)


def tensor_cycles(instruction: Instruction) -> float:
    """N / 2 for m64nNk16: 64 x N x 16 multiply-adds, of which the tensor cores do 2048 of 16 bits per cycle. Other types have
    a k of 32 bytes, too, and take as long."""
    return shape(instruction)[1] / 2


def shared_bytes(instruction: Instruction) -> int:
    """Shared memory that a warpgroup reads or writes: operands of wgmma (32 bytes of each row of A, unless it is in registers,
    and each column of B), loads and stores (a little too much where lanes share a word)."""
    m, n, _ = shape(instruction)
    if n:
        a_in_registers = instruction.text.partition(", ")[2].startswith("R")
        return 32 * (n if a_in_registers else m + n)
    if instruction.opcode.startswith(("LDS", "STS")):
        width = re.search(r"\.(128|64|4$|2$)", instruction.opcode)  # bits, or matrices of LDSM and STSM
        return WARPGROUP * ({"128": 16, "4": 16, "64": 8, "2": 8}[width[1]] if width else 4)
    return 0


def block_bytes(kind: str) -> int:
    """Of a descriptor's block: "tensordesc<bf16[1, 1, 128, 64],...>" -> 16384."""
    match = re.match(r"tensordesc<[a-z]+(\d+)\w*\[([\d, ]+)\]", kind)
    if match is None:
        raise ValueError(f"expected the type of a TMA descriptor, got {kind!r}")
    return int(match[1]) // 8 * math.prod(map(int, match[2].split(",")))


def table(modelled: Iterable[tuple[KernelCase, Trip]]) -> Table:
    """The model for reading. length: instructions of a warpgroup in a trip. overlap: see `Loop.overlap`."""
    result = Table("kernel", "length", "overlap", *UNITS, "busiest", "ceiling",
                   title="Model, not a measurement: busy cycles per loop trip of a CTA and SM, and the ceiling in TFLOP/s\n"
                         f"at {CLOCK / 1e9:.2f} GHz with {MULTIPROCESSORS} SMs")
    for column in result.columns[1:]:
        column.justify = "right"
    for case, one in modelled:
        result.add_row(*cells(case, one))
    return result


def cells(case: KernelCase, one: Trip) -> Iterator[str]:
    """A row of the table."""
    yield case.name
    yield str(max(len(loop.body) for loop in one.loops))
    yield " of ".join(map(str, least_overlap(one.loops) or ()))
    yield from (f"{one.cycles[unit]:.0f}" for unit in UNITS)
    yield one.busiest
    yield f"{one.ceiling / 1e12:.0f}"
