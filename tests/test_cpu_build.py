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

pytestmark = pytest.mark.skipif("cpu" not in AVAILABLE or not cpu.compiler.compiler(), reason="needs a C++ compiler")

TINY = 'extern "C" long tiny_memory() { return %d; }\n'        # what is built matters here only by its answer
CACHED = compiler.library, compiler.compiler, compiler.identity, compiler.sources, compiler.private_directory
Q = torch.randn(1, 70, 2, 8)


def forget():
    """As in a new process."""
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The directory of an empty cache, for kernels of which there is only a tiny one."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "tiny.cpp").write_text(TINY % 42)
    monkeypatch.setattr(compiler, "KERNELS", tmp_path / "kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
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


def answer():
    """Of the kernel, loaded as by a new process."""
    forget()
    return compiler.library("tiny", "||||||", ()).tiny_memory()


# ---- the cache ---------------------------------------------------------------------------------------------------------

def test_second_load_compiles_nothing(cache, built):
    assert [answer() for _ in range(3)] == [42, 42, 42]
    assert built == ["tiny"]
    assert len(list(cache.iterdir())) == 1, "locks and folders of a build are gone"


def flipped(content):
    return content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]


@pytest.mark.parametrize("damage", [lambda x: x[:-5], lambda x: x[:20], lambda x: b"", flipped, lambda x: x + b"\0"],
                         ids=["truncated", "shorter than a hash", "emptied", "one bit flipped", "longer"])
def test_damaged_entries_are_built_again(damage, cache, built, tmp_path, monkeypatch):
    assert answer() == 42
    [entry] = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))    # a process loads from one path only once
    compiler.cache_directory().mkdir(parents=True)
    damaged = compiler.cache_directory() / entry.name
    damaged.write_bytes(damage(entry.read_bytes()))
    assert answer() == 42
    assert built == ["tiny", "tiny"]
    assert damaged.read_bytes()[:4] == b"\x7fELF" or sys.platform != "linux"
    assert compiler.whole(damaged)


CHANGES = {
    "flags": lambda patch: patch(compiler, "FLAGS", (*compiler.FLAGS, "-DOTHER")),
    "compiler or CPU": lambda patch: patch(compiler, "identity", lambda: "another"),
    "fields of the problem": lambda patch: patch(compiler.abi, "NUMBERS", (*compiler.abi.NUMBERS, "another")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_library_depends_on_names_it(change, cache, built, monkeypatch):
    def load():
        compiler.library.cache_clear()
        return compiler.library("tiny", "||||||", ()).tiny_memory()

    assert load() == 42
    with monkeypatch.context() as patch:
        CHANGES[change](patch.setattr)
        assert load() == 42
    assert load() == 42
    assert len(list(cache.iterdir())) == len(built) == 2, "both are kept"


def test_an_edit_under_a_running_process_is_not_stored_under_the_name_of_what_it_read(built):
    """The name and the library come from the same text."""
    compiler.sources("tiny")
    (compiler.KERNELS / "tiny.cpp").write_text(TINY % 43)
    compiler.library.cache_clear()
    assert compiler.library("tiny", "||||||", ()).tiny_memory() == 42
    (compiler.KERNELS / "tiny.cpp").write_text(TINY % 42)
    assert answer() == 42
    assert built == ["tiny"]


def test_a_change_of_the_source_is_seen(built):
    for number in (42, 43, 42):
        (compiler.KERNELS / "tiny.cpp").write_text(TINY % number)
        assert answer() == number
    assert built == ["tiny", "tiny"]


def test_an_updated_compiler_builds_anew(built, program, monkeypatch):
    path = program("cxx", 'exec c++ "$@"')
    monkeypatch.setenv("CXX", str(path))
    for seconds in (1, 2, 2):
        os.utime(path, (seconds, seconds))
        assert answer() == 42
    assert built == ["tiny", "tiny"]


PROCESS = """
import logging, pathlib, sys
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
from tilewise.backends.cpu import compiler
compiler.KERNELS = pathlib.Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(compiler.library("tiny", "||||||", ()).tiny_memory())
"""


@pytest.fixture
def slow_compiler(program, monkeypatch):
    """Takes so long that all others come meanwhile."""
    monkeypatch.setenv("CXX", str(program("slow", 'sleep 0.5; exec c++ "$@"')))
    forget()


def test_processes_at_the_same_time_compile_once(cache, slow_compiler):
    processes = [subprocess.Popen([sys.executable, "-c", PROCESS, compiler.KERNELS], text=True, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == 3 * ["ready\n"]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert all(text.endswith("42\n") for text in said), said
    assert "".join(said).count("compiling the tiny kernel") == 1
    assert len(list(cache.iterdir())) == 1


def test_threads_at_the_same_time_compile_once(built, slow_compiler):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: compiler.library("tiny", "||||||", ()).tiny_memory(), range(4))) == [42, 42, 42, 42]
    assert built == ["tiny"]


def test_what_a_killed_process_left_is_in_nobodys_way(cache, built):
    answer()
    [entry] = cache.iterdir()
    entry.unlink()
    entry.with_suffix(".lock").touch()
    (cache / "build-killed").mkdir()
    assert answer() == 42
    assert built == ["tiny", "tiny"]


@pytest.mark.parametrize("unwritable", ["a file", pytest.param("read-only", marks=pytest.mark.skipif(
    sys.platform != "linux", reason="where not even root may write"))])
def test_a_cache_that_cannot_be_written_to_is_done_without(unwritable, cache):
    if unwritable == "a file":
        cache.write_text("")
    else:
        cache.symlink_to("/proc")
    assert answer() == 42
    shutil.rmtree(compiler.private_directory())


def test_a_library_that_is_there_is_loaded_without_writing(cache, built, monkeypatch):
    """From a cache that cannot be written to."""
    assert answer() == 42
    cache.chmod(0o500)
    monkeypatch.setattr(compiler, "writable_directory", lambda: pytest.fail("nothing has to be written"))
    assert answer() == 42
    assert built == ["tiny"]


# ---- the compiler ------------------------------------------------------------------------------------------------------

def test_a_failing_compiler_is_quoted(cache, program, monkeypatch):
    monkeypatch.setenv("CXX", str(program("cxx", 'echo "fatal: out of tea" >&2; exit 1')))
    forget()
    words = r'cxx could not compile the forward kernel .*"tiled" needs no compiler.*CXX(.|\n)*fatal: out of tea'
    with pytest.raises(RuntimeError, match=words):
        tw.attention(Q, Q, Q, backend="cpu")
    assert list(cache.iterdir()) == []
    monkeypatch.delenv("CXX")
    assert answer() == 42


def test_without_a_compiler_tiled_serves_and_explain_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    forget()
    plan = tw.explain(Q, Q, Q)
    assert plan.backend == "tiled"
    assert "not cpu: no C++ compiler (c++, g++, clang++ or the one that CXX names)" in str(plan)
    assert torch.equal(tw.attention(Q, Q, Q), tw.attention(Q, Q, Q, backend="tiled"))
    with pytest.raises(NotImplementedError, match="'cpu' cannot compute this: no C\\+\\+ compiler"):
        tw.attention(Q, Q, Q, backend="cpu")


@pytest.mark.parametrize("absolute", [True, False])
def test_cxx_chooses_the_compiler(absolute, tmp_path, program, monkeypatch):
    path = program("my-c++", f'echo used >> {tmp_path}/log; exec c++ "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", str(path) if absolute else path.name)
    assert answer() == 42
    assert (tmp_path / "log").read_text() == "used\n"


def test_cxx_may_have_arguments(tmp_path, program, monkeypatch):
    path = program("wrapper", f'echo "$1 $2" >> {tmp_path}/log; shift 2; exec c++ "$@"')
    monkeypatch.setenv("CXX", f"{path} 'two words' c++")
    assert answer() == 42
    assert (tmp_path / "log").read_text() == "two words c++\n"


def test_a_cxx_that_is_not_there_is_not_replaced_by_another(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    forget()
    with pytest.raises(NotImplementedError, match="no C\\+\\+ compiler"):
        tw.attention(Q, Q, Q, backend="cpu")


def test_a_compiler_may_be_a_link_to_a_program_that_looks_at_its_name(program, tmp_path, monkeypatch):
    """As ccache's and distcc's are."""
    wrapper = program("wrapper", f'[ "${{0##*/}}" = c++ ] && exec {shutil.which("c++")} "$@"; exit 1')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "c++").symlink_to(wrapper)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert answer() == 42


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
