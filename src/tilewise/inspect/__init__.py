"""Compile any kernel for any supported GPU without one, read its machine code, and decide whether it may ship."""

from .build import TARGETS, KernelCase, build, reason
from .matrix import failing, load, missing, run, table
from .report import Report, examine, failures
from .shipped import shipped

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
