"""The inspect room: kernels are compiled and judged here for GPUs that this machine need not have."""

# ruff: noqa: E402 - without Triton, or with its interpreter, the rest cannot be imported
import os
import pickle
from dataclasses import dataclass, field, replace

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton cannot compile while it interprets", allow_module_level=True)

import triton.language as tl

from tilewise import inspect
from tilewise.inspect import matrix, sass


@triton.jit
def add_captured(score, captured, column):
    return score + tl.load(captured[0] + column)


@triton.jit
def double(score):
    return score * 2


@triton.jit
def attend(Q, K, V, O, strides, captured, program, MOD: tl.constexpr, n, scale, B: tl.constexpr, D: tl.constexpr):
    """Exercises every kind of argument: nested tuples of pointers, numbers, None and functions."""
    rows = tl.arange(0, B)
    offsets = rows[:, None] * strides[0] + tl.arange(0, D)[None, :] * strides[1]
    q = tl.load(Q + offsets)
    out = tl.zeros([B, D], tl.float32)
    for start in tl.range(0, n, B):
        s = tl.dot(q, tl.trans(tl.load(K + offsets + start * strides[0]))) * scale
        s = MOD(s, captured[0], (start + rows)[None, :])
        s = program[1][0](s)
        if captured[1] is not None:
            s += captured[1]
        v = tl.load(V + offsets + start * strides[0])
        out += tl.dot(tl.math.exp2(s).to(v.dtype), v)
    tl.store(O + offsets, out.to(O.dtype.element_ty))


@triton.jit(do_not_specialize=["n", "both"], do_not_specialize_on_alignment=["m"])
def excluding(X, n, m, k, both):
    tl.store(X + both[0], n + m + k)


@triton.jit
def broken(X):
    tl.store(X, tl.no_such_function(1))


@dataclass(frozen=True)
class Case:
    name: str = "attend bf16"
    arch: str = "sm_90"
    kernel: object = attend
    types: str = "bf16"
    signature: dict = field(default_factory=dict)
    constants: dict = field(default_factory=dict)
    unaligned: frozenset = frozenset({"n"})
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    tensor_cores: bool = True
    direction: str = "forward"
    key: str = "1"


def attend_case(arch="sm_90", dtype="bf16", block=64, **changes):
    pointers = {name: f"*{dtype}" for name in "QKVO"}
    case = Case(
        arch=arch,
        signature=pointers | {
            "strides": ("i64", "constexpr"),
            "captured": (("*fp32", "fp32"), "constexpr"),
            "program": ("i32", ("constexpr",)),
            "n": "i32",
            "scale": "fp32",
        },
        constants={"strides[1]": 1, "captured[1]": None, "program[1][0]": double, "MOD": add_captured, "B": block,
                   "D": 64},
        unaligned=frozenset({"n", "program"}),
    )
    return replace(case, **changes)


@pytest.mark.parametrize("arch, instruction", [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("gfx942", "mfma")])
def test_tuples_of_everything_compile_and_pass_the_gates(arch, instruction):
    case = attend_case(arch)
    compiled = inspect.build(case)
    report = inspect.examine(compiled, case)
    assert inspect.failures(report, case) == []
    assert report.tensor_instructions[instruction] > 0
    assert 0 < report.registers <= 512
    assert 0 < report.shared_memory <= report.shared_memory_limit
    entry = next(line for line in compiled.asm["ttir"].splitlines() if "tt.func public" in line)
    assert entry.count("tt.divisibility = 16") == 6  # Q, K, V, O, strides[0], captured[0][0]
    if arch != "gfx942":
        assert report.hot_loop.units["MMA"] > 0
        assert report.hot_loop.units["MUFU"] > 0


def test_alignment_reaches_the_machine_code():
    aligned = inspect.build(attend_case("sm_80"))
    names = frozenset({"n", "program", "strides[0]"})
    unaligned = inspect.build(attend_case("sm_80", unaligned=names))
    assert "cp.async" in aligned.asm["ptx"]
    assert aligned.asm["ptx"].count("ld.global") < unaligned.asm["ptx"].count("ld.global")


def test_arguments_excluded_by_the_decorator_are_not_told_to_be_aligned():
    case = Case(kernel=excluding, signature={"X": "*i32", "n": "i32", "m": "i32", "k": "i32", "both": ("i32",)},
                unaligned=frozenset())
    ttir = inspect.build(case).asm["ttir"]
    entry = next(line for line in ttir.splitlines() if "tt.func public" in line)
    told = {text.split(":")[0].strip() for text in entry.split("%")[1:] if "tt.divisibility" in text}
    assert told == {"X", "k", "both"}  # what a launch tells: tuples are always specialised


def test_gates_name_what_is_wrong():
    case = attend_case()
    good = inspect.examine(inspect.build(case), case)
    bad = replace(good, spills=8, shared_memory=10**6, tensor_instructions={"mma.sync": 4},
                  warnings=("(C7511) wgmma instructions are serialized",))
    assert inspect.failures(bad, case) == [
        "spills 8 bytes", "shared memory 1000000 over the limit 232448", "mma.sync instead of wgmma",
        "wgmma serialized by ptxas"]
    plain = replace(good, tensor_instructions={})
    assert inspect.failures(plain, case) == ["no tensor-core instructions"]
    assert inspect.failures(plain, replace(case, tensor_cores=False)) == []
    decode = replace(case, direction="decode")
    assert inspect.failures(replace(good, tensor_instructions={"mma.sync": 4}), decode) == []


def test_an_fp32_kernel_has_a_hot_loop_without_tensor_cores():
    case = attend_case("sm_80", "fp32", block=32, tensor_cores=False)
    report = inspect.examine(inspect.build(case), case)
    assert report.hot_loop is not None


def test_real_spills_are_seen():
    case = attend_case("sm_80", block=128)
    report = inspect.examine(inspect.build(case), case)
    assert report.spills > 0
    assert report.hot_loop.units["SPILL"] > 0


@pytest.mark.parametrize("changes, message", [
    ({"arch": "sm_42"}, "arch must be one of"),
    ({"signature": {}}, "arguments without a type"),
    ({"signature": attend_case().signature | {"x": "i32"}}, r"types without an argument: \['x'\]"),
    ({"constants": {"MOD": double, "B": 64, "D": 64}}, "is a constexpr without a value"),
    ({"unaligned": frozenset({"m"})}, r"no argument: \['m'\]"),
    ({"constants": attend_case().constants | {"MOD": (double,)}}, "constexpr tuple of jit functions"),
])
def test_a_case_that_does_not_fit_its_kernel_is_one_clear_error(changes, message):
    with pytest.raises(ValueError, match=message):
        inspect.build(attend_case(**changes))


def test_interpreter_mode_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        inspect.build(attend_case())
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        inspect.run(shipped, tmp_path / "gates.json")


def test_sass_of_every_instruction_has_an_address_and_an_opcode():
    code = sass.disassemble(inspect.build(attend_case()).asm["cubin"])
    assert [i.address for i in code] == sorted({i.address for i in code})
    assert all(i.opcode[0].isalpha() for i in code)
    assert any(i.unit == "MMA" for i in code)


def shipped():
    """Worker processes import this module and call this function."""
    yield attend_case("sm_80", num_stages=1)
    yield attend_case("gfx942", num_stages=1)
    yield Case("broken", "sm_90", broken, signature={"X": "*fp32"}, unaligned=frozenset())
    if os.environ.get("TILEWISE_TEST_CRASH"):
        yield Case("crash", "sm_90", Crash(), unaligned=frozenset())


class Crash:
    """A kernel whose compilation ends the process, as an assertion inside LLVM does."""

    @property
    def arg_names(self):
        os._exit(3)


def test_matrix_is_incremental_and_survives_failures(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TILEWISE_TEST_CRASH", "1")
    store = tmp_path / "results" / "gates.json"
    matrix.save(store, {"gone @ sm_80": {"key": "1", "failures": []}, "attend bf16 @ gfx942": {"key": "0"}})
    assert inspect.missing(shipped(), store) == [
        "attend bf16 @ sm_80", "attend bf16 @ gfx942", "broken @ sm_90", "crash @ sm_90"]
    rows = inspect.run(shipped, store, progress=False)
    assert rows == inspect.load(store)
    assert sorted(rows) == ["attend bf16 @ gfx942", "attend bf16 @ sm_80", "broken @ sm_90", "crash @ sm_90"]
    assert inspect.missing(shipped(), store) == []
    failed = inspect.failing(shipped(), store)
    assert failed["crash @ sm_90"] == ["does not compile: the compiler crashed"]
    assert "no_such_function" in failed["broken @ sm_90"][0]
    assert len(failed) == 2
    assert len(store.read_text().splitlines()) == len(rows) + 2
    assert not list(store.parent.glob("*.tmp"))

    measured = []
    monkeypatch.setattr(matrix, "_measure_all", lambda shipped, names, jobs: measured.extend(names) or iter(()))
    assert inspect.run(shipped, store, progress=False) == rows
    assert measured == []
    assert inspect.table(rows).row_count == 4
    assert "PTX" not in capfd.readouterr().out


def test_two_cases_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two kernel cases are called 'attend bf16 @ sm_90'"):
        matrix.by_name([attend_case(), attend_case()])


def test_shipped_is_what_workers_are_sent():
    assert pickle.loads(pickle.dumps(shipped)) is shipped
