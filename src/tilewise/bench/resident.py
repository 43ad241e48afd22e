"""Resident memory of this process, as Linux counts it."""
from __future__ import annotations

from pathlib import Path

# glibc keeps freed memory in a heap per thread, by thresholds that move: in a process with these, what is resident is allocated
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or its peak VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def restart_peak() -> None:
    """VmHWM starts again from here."""
    Path("/proc/self/clear_refs").write_text("5")
