"""Read NVIDIA machine code (SASS): what ptxas has to say, the hot loops and the instructions in them.

ptxas and cuobjdump come with Triton's wheel; no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

# Which hardware unit executes an opcode (the part before the first dot). Others: "TMA", "UNIFORM", "OTHER".
_OPCODES = {
    "MMA": "HGMMA QGMMA IGMMA HMMA IMMA UTCHMMA UTCQMMA UTCMMA",
    "MUFU": "MUFU",
    "FMA": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2 IMAD",
    "ALU": "FMNMX FMNMX3 FSETP FSEL FSET FCHK ISETP SEL LOP3 IADD3 SHF PRMT VIADD LEA MOV IMNMX VIMNMX PLOP3 P2R R2P",
    "CONVERT": "F2FP F2F I2F F2I I2FP",
    "SHARED": "LDS LDSM STS STSM SHFL ATOMS REDS",
    "GLOBAL": "LDG STG LDGSTS ATOMG RED REDG LD ST",
    "SPILL": "LDL STL",
    "SYNC": "BAR SYNCS WARPSYNC WARPGROUP FENCE DEPBAR LDGDEPBAR MEMBAR ERRBAR ELECT USETMAXREG "
    "UCGABAR_ARV UCGABAR_WAIT",
    "CONTROL": "BRA EXIT BSSY BSYNC CALL RET NOP BREAK BMOV JMP BRX",
    "UNIFORM": "R2UR S2UR S2R",
}
_UNITS = {opcode: unit for unit, opcodes in _OPCODES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # "@P0 FMUL R1, R2, R3"

    @cached_property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split(" ")[0]

    @cached_property
    def unit(self) -> str:
        base = self.opcode.split(".")[0]
        if base in _UNITS:
            return _UNITS[base]
        if base.startswith(("UTMA", "UBLKCP", "UBLKRED")):
            return "TMA"
        return "UNIFORM" if base.startswith("U") else "OTHER"

    @cached_property
    def backward_target(self) -> int | None:
        """Where a branch to an earlier address goes."""
        match = re.search(r"0x([0-9a-f]+)\s*$", self.text) if self.opcode.split(".")[0] == "BRA" else None
        return int(match[1], 16) if match and int(match[1], 16) < self.address else None

    @cached_property
    def outstanding(self) -> int | None:
        """How many groups of asynchronous wgmma a wait for them leaves running; None: no such wait."""
        match = re.search(r"0x([0-9a-f]+)$", self.text) if self.opcode.startswith("WARPGROUP.DEPBAR") else None
        return int(match[1], 16) if match else None


@dataclass(frozen=True)
class Loop:
    body: tuple[Instruction, ...]

    @cached_property
    def units(self) -> Counter[str]:
        """Instructions per hardware unit."""
        return Counter(i.unit for i in self.body)

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(i.opcode for i in self.body)

    @cached_property
    def overlap(self) -> tuple[int, int] | None:
        """(early, all) exponentials, the early ones issued while the tensor cores still work: after a wait that leaves
        groups of wgmma running, before the next wait for all.

        That is how softmax overlaps with matrix products inside a warpgroup (Shah et al. 2024, section 3.2). None: the loop
        has no exponentials, or does not wait in these two ways.
        """
        total = self.opcodes["MUFU.EX2"]
        waits = [i.outstanding for i in self.body if i.outstanding is not None]
        if not total or 0 not in waits or not any(waits):
            return None
        early, running = 0, waits[-1] > 0
        for i in self.body:
            if i.outstanding is not None:
                running = i.outstanding > 0
            elif i.opcode == "MUFU.EX2":
                early += running
        return early, total

    @property
    def spills(self) -> int:
        """Instructions that move a register to local memory or back, in each turn."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(("LDL", "STL")))

    def encloses(self, other: Loop) -> bool:
        return self is not other and self.body[0].address <= other.body[0].address and (
            other.body[-1].address <= self.body[-1].address
        )


@dataclass(frozen=True)
class PtxasLog:
    registers: int
    spilled_bytes: int
    warnings: tuple[str, ...]  # "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized ..."


def disassemble(cubin: bytes) -> tuple[Instruction, ...]:
    """The instructions of a cubin, in order of address."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = _run(knobs.nvidia.cuobjdump.path, "-sass", str(path))
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing, re.MULTILINE)
    return tuple(Instruction(int(address, 16), re.sub(r"\s+", " ", text).split(" &")[0].split(" ?")[0])
                 for address, text in lines)


def hot_loops(code: tuple[Instruction, ...]) -> tuple[Loop, ...]:
    """Innermost loops that use the tensor cores or TMA, or else (fp32 kernels) the innermost with the most arithmetic.

    A loop is a backward branch. Spin-wait blocks moved behind the kernel's end branch backwards over its EXIT: they
    are no loops.
    """
    ends: dict[int, int] = {}
    for instruction in code:
        if (start := instruction.backward_target) is not None:
            ends[start] = max(ends.get(start, 0), instruction.address)
    loops = [Loop(tuple(i for i in code if start <= i.address <= end)) for start, end in sorted(ends.items())]
    loops = [loop for loop in loops if not any(i.opcode.startswith("EXIT") for i in loop.body)]
    hot = [loop for loop in loops if loop.units["MMA"] or loop.units["TMA"]]
    if not hot:
        hot = sorted((loop for loop in loops if loop.units["FMA"]), key=lambda loop: -loop.units["FMA"])[:1]
    return tuple(loop for loop in hot if not any(loop.encloses(other) for other in hot))


def least_overlap(loops: Iterable[Loop]) -> tuple[int, int] | None:
    """The `Loop.overlap` with the smallest share of early exponentials."""
    overlaps = [loop.overlap for loop in loops if loop.overlap]
    return min(overlaps, key=lambda overlap: overlap[0] / overlap[1], default=None)


def ptxas_log(ptx: str, capability: int, options: Any = None) -> PtxasLog:
    """ptxas's statistics and warnings, from running it again: Triton hides both.

    capability: 90 for sm_90. options: the compiled kernel's metadata; its ptxas options are repeated.
    """
    flags = (getattr(options, "ptx_options", None) or "").split()
    flags += [] if getattr(options, "enable_fp_fusion", True) else ["--fmad=false"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        log = _run(get_ptxas(capability).path, "-v", *flags, f"--gpu-name={sm_arch_from_capability(capability)}",
                   str(path), "-o", str(path.with_suffix(".cubin")))
    return PtxasLog(
        registers=max(map(int, re.findall(r"Used (\d+) registers", log))),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        warnings=tuple(sorted(set(re.findall(r"\(C\d+\)[^\n]*", log)))),
    )


def _run(*command: str) -> str:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed ({finished.returncode}): {finished.stderr.strip()}")
    return finished.stdout + finished.stderr
