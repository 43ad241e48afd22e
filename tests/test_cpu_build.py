"""Kernels of the `cpu` backend are compiled once and kept, built again when damaged, and failures are explained."""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.backends import AVAILABLE

import tilewise as tw
from tilewise.backends import cpu
from tilewise.backends.cpu import compiler
from tilewise.bench import tolerance
from tilewise.bench.cases import Case, draw

pytestmark = pytest.mark.skipif("cpu" not in AVAILABLE or cpu.compiler.compiler() is None, reason="needs a C++ compiler")

KERNEL = ("decode", "|||||", (), 0)                                         # of fp32 keys, without mask and score function
QUICK = tuple("-O0" if flag == "-O3" else flag for flag in compiler.FLAGS)  # what is built matters here, not how fast it is
CACHED = compiler.library, compiler.compiler, compiler.identity, compiler.sources, compiler.private_directory
FEW = draw(Case("few queries", seqlen_q=4), torch.float32)                   # what needs this kernel alone


def forget():
    """As in a new process."""
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The directory of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler, "FLAGS", QUICK)
    forget()
    yield tmp_path / "tilewise"
    monkeypatch.undo()
    forget()


@pytest.fixture
def built(monkeypatch):
    """The kernels that are compiled, in order."""
    kernels, build = [], compiler.build
    monkeypatch.setattr(compiler, "build", lambda kernel, *rest: (kernels.append(kernel), build(kernel, *rest)))
    return kernels


@pytest.fixture
def program(tmp_path):
    """Makes an executable script."""
    def write(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path
    return write


def assert_right():
    """Attention with this kernel, against fp64."""
    def run(backend, dtype):
        tensors = {name: x.to(dtype) for name, x in FEW.differentiable.items()}
        return tolerance.Results(dict(zip(("out", "lse"), FEW.run(tensors, backend), strict=True)))
    found, truth, standard = run("cpu", torch.float32), run("reference", torch.float64), run("reference", torch.float32)
    assert all(verdict.ok for verdict in tolerance.judge(FEW, found, truth, standard))


def entries(cache):
    return sorted(cache.glob("*.so"))


# ---- the cache ---------------------------------------------------------------------------------------------------------

def test_second_load_compiles_nothing(cache, built):
    for _ in range(3):
        forget()
        compiler.library(*KERNEL)
    assert built == ["decode"]
    assert sorted(cache.iterdir()) == entries(cache), "locks and folders of a build are gone"


def flipped(content):
    return content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]


@pytest.mark.parametrize("damage", [lambda x: x[:-5], lambda x: x[:20], lambda x: b"", flipped, lambda x: x + b"\0"],
                         ids=["truncated", "shorter than a hash", "emptied", "one bit flipped", "longer"])
def test_damaged_entries_are_built_again(damage, tmp_path, built, monkeypatch):
    assert_right()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copy"))  # elsewhere, since a process loads a path only once
    damaged = compiler.cache_directory()
    damaged.mkdir(parents=True)
    for entry in entries(tmp_path / "tilewise"):
        (damaged / entry.name).write_bytes(damage(entry.read_bytes()))
    forget()
    assert_right()
    assert built == ["decode", "decode"]
    assert all(map(compiler.whole, entries(damaged)))


CHANGES = {
    "flags": lambda patch: patch(compiler, "FLAGS", (*QUICK, "-DOTHER")),
    "compiler or CPU": lambda patch: patch(compiler, "identity", lambda: "another"),
    "sources": lambda patch: patch(compiler, "sources", lambda: {"decode.cpp": "another"}),
    "fields of the problem": lambda patch: patch(compiler.abi, "NUMBERS", (*compiler.abi.NUMBERS, "another")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_library_depends_on_names_it(change, cache, built):
    compiler.library(*KERNEL)
    with pytest.MonkeyPatch.context() as patch:
        CHANGES[change](patch.setattr)
        compiler.library.cache_clear()
        compiler.library(*KERNEL)
    compiler.library.cache_clear()
    compiler.library(*KERNEL)
    assert len(entries(cache)) == len(built) == 2, "both are kept"


def test_an_updated_compiler_builds_anew(built, program, monkeypatch):
    path = program("cxx", 'exec c++ "$@"')
    monkeypatch.setenv("CXX", str(path))
    for seconds in (1, 2, 2):
        os.utime(path, (seconds, seconds))
        forget()
        compiler.library(*KERNEL)
    assert built == ["decode", "decode"]


PROCESS = f"""
import logging, sys
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
from tilewise.backends.cpu import compiler
compiler.FLAGS = {QUICK}
print("ready", flush=True)
sys.stdin.readline()
compiler.library(*{KERNEL})
print("loaded")
"""


def test_processes_at_the_same_time_compile_once(cache):
    processes = [subprocess.Popen([sys.executable, "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                  stderr=subprocess.STDOUT) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == 3 * ["ready\n"]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert all(text.endswith("loaded\n") for text in said), said
    assert "".join(said).count("compiling the decode kernel") == 1
    assert len(list(cache.iterdir())) == 1


def test_threads_at_the_same_time_compile_once(built):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: compiler.library(*KERNEL), range(4)))
    assert built == ["decode"]


def test_what_a_killed_process_left_is_in_nobodys_way(cache, built):
    compiler.library(*KERNEL)
    [entry] = entries(cache)
    entry.unlink()
    entry.with_suffix(".lock").touch()
    (cache / "build-killed").mkdir()
    forget()
    compiler.library(*KERNEL)
    assert built == ["decode", "decode"]


@pytest.mark.parametrize("unwritable", ["a file", pytest.param("read-only", marks=pytest.mark.skipif(
    sys.platform != "linux", reason="where not even root may write"))])
def test_a_cache_that_cannot_be_written_to_is_done_without(unwritable, cache):
    if unwritable == "a file":
        cache.write_text("")
    else:
        cache.symlink_to("/proc")
    assert_right()
    shutil.rmtree(compiler.private_directory())


# ---- the compiler ------------------------------------------------------------------------------------------------------

def test_a_failing_compiler_is_quoted(cache, program, monkeypatch):
    monkeypatch.setenv("CXX", str(program("cxx", 'echo "fatal: out of tea" >&2; exit 1')))
    words = r'cxx could not compile the decode kernel .*"tiled" needs no compiler.*CXX(.|\n)*fatal: out of tea'
    with pytest.raises(RuntimeError, match=words):
        tw.attention(FEW.q, FEW.k, FEW.v, backend="cpu")
    assert list(cache.iterdir()) == []
    monkeypatch.delenv("CXX")
    forget()
    assert_right()


def test_without_a_compiler_tiled_serves_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    forget()
    plan = tw.explain(FEW.q, FEW.k, FEW.v)
    assert plan.backend == "tiled"
    assert "not cpu: no C++ compiler (c++, g++, clang++ or the one that CXX names)" in str(plan)
    assert torch.equal(tw.attention(FEW.q, FEW.k, FEW.v), tw.attention(FEW.q, FEW.k, FEW.v, backend="tiled"))
    with pytest.raises(NotImplementedError, match="'cpu' cannot compute this: no C\\+\\+ compiler"):
        tw.attention(FEW.q, FEW.k, FEW.v, backend="cpu")


@pytest.mark.parametrize("absolute", [True, False])
def test_cxx_chooses_the_compiler(absolute, tmp_path, program, monkeypatch):
    path = program("my-c++", f'echo used >> {tmp_path}/log; exec c++ "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", str(path) if absolute else path.name)
    forget()
    compiler.library(*KERNEL)
    assert (tmp_path / "log").read_text() == "used\n"


def test_a_compiler_may_be_a_link_to_a_program_that_asks_for_its_name(program, tmp_path, monkeypatch):
    """As ccache's and distcc's are."""
    wrapper = program("wrapper", f'[ "${{0##*/}}" = c++ ] && exec {shutil.which("c++")} "$@"; exit 1')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "c++").symlink_to(wrapper)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    forget()
    compiler.library(*KERNEL)


LOOKING = """
import torch, tilewise as tw
q = torch.zeros(1, 70, 2, 8)
plan = tw.explain(q, q, q, causal=True)
assert plan.backend == "cpu", plan
"""


def test_importing_and_explaining_compile_nothing(tmp_path, cache, program):
    path = program("cxx", f"echo used >> {tmp_path}/log; exit 1")
    subprocess.run([sys.executable, "-c", LOOKING], env=os.environ | {"CXX": str(path)}, check=True)
    assert not (tmp_path / "log").exists()
    assert not cache.exists()
