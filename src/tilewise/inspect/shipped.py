"""All kernels that are shipped."""

from __future__ import annotations

from collections.abc import Iterator

from tilewise.inspect.build import KernelCase


def shipped() -> Iterator[KernelCase]:
    """Every configuration of every GPU backend."""
    from tilewise.backends.hopper import aot as hopper
    from tilewise.backends.triton import aot as triton

    yield from triton.shipped()
    yield from hopper.shipped()
