"""Gluon under one set of names, for Triton 3.6 to 3.9, and what 3.6 lacks: named barriers and adding by TMA."""
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# 3.9 renamed these two; its old names raise.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait         # until the source may be written to again
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier      # renamed by 3.7


@builtin
def tma_add(desc, coord, src, _semantic=None):
    """Adds a tile in shared memory to global memory (3.9: `tma.async_atomic_add`; 3.6 has it only in its builder)."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@builtin
def reinterpret(tile, dtype, shape, layout, _semantic=None):
    """A tile in shared memory as one of another shape or layout (3.9 made it public)."""
    method = getattr(tile, "reinterpret", None) or tile._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


FIRST_BARRIER = gl.constexpr(8)         # Triton itself has been seen to use named barriers 0 to 3


@gluon.constexpr_function
def _barrier(operation, number, threads):
    return f"bar.{operation} {number}, {threads}; mov.b32 $0, $1;"


@gluon.jit
def named_barrier(OPERATION: gl.constexpr, NUMBER: gl.constexpr, THREADS: gl.constexpr, token):
    """bar.sync or bar.arrive on a named barrier. token: an int32 scalar that chains calls, to keep their order."""
    return gl.inline_asm_elementwise(_barrier(OPERATION, NUMBER, THREADS), "=r,r", [token], dtype=gl.int32, is_pure=False,
                                     pack=1)
