"""Numbers in words, with a unit that suits them."""

from __future__ import annotations


def ratio(value: float) -> str:
    """4.56 -> 4.6×, 45.6 -> 46×; below 2 two digits behind the point, where they matter."""
    if value < 0.1:
        return f"{value:.2g}×"
    if value < 2:
        return f"{value:.2f}×"
    return f"{value:.1f}×" if value < 10 else f"{value:,.0f}×"


def duration(seconds: float) -> str:
    """Seconds, milliseconds or microseconds."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e6:.3g} µs"


def size(count: float) -> str:
    """Bytes by powers of 1024."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if count >= 2**power:
            return f"{digits(count / 2**power)} {unit}"
    return f"{digits(count / 2**10)} KiB"


def length(tokens: float) -> str:
    """Tokens: 512, 1k, 128k, 1M where they are whole, otherwise every digit."""
    for unit, scale in (("M", 2**20), ("k", 2**10)):
        if tokens >= scale and tokens % scale == 0:
            return f"{tokens / scale:,.0f}{unit}"
    return f"{tokens:,.0f}"


def digits(value: float) -> str:
    """Three digits, and every one before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
