"""Sizes of blocks, and which blocks a mask shows.

Notation is the paper's: N queries and keys are cut into Tr blocks of Br queries and Tc blocks of Bc keys.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tilewise.problem import Operands, Problem
from tilewise.trace.bounds import tile_classes
from tilewise.trace.evaluate import leaf_values, slot_values

SRAM_OF_A100 = 192 * 1024               # bytes of one multiprocessor, the M of the paper's experiments
LEAST_QUERIES, LEAST_KEYS = 16, 32      # of a kernel's block: rows of a tensor core's tile, columns of one draw of dropout


class Blocks(NamedTuple):
    """Queries and keys of a block."""
    Br: int
    Bc: int

    def grid(self, nq: int, nk: int) -> tuple[int, int]:
        """Tr and Tc (Algorithm 1, line 3)."""
        return -(-nq // self.Br), -(-nk // self.Bc)


def of_memory(M: int, d: int) -> Blocks:
    """Bc = ceil(M / 4d), Br = min(ceil(M / 4d), d) (Algorithm 1, line 1): a block of each of K, V, Q and O fits on chip.

    M: elements of fast memory; d: head dim.
    """
    Bc = -(-M // (4 * d))
    return Blocks(min(Bc, d), Bc)


def published(d: int) -> Blocks:
    """The blocks of the CUDA kernels that came with the paper (flash-attn 0.2, Ampere), for head dims up to 128; for wider ones
    here blocks of as many elements."""
    return Blocks(16, next(256 >> n for n, most in enumerate((64, 128, 256, 512)) if d <= most))


def of_kernels(blocks: Blocks) -> Blocks:
    """The largest blocks up to `blocks` that a Triton kernel can have: powers of two."""
    Br, Bc = (1 << n.bit_length() - 1 for n in blocks)
    return Blocks(max(Br, LEAST_QUERIES), max(Bc, LEAST_KEYS))


def in_registers(d: int, itemsize: int, major: int) -> tuple[Blocks, Blocks]:
    """(forward, backward) for Triton on GPUs of a major compute capability, without spills in 16 bits on sm_80 and sm_90.

    The published blocks; in the backward fewer keys, as Triton holds in registers what the CUDA kernels have in shared memory:
    all of K_j and V_j before sm_90, whose products take operands from registers alone. fp32: half the keys, at least 32.
    """
    Br, Bc = published(d)
    wide = itemsize // 2
    return of_kernels(Blocks(Br, Bc // wide)), of_kernels(Blocks(Br, min(64 if major == 9 else 32, Bc // 2) // wide))


def leaves(problem: Problem, x: Operands) -> dict[str, Any]:
    """Values of the leaves of a mask's graph, except the indices of queries and keys."""
    slots = slot_values(x.captured, x.ints, x.floats, problem.dtype)
    return leaf_values(slots, problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k, problem.device, problem.first)


def block_form(problem: Problem, x: Operands, blocks: Blocks) -> Tensor | None:
    """The M of Algorithm 5: EMPTY (0), PARTIAL (1) or FULL (2) for every block, uint8 [b, h, Tr, Tc]; None without a mask.

    b and h are 1 where the mask does not depend on the sequence or the head. The paper's M is of blocks that are kept whole or
    not at all; here any mask has one, and elements are looked at in PARTIAL blocks alone.
    """
    graphs, lengths = problem.graphs, (problem.seqlen_q, problem.seqlen_k)
    if graphs.mask is None:
        return None
    return tile_classes(graphs.mask, graphs.keys, leaves(problem, x), problem.batch, problem.heads, lengths,
                        (blocks.Br, blocks.Bc), problem.device).contiguous()
