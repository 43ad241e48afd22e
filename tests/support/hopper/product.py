"""The `hopper` backend's kernels in the simulator."""
from support.hopper.hopper_language import tma_reduce_add
from support.hopper.language import named_barrier
from support.hopper.launch import launch
from support.hopper.translate import simulate
from tilewise.backends.gpu_math.entry import entry, flatten
from tilewise.backends.hopper import gluon_names

simulate(gluon_names.named_barrier, named_barrier)
simulate(gluon_names.tma_add, tma_reduce_add)
simulate(gluon_names.reinterpret, lambda tile, dtype, shape, layout: tile._reinterpret(dtype, shape, layout))


def simulated(kernel, problem, programs, values, warps, seed=0):
    """Runs what `launch.start` is given, under the schedule of `seed`; returns entry point, arguments and report."""
    point, flat = entry(kernel, problem.program), flatten(kernel, problem.program, values)
    return point, flat, launch(point, (programs,), num_warps=warps, seed=seed, **flat)
