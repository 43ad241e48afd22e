"""The `hopper` backend's kernels in the simulator."""
from types import SimpleNamespace

from support.hopper import launch as simulate_launch
from support.hopper.hopper_language import tma_reduce_add
from support.hopper.language import named_barrier
from support.hopper.translate import simulate
from tilewise import kv_cache
from tilewise.backends import hopper
from tilewise.backends.gpu_math.entry import entry, flatten
from tilewise.backends.hopper import decoding, gluon_names, launch, pieces


def piece(tile, desc, i, panel):
    """`pieces.piece`, where a tile's rows lie one behind another."""
    rows, columns = desc.block_shape[2:]
    return tile.panel_piece(i * rows, rows, panel * columns, columns)


simulate(pieces.piece, piece)
simulate(gluon_names.named_barrier, named_barrier)
simulate(gluon_names.tma_add, tma_reduce_add)
simulate(gluon_names.reinterpret, lambda tile, dtype, shape, layout: tile._reinterpret(dtype, shape, layout))
launch.multiprocessors = lambda device: 2       # so that programs of persistent kernels share the items


def simulated(kernel, problem, programs, values, warps, seed=0):
    """Runs what `launch.start` is given, under the schedule of `seed`; returns entry point, arguments and report."""
    point, flat = entry(kernel, problem.program), flatten(kernel, problem.program, values)
    return point, flat, simulate_launch(point, (programs,), num_warps=warps, seed=seed, **flat)


def install(monkeypatch):
    """The backend takes tensors on the CPU and runs its kernels in the simulator, under the schedule of `seed`. `launched`: the
    names of those that have run."""
    state = SimpleNamespace(seed=0, launched=[])

    def start(kernel, problem, programs, values, warps):
        simulated(kernel, problem, programs, values, warps, state.seed)
        state.launched.append(kernel.fn.__name__)

    def forward(problem, x):
        return (decoding if hopper.by_decoding(problem) else launch).forward(problem, x, start=start)

    def backward(*arguments):
        return launch.backward(*arguments, start=start)

    monkeypatch.setattr(hopper, "supports", hopper.unsupported)
    monkeypatch.setattr(hopper, "forward", forward)
    monkeypatch.setattr(hopper, "backward", backward)
    monkeypatch.setattr(hopper, "write", kv_cache.write)
    return state
