"""Repairs for Triton's interpreter, without which it cannot be trusted with attention kernels.

TRITON_INTERPRET=1 runs kernels on the CPU, one program after another, in numpy. As of Triton 3.6 with numpy 2.4 it has
faults, several of which give wrong numbers without an error. Each function below repairs one and says which.

    TRITON_INTERPRET=1 python ...      # read when a kernel is decorated: set it for the process, never in Python
    from tilewise.inspect.interpreter import install
    install()                          # once, before the first kernel runs

After `install` the interpreter stays patched for the rest of the process. Still missing: libdevice, inline assembly,
@triton.autotune, bf16 atomics. Still unlike a GPU: loads that are masked off without `other` give 0, not garbage; the
order of sums; bf16 reductions round once at the end.
"""

import math
import os
from functools import cache
from types import SimpleNamespace

import numpy as np
import triton
import triton.language as tl
from triton._utils import type_canonicalisation_dict
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.jit import _normalize_ty

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle  # a numpy array (`data`) and its Triton scalar type (`dtype`)

# What the repairs replace or rely on; a Triton without one of these needs this file reviewed.
INTERNALS = {
    interpreter: "_convert_float _implicit_cvt _patch_lang _LangPatchScope _get_np_dtype GridExecutor ReduceOps _ir",
    Builder: "binary_op unary_op cast_impl create_fma create_dot create_umulhi create_clampf create_minnumf "
    "create_maxnumf create_minimumf create_maximumf get_all_ones_value get_int32 get_uint32 get_fp32",
    interpreter.ReduceOps: "apply_impl min_max unravel to_tensor",
    interpreter.GridExecutor: "__call__",
    interpreter._ir.INPUT_PRECISION: "IEEE TF32 TF32x3",
    TritonSemantic: "binary_op_sanitize_overflow_impl",
    tl.core: "_unwrap_shape validate_block_shape",
    tl.standard: "_elementwise_max _elementwise_min",
}


def install():
    """Apply every repair, once. Raises RuntimeError outside interpreter mode or on a Triton with other internals."""
    if not INTERPRETING:
        raise RuntimeError("set TRITON_INTERPRET=1 for the whole process: kernels read it when they are decorated")
    missing = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, names in INTERNALS.items()
               for name in names.split() if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(f"Triton {triton.__version__} lacks {', '.join(missing)}: review {__file__}")
    if getattr(Builder, "repaired", False):
        return
    for repair in (repeated_patching, shapes, bf16_casts, bf16_arithmetic, dot, reductions,
                   minimum_and_maximum, integer_constants, overflow_checks, umulhi, loops, scalar_arguments,
                   floating_point_warnings):
        repair()
    Builder.repaired = True


def repeated_patching():
    """Slow: every call of a device function, tl.max and tl.zeros included, patches all of triton.language again.

    Here: patched once, for good. (Stock restores only what the outermost launch patched.)
    """
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


def shapes():
    """Slow: every value wraps the numbers of its shape anew; with shapes shared, loops run 1.6 times faster."""
    def tensor_init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = wrapped_shape(tuple(type.shape) if type.is_block() else ())

    def block_type_init(self, element_ty, shape):
        shape = tuple(tl.core._unwrap_shape(shape))
        if not shape:
            raise TypeError("0d block_type is forbidden")
        self.element_ty, self.name = element_ty, f"<{shape}, {element_ty}>"
        self.shape, self.numel = valid_shape(shape)

    @cache
    def wrapped_shape(shape):
        return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))

    @cache
    def valid_shape(shape):
        return tl.tuple(shape), tl.core.validate_block_shape(shape)

    tl.tensor.__init__, tl.block_type.__init__ = tensor_init, block_type_init


# --- bf16: stock keeps it as uint16 bit patterns and mostly computes with those ---------------------------------------


def widened(bits):
    """bf16 bit patterns (uint16) as fp32 values."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(values):
    """fp32 values as bf16 bit patterns, to nearest even, as the GPU rounds."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def is_bf16(handle):
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def widen(handle):
    """A bf16 handle as fp32; any other unchanged."""
    return Handle(widened(handle.data), tl.float32) if is_bf16(handle) else handle


def narrow(handle):
    """A handle of any type as bf16; fp64 is rounded twice, by way of fp32."""
    return Handle(rounded(np.asarray(handle.data).astype(np.float32)), tl.bfloat16)


def bf16_casts():
    """Wrong: fp32 to bf16 truncates, other types to bf16 give bits that mean nothing. Missing: bf16 constants."""
    convert_float, cast_impl = interpreter._convert_float, Builder.cast_impl

    def convert(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(data)
        if (source, target) == (tl.float32, tl.bfloat16) and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return rounded(data)
        return convert_float(data, source, target, rounding)

    def cast(self, source, target):
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return narrow(source)
        return cast_impl(self, source, target)

    interpreter._convert_float, Builder.cast_impl = convert, cast
    Builder.get_bf16 = lambda self, value: narrow(self.get_fp32(value))


def bf16_arithmetic():
    """Wrong: + - * / % min max and comparisons of bf16 work on the bit patterns. Here: in fp32, rounded once."""
    binary_op, unary_op, create_fma = Builder.binary_op, Builder.unary_op, Builder.create_fma

    def binary(self, lhs, rhs, op):
        if not is_bf16(lhs):
            return binary_op(self, lhs, rhs, op)
        result = binary_op(self, widen(lhs), widen(rhs), op)
        return result if result.data.dtype == bool else narrow(result)

    def unary(self, arg, op):
        return narrow(unary_op(self, widen(arg), op)) if is_bf16(arg) else unary_op(self, arg, op)

    def fma(self, x, y, z):
        return narrow(create_fma(self, widen(x), widen(y), widen(z))) if is_bf16(z) else create_fma(self, x, y, z)

    Builder.binary_op, Builder.unary_op, Builder.create_fma = binary, unary, fma


# --- products, reductions ---------------------------------------------------------------------------------------------


def truncated_to_tf32(values):
    """fp32 with the low 13 mantissa bits dropped."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def rounded_to_tf32(values):
    """fp32 rounded to 10 mantissa bits, to nearest, ties away from zero: cvt.rna.tf32.f32. NaN and inf stay."""
    nearest = truncated_to_tf32((values.view(np.uint32) + np.uint32(0x1000)).view(np.float32))
    return np.where(np.isfinite(values), nearest, values)


def dot():
    """Wrong: bf16 products multiply bit patterns; fp32 ignores input_precision, whose default is tf32.

    Here: fp16 and bf16 operands are exact in fp32, accumulation is fp32 whatever the output. fp32 operands:
    "ieee"    fused multiply-adds along the inner dimension in order, as Triton emits them: a product and its transpose
              have the same bits, on which a backward pass that recomputes scores relies
    "tf32"    truncated to tf32. Triton 3.6 emits no cvt.rna before mma.sync or wgmma (seen in the PTX for sm_80 and
              sm_90), and the tensor cores ignore the low 13 bits: towards zero is what the hardware does
    "tf32x3"  the three products big*small + small*big + big*big, big and small rounded as by the cvt.rna in its PTX
    """
    create_dot, precisions = Builder.create_dot, interpreter._ir.INPUT_PRECISION

    def accumulated(a, b, total, precision):
        if precision == precisions.TF32:
            return total + truncated_to_tf32(a) @ truncated_to_tf32(b)
        if precision == precisions.TF32x3:
            (a_big, a_small), (b_big, b_small) = map(split, (a, b))
            small = a_small @ b_big + a_big @ b_small
            return total + (np.where(np.isnan(small), 0, small) + a_big @ b_big)
        for i in range(a.shape[-1]):
            exact = a[..., :, i, None].astype(np.float64) * b[..., i, None, :]
            total = (total + exact).astype(np.float32)
        return total

    def split(values):
        big = rounded_to_tf32(values)
        return big, rounded_to_tf32(values - big)

    def new_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if not {a.dtype.scalar, b.dtype.scalar} <= {tl.float16, tl.bfloat16, tl.float32}:
            return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        full = a.dtype.scalar == tl.float32
        a, b, d_wide = (np.asarray(widen(x).data, np.float32) for x in (a, b, d))
        total = accumulated(a, b, d_wide, input_precision) if full else a @ b + d_wide
        if is_bf16(d):
            return Handle(rounded(total), tl.bfloat16)
        return Handle(total.astype(d.data.dtype), d.dtype.scalar)

    Builder.create_dot = new_dot


def reductions():
    """Wrong: bf16 reduces bit patterns. Noisy: tl.max of NaNs warns. Slow: own combine functions run per element.

    Here: bf16 in fp32; tl.max and tl.min skip NaN quietly; own functions combine neighbouring halves, all rows at once.
    """
    apply_impl = interpreter.ReduceOps.apply_impl

    def apply(self, inputs):
        bf16 = [is_bf16(x.handle) for x in inputs]
        inputs = tuple(tensor(widen(x.handle), x.shape) for x in inputs)
        results = reduce(self, inputs)
        results = results if isinstance(results, (tuple, list)) else (results,)
        return [tensor(narrow(x.handle), x.shape) if b else x for x, b in zip(results, bf16, strict=True)]

    def reduce(self, inputs):
        if self.combine_fn == tl.standard._elementwise_max:
            return self.min_max(inputs[0], np.fmax.reduce)
        if self.combine_fn == tl.standard._elementwise_min:
            return self.min_max(inputs[0], np.fmin.reduce)
        return apply_impl(self, inputs)

    def generic_reduce(self, inputs):
        kinds, rank = [x.dtype for x in inputs], len(inputs[0].shape)
        flat, axis = self.unravel(inputs, self.axis)
        data = [np.moveaxis(x.handle.data, axis, 0) for x in flat]
        while len(data[0]) > 1:
            halves = [self.to_tensor(x[i::2], kind) for i in (0, 1) for x, kind in zip(data, kinds, strict=True)]
            combined = self.combine_fn(*halves)
            combined = combined if isinstance(combined, tuple) else (combined,)
            shape = (len(data[0]) // 2, *data[0].shape[1:])
            data = [np.broadcast_to(x.handle.data, shape) for x in combined]
        data = [x[0] for x in data]
        if self.keep_dims:
            data = [np.expand_dims(x, tuple(range(rank)) if self.axis is None else axis) for x in data]
        return [self.to_tensor(x, kind) for x, kind in zip(data, kinds, strict=True)]

    interpreter.ReduceOps.apply_impl, interpreter.ReduceOps.generic_reduce = apply, generic_reduce


def minimum_and_maximum():
    """Wrong: tl.minimum, tl.maximum and tl.clamp return NaN if one operand is; by default a GPU returns the other."""
    Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)

    def clamp(self, arg, low, high, propagate_nan):
        if propagate_nan == interpreter._ir.PROPAGATE_NAN.ALL:
            return self.create_minimumf(self.create_maximumf(arg, low), high)
        return self.create_minnumf(self.create_maxnumf(arg, low), high)

    Builder.create_clampf = clamp


# --- integers, loops, arguments ---------------------------------------------------------------------------------------


def integer_constants():
    """Fails with numpy 2: ~x of an unsigned tensor, and constants beyond their type, which the compiler wraps."""
    def constant(kind, unsigned):
        def get(self, value):
            return Handle(np.array([value % 2 ** (8 * unsigned.itemsize)], unsigned).view(kind.name), kind)
        return get

    for bits in (8, 16, 32, 64):
        for sign in ("", "u"):
            kind = getattr(tl, f"{sign}int{bits}")
            setattr(Builder, f"get_{sign}int{bits}", constant(kind, np.dtype(f"uint{bits}")))

    Builder.get_all_ones_value = lambda self, kind: Handle(~np.zeros(1, interpreter._get_np_dtype(kind)), kind.scalar)


def overflow_checks():
    """Slow and useless: stock computes whether integers overflow, and looks at the answer only in debug mode.

    Here: signed overflow raises, though a GPU wraps, because in a kernel it is a bug. Unsigned integers wrap (Philox).
    """
    def check(self, lhs, rhs, operation):
        kind = lhs.type.scalar
        if not kind.is_int_signed() or kind.int_bitwidth not in (8, 16, 32):
            return
        exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__](
            lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        limit = 2 ** (kind.int_bitwidth - 1)
        if exact.min() < -limit or exact.max() >= limit:
            raise OverflowError(f"{kind} overflow in {operation.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def umulhi():
    """Wrong: tl.umulhi of negative signed integers, whose bits it should read as unsigned."""
    create_umulhi = Builder.create_umulhi

    def new_umulhi(self, lhs, rhs):
        unsigned = [Handle(x.data.view(f"uint{8 * x.data.itemsize}"), x.dtype) for x in (lhs, rhs)]
        return Handle(create_umulhi(self, *unsigned).data.view(lhs.data.dtype), lhs.dtype.scalar)

    Builder.create_umulhi = new_umulhi


def loops():
    """Fails with numpy 2.4: range() and tl.range() over runtime scalars, which are arrays of one element.

    Unlike a GPU: tl.range gives Python numbers, so `i.to(tl.int64)` fails; here, scalar tensors. (With `range` they
    stay Python numbers: write tl.range where that matters.)
    """
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())

    def loop(first, second=None, step=None, **options):
        start, stop = (0, first) if second is None else (first, second)
        wide = any(isinstance(x, tl.tensor) and x.dtype == tl.int64 for x in (start, stop, step))
        for i in range(start, stop, 1 if step is None else step):
            yield scalar(i, tl.int64 if wide else tl.int32)

    tl.range = tl.core.range = loop


def scalar_arguments():
    """Unlike a GPU: float arguments are Python numbers instead of fp32, so products with fp16 stay fp16; True fails;
    integers from 2^31 to 2^32 compute in 32 bits; annotations (`stride: tl.int64`) are ignored, so offsets overflow.
    """
    implicit_cvt, launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def convert(arg):
        if isinstance(arg, bool):
            return scalar(arg, tl.int1)
        if isinstance(arg, int):
            return scalar(arg, tl.int32 if -2**31 <= arg < 2**31 else tl.int64 if arg < 2**63 else tl.uint64)
        return scalar(arg, tl.float32) if isinstance(arg, float) else implicit_cvt(arg)

    def annotated(self, name, arg):
        kind = self.fn.__annotations__.get(name, "")  # rewritten functions hold the source text of their annotations
        kind = _normalize_ty(kind.strip("'") if isinstance(kind, str) else kind)
        if kind not in type_canonicalisation_dict.values() or not isinstance(arg, (int, float)):
            return arg
        return scalar(arg, tl.str_to_ty(kind, None))

    def new_launch(self, *args, **kwargs):
        args = [annotated(self, name, arg) for name, arg in zip(self.arg_names, args, strict=False)]
        return launch(self, *args, **{name: annotated(self, name, arg) for name, arg in kwargs.items()})

    interpreter._implicit_cvt, interpreter.GridExecutor.__call__ = convert, new_launch


def floating_point_warnings():
    """Noisy: exp2(-inf - -inf), log2(0), overflow and wrapping integers warn, and pytest makes warnings errors."""
    launch = interpreter.GridExecutor.__call__

    def quiet_launch(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = quiet_launch


def scalar(value, kind):
    return tl.tensor(Handle(np.array([value], interpreter._get_np_dtype(kind)), kind), kind)


def tensor(handle, shape):
    return tl.tensor(handle, tl.block_type(handle.dtype, list(shape)) if shape else handle.dtype)
