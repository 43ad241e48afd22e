"""What a compiled kernel costs, and whether it may ship."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from triton.compiler import CompiledKernel

from tilewise.inspect.build import KernelCase
from tilewise.inspect.sass import Loop, disassemble, hot_loops, least_overlap, ptxas_log

# Shared memory one block may use, in bytes. Compilation does not check it; a launch would fail.
SHARED_MEMORY = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}

_TENSOR_INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\b",
    "mfma": r"\bv_mfma_",
}


@dataclass(frozen=True)
class Report:
    arch: str
    warps: int
    registers: int  # per thread; AMD: VGPRs and AGPRs together
    spills: int  # bytes per thread; AMD: registers
    shared_memory: int  # bytes per block
    tensor_instructions: dict[str, int]  # static counts in the assembly: {"wgmma": 16}
    warnings: tuple[str, ...] = ()  # ptxas's
    loops: tuple[Loop, ...] = field(default=(), repr=False)  # hot loops, NVIDIA only
    setmaxnreg: bool = False  # partitions share out the registers among themselves

    @property
    def shared_memory_limit(self) -> int:
        return SHARED_MEMORY[self.arch]

    @property
    def hot_loop(self) -> Loop | None:
        """The longest hot loop."""
        return max(self.loops, key=lambda loop: len(loop.body), default=None)

    @property
    def overlap(self) -> tuple[int, int] | None:
        """(early, all) exponentials of the hot loop that overlaps least; see `Loop.overlap`."""
        return least_overlap(self.loops)


def examine(compiled: CompiledKernel, case: KernelCase) -> Report:
    """Read the machine code of `build(case)`."""
    metadata = compiled.metadata
    amd = metadata.target.backend == "hip"
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in _TENSOR_INSTRUCTIONS.items()}
    tensor = {name: count for name, count in counts.items() if count}
    if amd:
        registers, spills = (_amd_field(assembly, name) for name in ("vgpr_count", "vgpr_spill_count"))
        return Report(case.arch, metadata.num_warps, registers, spills, metadata.shared, tensor)
    log = ptxas_log(assembly, metadata.target.arch, metadata)
    code = disassemble(compiled.asm["cubin"])
    return Report(case.arch, metadata.num_warps, log.registers, log.spilled_bytes, metadata.shared, tensor,
                  log.warnings, hot_loops(code), any(i.opcode.startswith("USETMAXREG") for i in code))


def failures(report: Report, case: KernelCase) -> list[str]:
    """Why the kernel must not ship; empty when it may.

    On sm_90 a forward of at least 64 rows must use wgmma; where tiles have fewer, as in a backward, mma.sync will do.
    A kernel with more warps than its first partition is warp-specialised: it must share out registers, and compute a
    quarter of the exponentials of each loop under matrix products. It may spill outside its main loop, the one
    of whole tiles: its partitions begin with more values than registers, and such a one costs a few cycles once.
    """
    found = []
    specialised = report.warps > case.num_warps
    products = [loop for loop in report.loops if any(opcode.startswith(("HGMMA", "QGMMA")) for opcode in loop.opcodes)]
    in_loop = min((loop.spills for loop in products), default=0)
    if report.spills and (in_loop or not specialised):
        where = f", {in_loop} times in each turn of its main loop" if specialised else ""
        found.append(f"spills {report.spills} {'registers' if report.arch.startswith('gfx') else 'bytes'}{where}")
    if report.shared_memory > report.shared_memory_limit:
        found.append(f"shared memory {report.shared_memory} over the limit {report.shared_memory_limit}")
    if case.tensor_cores and not report.tensor_instructions:
        found.append("no tensor-core instructions")
    elif case.tensor_cores and report.arch == "sm_90" and "wgmma" not in report.tensor_instructions and (
            case.direction == "forward" and case.constants.get("BLOCK_M", 64) >= 64):
        found.append("mma.sync instead of wgmma")
    if any("serialized" in warning for warning in report.warnings):
        found.append("wgmma serialized by ptxas")
    if specialised:
        if not report.setmaxnreg:
            found.append("partitions without setmaxnreg")
        if report.overlap and report.overlap[0] < report.overlap[1] / 4:
            found.append("only {} of {} exponentials overlap with wgmma".format(*report.overlap))
    return found


def _amd_field(assembly: str, name: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", assembly)
    if match is None:
        raise ValueError(f"the assembly has no .{name}")
    return int(match[1])
