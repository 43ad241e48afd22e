"""What this machine has, and which attention backends work on it. Returns data; the command line prints it."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.api import attention
from tilewise.backends import load
from tilewise.backends.cpu import compiler
from tilewise.plan import choose
from tilewise.problem import make


class Check(NamedTuple):
    """One backend's answer to a tiny causal problem: largest error against fp64 standard attention, or why not."""

    backend: str
    device: str
    error: float | None
    reason: str


def machine() -> dict[str, str]:
    """This machine in words: system, CPU, cores, memory, GPUs, versions."""
    memory = memory_bytes()
    facts = {
        "System": f"{platform.system()} {platform.release()}",
        "CPU": f"{_cpu_name()}, {core_count()} cores",
        "Memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "GPU": "; ".join(map(_gpu_name, range(torch.cuda.device_count()))) or "none",
        "Python": platform.python_version(),
        "torch": torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")
                 + f", {torch.get_num_threads()} CPU threads",
    }
    for name in ("triton", "numpy", "tilewise"):
        facts[name] = _version(name)
    facts["C++ compiler"] = shlex.join(compiler.compiler()) or "none"
    facts["CPU kernels"] = f"{len(list(compiler.cache_directory().glob('*.so')))} compiled, in {compiler.cache_directory()}"
    return facts


def devices() -> list[str]:
    """The kinds of device that can compute here."""
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def serving(device: str) -> str:
    """The backend that serves ordinary attention on a device."""
    return choose(make(*example(device), causal=True)[0], "auto")


def check_backend(backend: str, device: str) -> Check:
    """Runs the example on a backend and compares it with standard attention in fp64."""
    q, k, v = example(device)
    reason = load(backend).supports(make(q, k, v, causal=True)[0])
    if reason is not None:
        return Check(backend, device, None, reason)
    truth: Tensor = attention(q.double(), k.double(), v.double(), causal=True, backend="reference")
    try:
        out = attention(q, k, v, causal=True, backend=backend)
    except Exception as error:  # whatever a broken installation raises is what the doctor is asked about
        return Check(backend, device, None, f"{type(error).__name__}: {error}")
    return Check(backend, device, (out.double() - truth).abs().max().item(), "")


def example(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, 33, 2, 16], in the device's usual precision, the same every time."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.float16
    q, k, v = (torch.randn(1, 33, 2, 16, generator=generator).to(device, dtype) for _ in range(3))
    return q, k, v


def advice() -> list[str]:
    """What is missing here and how to get it, most useful first."""
    lines = []
    if not compiler.compiler():
        lines.append("No C++ compiler: attention on the CPU runs in torch operations. "
                     "`apt-get install g++` (or clang) adds the native kernels.")
    if torch.cuda.is_available() and util.find_spec("triton") is None:
        lines.append("A GPU without Triton: `pip install 'tilewise[triton]'` adds the GPU kernels.")
    if not torch.cuda.is_available() and _has_nvidia_driver():
        lines.append("An NVIDIA driver, but a torch without CUDA: install one from https://pytorch.org/get-started.")
    if util.find_spec("matplotlib") is None:
        lines.append("No matplotlib: `pip install 'tilewise[plots]'` for `tilewise demo` and `tilewise mask --png`.")
    return lines


def core_count() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory this process may use: the machine's, or its container's if that is less; 0 if unknown."""
    total = 0
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def _gpu_name(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"


def _has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
