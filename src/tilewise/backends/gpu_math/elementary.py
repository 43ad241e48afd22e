"""Functions of score and mask graphs that Triton's language lacks."""
import triton
import triton.language as tl

TWO_LOG2E = tl.constexpr(2.8853900817779268)


@triton.jit
def tanh(x):
    """tanh to fp32 rounding: its series near 0, where the quotient of exponentials cancels."""
    a = tl.abs(x)
    e = tl.exp2(-a * TWO_LOG2E)
    large = (1.0 - e) / (1.0 + e)
    y = a * a
    series = a * (1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.05396825 + y * (0.021869488 - y * 0.0088632355)))))
    magnitude = tl.where(a < 0.3, series, large)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def from_e4m3(x):
    """The fp16 value of bytes that hold fp8 numbers (e4m3, no infinities): exact, also on GPUs without fp8."""
    bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
    value = bits.to(tl.float16, bitcast=True) * 256.0
    return tl.where((x & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def to_e4m3(x):
    """Bytes that hold x, fp32, as fp8 (e4m3): to nearest even, saturating at 448; infinities, which it lacks, become NaN."""
    a = tl.minimum(tl.abs(x), 448.0)
    bits = a.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((a * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)                 # in units of the smallest number
    magnitude = tl.where((x != x) | (tl.abs(x) == float("inf")), 0x7F, tl.where(a < 0.015625, small, normal))
    return (magnitude | tl.where(x < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def floor_divide(a, b):
    """a // b rounded down, as in Python and torch; Triton's // rounds towards zero."""
    quotient = a // b
    return tl.where((quotient * b != a) & ((a < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def floor_remainder(a, b):
    """a % b with the sign of b, as in Python and torch."""
    return a - floor_divide(a, b) * b


@triton.jit
def floor_divide_floats(a, b):
    """a // b of floating numbers."""
    return tl.floor(a / b)


@triton.jit
def floor_remainder_floats(a, b):
    """a % b of floating numbers, with the sign of b."""
    return a - tl.floor(a / b) * b


@triton.jit
def power(a, b):
    """a ** b; NaN where a is negative and b not whole."""
    magnitude = tl.exp2(b * tl.log2(tl.abs(a)))
    whole = tl.floor(b) == b
    odd = tl.floor(b * 0.5) * 2.0 != b
    of_negative = tl.where(whole, tl.where(odd, -magnitude, magnitude), float("nan"))
    return tl.where(b == 0.0, 1.0, tl.where(a < 0.0, of_negative, magnitude))
