"""Compile any kernel for any supported GPU without one, read its machine code, and decide whether it may ship."""

from tilewise.inspect.build import TARGETS, KernelCase, build, reason
from tilewise.inspect.matrix import failing, load, missing, run, table
from tilewise.inspect.report import Report, examine, failures
from tilewise.inspect.shipped import shipped

__all__ = [
    "TARGETS",
    "KernelCase",
    "Report",
    "build",
    "examine",
    "failing",
    "failures",
    "load",
    "missing",
    "reason",
    "run",
    "shipped",
    "table",
]
