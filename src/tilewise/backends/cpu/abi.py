"""What a kernel is told: the C structs `Problem` and `Append`, declared once for Python and for C++."""
from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

POINTERS = ("q", "k", "v", "bias", "sinks", "rng", "q_rows", "k_rows", "pages", "k_scale", "v_scale", "list", "order", "out",
            "lse", "max_score", "entropy", "key_mass", "dout", "dlse", "delta", "dq", "dk", "dv", "dbias", "sums",
            "sums_strides", "sums_sizes", "captured", "ints", "floats", "parallel", "scratch", "q_tangent", "k_tangent",
            "v_tangent", "bias_tangent", "sinks_tangent", "out_tangent", "lse_tangent", "delta_tangent")
NUMBERS = ("batch", "heads", "kv_heads", "nq", "nk", "dim", "dim_v", "lse_rows", "page_size", "pages_row", "dropout", "cached",
           "q_kind", "k_kind", "bias_kind", "sinks_kind", "list_rows", "list_batch", "list_heads", "threads", "block_rows",
           "panels", "fold", "splits", "few_rows", "units_together", "parts", "span", "lists", "aligned", "bias_pattern",
           "dbias_kind", "key_mass_rows")
STRIDES = ("q_strides", "k_strides", "v_strides", "out_strides", "dout_strides", "dq_strides", "dk_strides", "dv_strides",
           "bias_strides", "dbias_strides", "q_tangent_strides", "k_tangent_strides", "v_tangent_strides",
           "bias_tangent_strides", "out_tangent_strides")
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3, torch.float8_e4m3fn: 4}   # rows.h: Kind

POINTER_TYPES = {"captured": "const void* const*", "ints": "const long*", "floats": "const double*"}


class Problem(ctypes.Structure):
    """Pointers are data pointers of tensors, or null; strides are in elements, of slot or page, head and row, of a bias of all
    four dimensions."""
    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_long) for name in NUMBERS),
                ("scale", ctypes.c_double), *((name, ctypes.c_long * 4) for name in STRIDES)]


class Append(ctypes.Structure):
    """New tokens and the cache they go into (append.cpp). Null: index: all in order; slots: as sequences; padding, room: none;
    held: no book of lengths; table: no pages; order: not wanted; cos, sin: nothing turns. Strides in bytes: slot, row, head."""
    POINTERS = ("k", "v", "k_new", "v_new", "lengths", "index", "held", "slots", "padding", "room", "table", "rows", "order",
                "pages", "scratch", "cos", "sin", "q", "turned")
    NUMBERS = ("batch", "count", "sequences", "slots_there", "slots_wide", "rows_each", "columns", "table_stride", "pages_row",
               "kv_heads", "bytes", "bytes_v", "writes", "extended", "foreign", "longest", "shortest", "kind", "heads",
               "queries", "positions", "pairs", "interleaved", "cos_stride", "sin_stride")
    STRIDES = ("k_strides", "v_strides", "k_new_strides", "v_new_strides", "q_strides", "turned_strides")
    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_long) for name in NUMBERS),
                *((name, ctypes.c_long * 3) for name in STRIDES)]


class Compiled(NamedTuple):
    """What a kernel is compiled for.

    stored: the kind of keys and values, -1 for any; paired: all that is multiplied is bf16.
    """
    stored: int = -1
    paired: bool = False


def header(compiled: Compiled) -> str:
    """The same in C++: problem.h."""
    lines = [f"  {POINTER_TYPES.get(name, 'void*')} {name};" for name in POINTERS]
    lines += [f"  long {name};" for name in NUMBERS] + ["  double scale;"] + [f"  long {name}[4];" for name in STRIDES]
    constants = f"constexpr int STORED = {compiled.stored};\nconstexpr bool PAIRED = {str(compiled.paired).lower()};\n"
    append = [f"  void* {name};" for name in Append.POINTERS] + [f"  long {name};" for name in Append.NUMBERS]
    append += [f"  long {name}[3];" for name in Append.STRIDES]
    structs = [f"struct {name} {{\n" + "\n".join(body) + "\n};\n" for name, body in (("Problem", lines), ("Append", append))]
    return "#pragma once\n" + "".join(structs) + constants
