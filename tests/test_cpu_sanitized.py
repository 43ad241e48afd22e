"""Tests of the `cpu` backend again, with kernels that are compiled with the sanitizers of memory and undefined behaviour, or of
data races (`support/sanitized.py`); and whether these find what is planted.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewise.backends import cpu
from tilewise.backends.cpu import compiler

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    sys.platform != "linux" or not cpu.compiler.compiler(), reason="preloads a library into what a C++ compiler has built")]

TESTS = Path(__file__).parent
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
SUITES = (
    ("address", "test_cpu.py"),
    ("address", "test_cpu_tangents.py", "test_tangent_kernels.py", "-k", "cpu"),
    ("address", "test_cpu_portable.py", "test_nonfinite.py", "test_statistics.py", "-k", "cpu"),
    ("address", "test_cache_attention.py", "test_calls.py", "-k", "cpu or calls"),
    ("address", "test_steps.py"),
    ("address", "contract/test_contract.py", "-k", "cpu"),
    ("thread", "test_cpu.py", "test_cpu_tangents.py", "-k", "threads or passes or share or few or invariant"),
    ("thread", "test_cache_attention.py", "test_statistics.py", "-k", "cpu and (splits or one_call or packed)"),
)
ALONE = "test_cpu.py", "-k", "repeatable and 3-few and heads"
PLANTS = {
    "a number behind the last row": (
        "address", "rows.h", "read(kind, from, 1, dim, to);",
        "read(kind, from, 1, dim, to), (void)((volatile float*)from)[dim];", "AddressSanitizer: heap-buffer-overflow"),
    "a piece of scratch memory too small": (
        "address", "backward.cpp", "lse = arena.take<float>(m),", "lse = arena.take<float>(m - 1),",
        "AddressSanitizer: use-after-poison"),
    "scratch memory that is read first": (
        "address", "jobs.h", "if (pass.begin < pass.end) memset", "if (pass.begin > pass.end) memset", "not finite in"),
    "addresses between numbers": (
        "address", "pack.h", "((const float*)from)[", "((const float*)((const char*)from + 1))[",
        "runtime error: load of misaligned address"),
    "jobs that share their dQ": (
        "thread", "jobs.h", "memory.dq + job * memory.dq_size", "memory.dq + job / x.parts * memory.dq_size",
        "ThreadSanitizer: data race"),
}


@pytest.fixture
def run(request):
    """Runs tests under a sanitizer in another process; what is compiled is kept for the next time."""
    def library(name):
        return subprocess.run([*compiler.compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()

    def run(sanitizer, *tests, plant=()):
        preloaded = [library(LIBRARIES[sanitizer]), library("libstdc++.so")]     # the latter for what torch throws
        if not os.path.isabs(preloaded[0]):
            pytest.skip(f"{compiler.compiler()} brings no {LIBRARIES[sanitizer]}")
        settings = dict(LD_PRELOAD=" ".join(preloaded), PYTHONPATH=os.pathsep.join([str(TESTS), *sys.path]),
                        XDG_CACHE_HOME=str(request.config.cache.mkdir("sanitized")), OMP_NUM_THREADS="1",
                        ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1", TSAN_OPTIONS="halt_on_error=1")
        command = [sys.executable, "-m", "pytest", "-p", "support.sanitized", "-p", "no:cacheprovider", "--capture=sys",
                   "--sanitize", sanitizer, *(["--plant", *plant] if plant else []), *tests]
        return subprocess.run(command, cwd=TESTS, env=os.environ | settings, capture_output=True, text=True)
    return run


@pytest.mark.parametrize("suite", SUITES, ids=" ".join)
def test_nothing_is_found(suite, run):
    done = run(*suite)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[:6000]


@pytest.mark.parametrize("name", PLANTS)
def test_what_is_planted_is_found(name, run):
    sanitizer, *plant, found = PLANTS[name]
    done = run(sanitizer, *ALONE, plant=plant)
    assert done.returncode != 0
    assert found in done.stdout + done.stderr
