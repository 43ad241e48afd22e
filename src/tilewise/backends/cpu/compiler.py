"""Builds the kernels with the machine's own C++ compiler, once for each program, and keeps them in the user's cache.

An entry of the cache is one shared library, named by a hash of all that it depends on: the sources, the compiler and its
flags, the CPU. It ends with a hash of itself, so that a torn or damaged one is built again. Entries appear whole, by renaming,
and a lock makes processes that want the same one wait for each other.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tilewise.backends.cpu import abi
from tilewise.trace import emit_cpp

KERNELS = Path(__file__).parent / "kernels"
COMPILERS = "c++", "g++", "clang++"
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
FLAGS = ("-std=c++17", "-O3", *(("-march=native", "-mprefer-vector-width=512") if X86 else ("-mcpu=native",)),
         "-ffp-contract=fast", "-fno-math-errno", "-w", "-shared", "-fPIC")
OWN_FLAGS = {"append": ("-ffp-contract=off",)}     # of a kernel: what turns rounds as PyTorch does
PLAIN = abi.Compiled()
DIGEST = hashlib.sha256().digest_size

log = logging.getLogger("tilewise")


@functools.cache
def compiler() -> tuple[str, ...]:
    """The command that runs the C++ compiler: CXX, such as "ccache g++", otherwise the first of COMPILERS; () without one."""
    named = shlex.split(os.environ.get("CXX", ""))
    for program, *arguments in [named] if named else [[name] for name in COMPILERS]:
        path = shutil.which(program)
        if path is not None:
            return path, *arguments
    return ()


def cache_directory() -> Path:
    """Where libraries are kept: tilewise in the user's cache directory."""
    home = Path.home()
    default = home / "Library" / "Caches" if platform.system() == "Darwin" else home / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "tilewise"


@functools.lru_cache(maxsize=512)
def library(kernel: str, program: str | None = None, dtypes: tuple[torch.dtype, ...] = (),
            compiled: abi.Compiled = PLAIN) -> ctypes.CDLL:
    """The library of a kernel, the name of a .cpp file in KERNELS, for a program's text and the dtypes of its captured tensors.

    Without a program it is of a file that includes neither problem.h nor functions.h. Raises RuntimeError with the compiler's
    words if it fails.
    """
    generated = {} if program is None else {
        "problem.h": abi.header(compiled),
        "functions.h": '#pragma once\n#include "elementary.h"\n' + emit_cpp.source(program, dtypes)}
    name = hashlib.sha256(repr((kernel, generated, sources(kernel), identity(), flags(kernel))).encode()).hexdigest()[:32]
    path = cache_directory() / f"{name}.so"
    if not whole(path):
        path = writable_directory() / path.name
        with locked(path.with_suffix(".lock")):
            if not whole(path):
                build(kernel, sources(kernel) | generated, path)
    return ctypes.CDLL(str(path))


def writable_directory() -> Path:
    """The cache; where it cannot be written to, a folder for this process."""
    directory = cache_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return private_directory()
    return directory


@functools.cache
def sources(kernel: str) -> dict[str, str]:
    """Its own file and all headers."""
    return {path.name: path.read_text() for path in sorted(KERNELS.iterdir())
            if path.suffix == ".h" or path.name == f"{kernel}.cpp"}


def flags(kernel: str) -> tuple[str, ...]:
    return *FLAGS, *OWN_FLAGS.get(kernel, ())


@functools.cache
def identity() -> tuple:
    """What a library depends on beside its sources: the compiler, and the CPU that -march=native means."""
    programs = [path for path in map(shutil.which, compiler()) if path is not None]
    built = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in programs]
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        facts = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        cpu = "".join(re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", facts, re.M))
    return compiler(), built, platform.machine(), cpu


@functools.cache
def private_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="tilewise-"))


def whole(path: Path) -> bool:
    """Whether a library is there and as it was built."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    import fcntl
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def build(kernel: str, files: dict[str, str], path: Path) -> None:
    log.info("compiling the %s kernel for this CPU, once: %s", kernel, path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as directory:
        for name, text in files.items():
            (Path(directory) / name).write_text(text)
        made = Path(directory) / "made.so"
        done = subprocess.run([*compiler(), *flags(kernel), f"{directory}/{kernel}.cpp", "-o", str(made), "-lm"],
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(compiler())} could not compile the {kernel} kernel (backend=\"tiled\" needs no "
                               f"compiler; CXX names another one):\n{done.stderr[-4000:]}")
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(made, path)
