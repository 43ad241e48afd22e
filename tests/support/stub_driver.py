"""Triton without a GPU up to the launch itself: a driver that stands in for CUDA's, and a compiler that compiles nothing.

All that runs on the host before a launch is Triton's own: binding, specialization, the look-up of compiled kernels, the call of
a compiled one. Needs a process in which kernels are not interpreted.
"""
import contextlib
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from tilewise.backends.gpu_math.entry import entry


class Launched(NamedTuple):
    """What the driver's launch was called with."""
    kernel: "Compiled"
    grid: tuple[int, int, int]
    stream: int
    arguments: dict[str, Any]           # by name; pointers as given

    @property
    def name(self):
        return self.kernel.name.removesuffix("_entry")


class Compiled(CompiledKernel):
    """A kernel of which only the signature is known. aligned: pointers and numbers that are taken for multiples of 16."""

    def __init__(self, src, launches):
        names = src.fn.arg_names
        self.name, self.src, self.module, self.function, self.packed_metadata = src.fn.fn.__name__, src, object(), 7, ()
        self.aligned = {names[path[0]] for path, attributes in src.attrs.items() if attributes}
        self.pointers = {name for name, kind in src.signature.items() if str(kind).startswith("*")}

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
            assert function == self.function
            launches.append(Launched(self, (x, y, z), stream, dict(zip(names, arguments, strict=True))))

        self._run = run

    def __del__(self):
        """Nothing was loaded."""


class Driver:
    """One GPU; `stream` is the current one."""
    stream = 0

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def launches(monkeypatch):
    """A list that grows with each launch. CPU tensors pass for tensors of the GPU."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(triton.compiler, "compile", lambda src, **_options: Compiled(src, made))
        patch.setattr("tilewise.backends.triton.interpreting", lambda: True)
        triton.runtime.driver.set_active(Driver())
        entry.cache_clear()             # entry points keep what is compiled of them
        try:
            yield made
        finally:
            entry.cache_clear()
            triton.runtime.driver._active = None
