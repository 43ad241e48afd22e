"""What GPU backends share: the arithmetic of one tile as Triton device functions, entry points generated for a program, and
the order of work."""
from __future__ import annotations

import functools


@functools.cache
def triton_version() -> tuple[str, tuple[int, ...]] | None:
    """Triton's version as it says it, and (major, minor); None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__, tuple(int(part) for part in triton.__version__.split(".")[:2])


NOT_INSTALLED = "triton is not installed (pip install triton)"
