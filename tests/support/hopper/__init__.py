"""Runs warp-specialised Gluon kernels for Hopper on the CPU, under adversarial schedules, and finds synchronisation errors.

    launch(kernel, grid, *args, num_warps=4, seed=0, **constexprs)      raises Fault; results are in the tensors
    simulate(builtin, function)                                         registers what stands for a builtin
    simulate_assembly(pattern, function)                                or for an instruction of inline assembly
    for mutant in mutants(kernel): launch(mutant, ...)                  kernels with a planted bug

Kernels run as Python (`translate.py`), each partition a thread of which one runs at a time (`machine.py`). TMA and wgmma
happen at any legal moment; what orders two accesses is known from vector clocks (`clocks.py`), not from what happened to come
first.

Not modelled: layouts, bank conflicts, registers, time, clusters and multicast; the threads of a partition, except where global
memory is released by an atomic (`thread_barrier` needed before it); reuse of shared memory by the compiler.
"""
from support.hopper.clocks import Fault
from support.hopper.hopper_language import (
    arrive,
    expect,
    fence_async_shared,
    init,
    store_wait,
    tma_load,
    tma_reduce_add,
    tma_reduce_max,
    tma_reduce_min,
    tma_store,
    wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from support.hopper.language import barrier_arrive, barrier_sync, named_barrier, simulate_assembly, store_complete
from support.hopper.launch import Report, launch
from support.hopper.perturb import Mutant, mutants
from support.hopper.shared_memory import proxy_fence
from support.hopper.translate import simulate

__all__ = ["Fault", "Mutant", "Report", "arrive", "barrier_arrive", "barrier_sync", "expect", "fence_async_shared", "init",
           "launch", "mutants", "named_barrier", "proxy_fence", "simulate", "simulate_assembly", "store_complete",
           "store_wait", "tma_load", "tma_reduce_add", "tma_reduce_max", "tma_reduce_min", "tma_store", "wait",
           "warpgroup_mma", "warpgroup_mma_wait"]
