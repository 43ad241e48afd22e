"""The simulator of Hopper kernels finds what is wrong, and nothing else."""
import types

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
import triton.language as tl
from support.backends import INTERPRETING
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise import rng
from tilewise.inspect import build

if INTERPRETING:
    pytest.skip("Triton's interpreter cannot compile Gluon", allow_module_level=True)

from support.hopper import Fault, faulty, launch, mutants
from support.hopper import examples as kernels

SCHEDULES = range(20)
pytestmark = pytest.mark.usefixtures("one_thread")


@triton.jit
def double(x):
    return x * 2


@triton.jit
def soft(s):
    return tl.exp2(s * 0.125)


def layout(bits, block):
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, block[-1] * bits // 8), element_bitwidth=bits, rank=len(block))


def descriptor(tensor, *block):
    return TensorDescriptor.from_tensor(tensor, list(block), layout(8 * tensor.element_size(), block))


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unwritten(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan).to(dtype)


# --- one run of each kernel, compared with torch: raises Fault or AssertionError ----------------------------------------


def run_copy(seed=0, kernel=kernels.copy, stages=2):
    """Tiles that stick out on all sides; a jit function as a constexpr."""
    x, y = randn(100, 48, dtype=torch.bfloat16), unwritten(100, 48, dtype=torch.bfloat16)
    report = launch(kernel, (1,), descriptor(x, 32, 64), descriptor(y, 32, 64), -16, 5, double, STAGES=stages, seed=seed)
    assert torch.equal(y, 2 * x)
    return report


def run_heads(seed=0, kernel=kernels.transpose_heads):
    """Blocks with four dimensions; the last are clipped, so programs never write the same."""
    x, y = randn(2, 40, 3, 32), unwritten(2, 3, 40, 32)
    report = launch(kernel, (2, 3, 2), descriptor(x, 1, 32, 1, 32), descriptor(y, 1, 1, 32, 32), seed=seed)
    assert torch.equal(y, x.transpose(1, 2))
    return report


def run_product(seed=0, kernel=kernels.product, dtype=torch.bfloat16, rows=64):
    k = 128 // dtype.itemsize
    a, b, c = randn(rows, 4 * k, dtype=dtype), randn(72, 4 * k, dtype=dtype, seed=1), unwritten(rows, 72)
    report = launch(kernel, (triton.cdiv(rows, 64), 2), descriptor(a, 64, k), descriptor(b, 64, k), descriptor(c, 64, 64), 4,
                    STAGES=2, seed=seed)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, atol=1e-3, rtol=1e-4)
    return report


def run_attend(seed=0, kernel=kernels.attend):
    """P from registers, K and V as views of one allocation."""
    q, k, v = (randn(64, 64, dtype=torch.float16, seed=i) for i in range(3))
    out = unwritten(64, 64, dtype=torch.float16)
    report = launch(kernel, (1,), *(descriptor(x, 64, 64) for x in (q, k, v, out)), soft, seed=seed)
    expected = torch.exp2(q.double() @ k.double().T / 8) @ v.double()
    assert ((out.double() - expected).abs().max() / expected.abs().max()) < 2e-3
    return report


def run_turns(seed=0, kernel=kernels.turns):
    out = unwritten(32, 32)
    report = launch(kernel, (1,), out, 5, seed=seed)
    assert (out == 2 ** 6 - 1).all()
    return report


def run_sum_by_tma(seed=0, kernel=kernels.sum_by_tma):
    x, total = torch.arange(4096.0).view(4, 32, 32), torch.zeros(20, 24)
    report = launch(kernel, (4,), x, descriptor(total, 32, 32), seed=seed)
    assert torch.equal(total, x.sum(0)[:20, :24])
    return report


def run_sum_in_order(seed=0, kernel=kernels.sum_in_order, by_tma=False, **options):
    """Rounding shows the order."""
    x, total, turn = randn(4, 32, 32), torch.zeros(32, 32), torch.zeros(1, dtype=torch.int32)
    report = launch(kernel, (4,), x, descriptor(total, 32, 32) if by_tma else total, turn, N=32, BY_TMA=by_tma, seed=seed,
                    **{"ordered": ["total"], **options})
    assert torch.equal(total, x[0] + x[1] + x[2] + x[3])
    return report


def run_sum_in_order_by_tma(seed=0, kernel=kernels.sum_in_order):
    return run_sum_in_order(seed, kernel, by_tma=True)


def run_tickets(seed=0, kernel=kernels.by_tickets):
    out, counter = unwritten(10, 128), torch.zeros(1, dtype=torch.int32)
    report = launch(kernel, (3,), out, counter, 10, seed=seed)
    assert not out.isnan().any()
    assert counter.item() == 13
    return report


RUNS = [run_copy, run_heads, run_product, run_attend, run_turns, run_sum_by_tma, run_sum_in_order, run_sum_in_order_by_tma,
        run_tickets]


@pytest.mark.parametrize("run", RUNS)
def test_right_kernels_pass_every_schedule(run):
    for seed in SCHEDULES:
        run(seed)


@pytest.mark.parametrize("run", RUNS)
def test_every_planted_bug_is_found(run):
    kernel = run.__defaults__[1]
    for mutant in mutants(kernel, run().visited):
        for seed in range(8):
            try:
                run(seed, mutant)
            except Fault as found:
                if found.kind in ("crash", "unknown"):
                    pytest.fail(f"{mutant}: {found}")
                break
            except AssertionError:
                break
        else:
            pytest.fail(f"not found: {mutant}")


def fault(run, *args, seeds=8, kind=None, **options):
    """The message of the fault that a run shows under some schedule, of a kind if several are possible."""
    messages = {}
    for seed in range(seeds):
        try:
            run(seed, *args, **options)
        except Fault as found:
            messages.setdefault(found.kind, found.message)
    assert kind in messages, messages
    return messages[kind]


@pytest.mark.parametrize("run, function, what, source, kind, parts", [
    (run_copy, "store_tiles", "early arrival", "", "race",
     ["TMA load of load_tiles#1 at ", "writes tiles[0], while nothing orders it after load of tiles[0] by store_tiles#0 at "]),
    (run_copy, "store_tiles", "no wait", "tma.store_wait", "race",
     ["store of staging by store_tiles#0", "TMA store of store_tiles#0", "reads staging"]),
    (run_copy, "store_tiles", "no fence", "", "proxy", ["TMA store of store_tiles#0", "no proxy fence since store of staging"]),
    (run_copy, "ring", "no fence", "", "proxy", ["reads full[0]: no proxy fence since mbarrier.init of full[0] by copy#0 at "]),
    (run_copy, "ring", "count + 1", "empty", "deadlock",
     ["load_tiles#1 at ", "waits for parity 0 of empty[0] (phase 0: 1 of 2 arrivals and 0 bytes missing)"]),
    (run_copy, "ring", "always slot 0", "full", "barrier", ["full[1] at ", "is not initialised"]),
    (run_copy, "load_tiles", "half the bytes", "", "barrier", ["2048 bytes more than expected arrive at full[0] in phase 0"]),
    (run_copy, "load_tiles", "twice the bytes", "", "deadlock",
     ["store_tiles#0 at ", "waits for parity 0 of full[0] (phase 0: 0 of 1 arrivals and 4096 bytes missing)"]),
    (run_copy, "load_tiles", "other phase", "", "deadlock", ["load_tiles#1 at ", "waits for parity 0 of empty[0]"]),
    (run_copy, "load_tiles", "no wait", "", "race", ["TMA load of load_tiles#1", "writes tiles[0], while nothing orders it"]),
    (run_copy, "store_tiles", "one arrival more", "", "barrier", ["store_tiles#0 at ", "arrives 2 times at empty[0]"]),
    (run_copy, "store_tiles", "no wait", "mbarrier.wait", "race", ["load of tiles[0] by store_tiles#0", "TMA load of load_"]),
    (run_product, "multiply", "one more in flight", "(1,", "race",
     ["TMA load of load_operands#1", "writes a_tiles[0]", "wgmma of multiply#0", "reads a_tiles[0]"]),
    (run_product, "multiply", "no wait", "(0, deps", "unfinished",
     ["multiply#0", "uses the result of the wgmma of multiply#0 of (", "before a wait for it"]),
    (run_attend, "attend", "one more in flight", "", "unfinished", ["attend#0 at ", "uses the result of the wgmma"]),
    (run_turns, "take_turns", "a warp more", "sync", "barrier", ["take_turns#", "says 256 threads to named barrier"]),
    (run_turns, "take_turns", "no barrier", "arrive", "deadlock", ["take_turns#0", "named barrier 8 (128 of 256 threads"]),
    (run_sum_in_order, "sum_in_order", "no barrier", "", "race",
     ["load of total by sum_in_order#0 of (1, 0, 0)", "nothing orders it after store of total by sum_in_order#0 of (0, 0, 0)"]),
    (run_sum_in_order, "sum_in_order", "relaxed", "while", "race", ["load of total by sum_in_order#0 of (1, 0, 0)"]),
    (run_sum_in_order_by_tma, "sum_in_order", "no barrier", "", "race", ["TMA addition of sum_in_order#0", "adds to total"]),
    (run_sum_in_order_by_tma, "sum_in_order", "no wait", "", "unfinished", ["TMA addition of sum_in_order#0", "never waited"]),
])
def test_messages(run, function, what, source, kind, parts):
    mutant = next(m for m in mutants(run.__defaults__[1]) if (m.function, m.what) == (function, what) and source in m.source)
    message = fault(run, mutant, kind=kind)
    assert all(part in message for part in parts), message
    assert "examples.py:" in message or "bytes more" in message


# --- faults that no mutant of the kernels above shows -------------------------------------------------------------------

@pytest.mark.parametrize("kernel, kind, part", [
    (faulty.reads_unwritten, "unwritten", "reads tile[1], which nothing has written"),
    (faulty.reads_outside, "bounds", "element 128 of out [128] at faulty.py:"),
    (faulty.index_outside, "bounds", "index 2 of tile, which has 2"),
    (faulty.writes_twice, "race", "store of out by writes_twice#0 of ("),
    (faulty.waits_for_nobody, "deadlock", "only spinning: waits_for_nobody#0 of (0, 0, 0)"),
    (faulty.outruns, "phase", "phase 1 of barrier can complete before sleeper#0"),
    (faulty.wrong_rank, "type", "their ranks differ"),
    (faulty.arange_without_layout, "type", "tl.arange at faulty.py:"),
    (faulty.not_simulated, "unknown", "histogram at faulty.py:"),
    (faulty.unknown_instruction, "unknown", "instruction 'lop3.b32 $0, $1, $1, $1, 3' at "),
    (faulty.taken_twice, "unfinished", "which another wgmma has accumulated into"),
    (faulty.odd_sizes, "type", "block of shape [48] at faulty.py:"),
    (faulty.transposed_fp8, "type", "must be contiguous along k"),
])
def test_other_faults(kernel, kind, part):
    grid = (2,) if kernel in (faulty.writes_twice, faulty.waits_for_nobody) else (1,)
    assert part in fault(lambda seed: launch(kernel, grid, torch.zeros(128), seed=seed), kind=kind)


def test_stores_reach_tma_through_a_fence_only():
    x = torch.zeros(32, 32)
    message = fault(lambda seed: launch(faulty.taken_by_tma, (1,), descriptor(x, 32, 32), x.view(-1), seed=seed), kind="proxy")
    assert "reads source: no proxy fence since store of out by taken_by_tma#0" in message


def test_inline_assembly():
    out = unwritten(128)
    launch(kernels.by_assembly, (1,), out)
    assert (out == 2).all()


def test_additions_need_an_order_only_where_asked():
    unordered = next(m for m in mutants(kernels.sum_in_order) if m.what == "relaxed")
    with pytest.raises(Fault, match=r"race.*adds to total"):
        run_sum_in_order(0, unordered, by_tma=True)
    run_sum_in_order(0, unordered, by_tma=True, ordered=[])


# --- harmless changes, numbers, legality --------------------------------------------------------------------------------


def test_harmless_changes_pass():
    """Fewer programs at a time; one slot, which is always slot 0, or more; fp8."""
    one_slot = [mutant for mutant in mutants(kernels.copy) if mutant.what == "always slot 0"]
    for seed in SCHEDULES:
        run_copy(seed, one_slot[seed % len(one_slot)], stages=1)
        run_copy(seed, stages=3)
        run_sum_in_order(seed, resident=1)
        run_sum_in_order(seed, by_tma=True, resident=2)
    run_product(dtype=torch.float8_e4m3fn, rows=100)


def test_arithmetic_is_the_device_s():
    x = randn(64, dtype=torch.bfloat16)
    n = torch.randint(-2 ** 31, 2 ** 31, (64,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    floats, integers = unwritten(6, 64), torch.zeros(6, 64, dtype=torch.int32)
    launch(kernels.arithmetic, (1,), x, n, floats, integers)
    f, at = x.float(), torch.arange(64)
    torch.testing.assert_close(floats[0], (x * x.flip(0) + x).float(), atol=0, rtol=0)
    torch.testing.assert_close(floats[1], f / f.flip(0), atol=0, rtol=0)
    torch.testing.assert_close(floats[2], f.sum() + f.max() * f.min() + at)
    torch.testing.assert_close(floats[3], (f * 300).clamp(-448, 448).to(torch.float8_e4m3fn).float(), atol=0, rtol=0)
    torch.testing.assert_close(floats[4], torch.where(at < 5, torch.exp2(f), 3.0))
    torch.testing.assert_close(floats[5], torch.where(at > 9, f, -1.0), atol=0, rtol=0)
    rounded_to_zero = torch.div(n.long(), 7, rounding_mode="trunc")
    expected = [rounded_to_zero, n.long() - 7 * rounded_to_zero, n.long() // 7, n * 0x7654321,
                (n.long() & 0xFFFFFFFF) >> 3, x.view(torch.int16)]
    for row, values in zip(integers, expected, strict=True):
        assert torch.equal(row, values.int())


def test_leaf_functions_of_the_gpu_backends():
    x, out, lse = randn(64, 128), unwritten(64, 64), unwritten(64)
    launch(kernels.softmax_of, (1,), x, out, lse)
    p = x.tanh().softmax(1)
    torch.testing.assert_close(out, p[:, :64] + p[:, 64:])
    torch.testing.assert_close(lse, x.tanh().logsumexp(1))


@pytest.mark.parametrize("rows, warps", [(64, 4), (64, 8), (32, 8)])
def test_dropout(rows, warps):
    source, threshold = rng.Rng(0x123456789ABCDEF, offset=5, first_sequence=2).tensor("cpu"), rng.threshold(0.3)
    i, j = torch.arange(96, 96 + rows)[:, None], torch.arange(64, 192)[None, :]
    expected = rng.keep(source, threshold, torch.tensor(0), torch.tensor(3), 7, i, j)
    out = torch.zeros(rows, 128, dtype=torch.bool)
    launch(kernels.kept, (1,), source, out, threshold, 3, 7, 96, 64, rows, 128, num_warps=warps)
    assert torch.equal(out, expected)


def case(kernel, constants, **signature):
    return types.SimpleNamespace(name=kernel.fn.__name__, arch="sm_90", kernel=kernel, signature=signature, constants=constants,
                                 unaligned=frozenset(), num_warps=4, num_stages=1)


def block(kind, *shape):
    bits = {"bf16": 16, "fp32": 32}[kind]
    return f"tensordesc<{kind}{list(shape)},{layout(bits, shape)!r}>"


@pytest.mark.parametrize("kernel, constants, signature", [
    (kernels.product, {"STAGES": 2},
     {"a": block("bf16", 64, 64), "b": block("bf16", 64, 64), "c": block("fp32", 64, 64), "n": "i32"}),
    (kernels.sum_in_order, {"N": 32, "BY_TMA": True}, {"x": "*fp32", "total": block("fp32", 32, 32), "turn": "*i32"}),
    (kernels.kept, {"ROWS": 64, "COLS": 128},
     {"seeds": "*i64", "out": "*i1", **dict.fromkeys(
         ("threshold", "h", "heads", "first_row", "first_col"), "i32")}),
    (kernels.transpose_heads, {}, {"source": block("fp32", 1, 32, 1, 32), "target": block("fp32", 1, 1, 32, 32)}),
    (kernels.softmax_of, {}, {"x": "*fp32", "out": "*fp32", "sums": "*fp32"}),
    (kernels.arithmetic, {}, {"x": "*bf16", "i": "*i32", "floats": "*fp32", "integers": "*i32"}),
])
def test_what_runs_here_compiles(kernel, constants, signature):
    build(case(kernel, constants, **signature))
