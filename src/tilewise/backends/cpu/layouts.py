"""How tensors lie in memory, read by one native call; in Python it takes longer than a tiny attention."""
from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable

from torch import Tensor

from tilewise.backends.cpu import compiler

Reader = Callable[[Tensor, Tensor, Tensor], bytes]

log = logging.getLogger("tilewise")


def reader(alignment: int) -> Reader | None:
    """A function of q, k and v, whose bytes are equal where their shapes, strides, dtypes, devices and addresses modulo
    `alignment` bytes are.

    It raises BufferError or RuntimeError of tensors that have no strides. None without a compiler, or where PyTorch (before
    2.10) does not offer DLPack's C exchange.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or not compiler.compiler():
        return None
    try:
        handle = compiler.library("layouts")._handle
    except (OSError, RuntimeError) as error:
        log.info("%s", error)
        return None
    library = ctypes.PyDLL(None, handle=handle)     # called under Python's lock
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    library.layouts_begin.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
    make_bytes = ctypes.cast(ctypes.pythonapi.PyBytes_FromStringAndSize, ctypes.c_void_p)
    if not library.layouts_begin(pointer(capsule, b"dlpack_exchange_api"), make_bytes, alignment):
        return None
    read = library.layouts
    read.restype, read.argtypes = ctypes.py_object, [ctypes.py_object] * 3
    return read
