"""A plugin of pytest: kernels of the `cpu` backend are compiled with sanitizers, and may be damaged before.

`tests/test_cpu_sanitized.py` runs it, and preloads what sanitizers need. `address` finds undefined behaviour too; pieces of
scratch memory have fences (kernels/work.h). Under `thread`, kernels run on threads that begin and end with each parallel
region: how those of OpenMP wait for each other is not seen by a sanitizer.
"""
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from tilewise.backends.cpu import compiler, threads

# Without optimisation: that compiles in a fifth of the time, and no access is left out because nothing needs it.
FLAGS = {"address": ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
         "thread": ("-O1", "-g1", "-fsanitize=thread")}
TEAM = """
#include <barrier>
#include <thread>
#include <vector>

extern "C" void parallel(void (*body)(void*), void* data, unsigned count, unsigned) {
  std::barrier together(count);                     // or the first thread has done all before there is a second
  std::vector<std::thread> team;
  for (unsigned i = 0; i < count; i++) team.emplace_back([&] { together.arrive_and_wait(); body(data); });
  for (std::thread& one : team) one.join();
}
"""


def pytest_addoption(parser):
    parser.addoption("--sanitize", choices=FLAGS, required=True)
    parser.addoption("--plant", nargs=3, metavar=("FILE", "TEXT", "OTHER"), help="replace a text in a file of the kernels")


def pytest_configure(config):
    del os.environ["LD_PRELOAD"]                    # the compiler needs none of it
    which, plant = config.getoption("sanitize"), config.getoption("plant")
    compiler.FLAGS = (*(flag for flag in compiler.FLAGS if flag != "-O3"), *FLAGS[which])
    if which == "thread":
        team = ctypes.CDLL(team_of_threads())
        threads.entry = lambda: ctypes.cast(team.parallel, ctypes.c_void_p).value
        threads.count = lambda: 3
        torch.set_num_threads(1)                    # torch's own, which wait for each other likewise
        torch.set_num_threads = lambda count: None
    if plant:
        compiler.KERNELS = damaged(compiler.KERNELS, *plant)


def damaged(kernels: Path, name: str, text: str, other: str) -> Path:
    """A copy, in one file of which a text is replaced."""
    copy = Path(tempfile.mkdtemp(prefix="tilewise-")) / "kernels"
    shutil.copytree(kernels, copy)
    before = (copy / name).read_text()
    if before.count(text) != 1:
        raise pytest.UsageError(f"{name} does not have {text!r} once")
    (copy / name).write_text(before.replace(text, other))
    return copy


def team_of_threads() -> str:
    """The library of TEAM."""
    directory = tempfile.mkdtemp(prefix="tilewise-")
    command = [*compiler.compiler(), "-std=c++20", *FLAGS["thread"], "-shared", "-fPIC", "-x", "c++", "-", "-o",
               f"{directory}/team.so"]
    subprocess.run(command, input=TEAM, text=True, check=True)
    return f"{directory}/team.so"
