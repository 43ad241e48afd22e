"""What machine code says of a warp-specialised kernel: whether softmax overlaps with products, which unit is busiest."""

import os
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton cannot compile while it interprets", allow_module_level=True)

from rich.console import Console
from typer.testing import CliRunner

from tilewise import cli, inspect
from tilewise.backends.hopper import aot
from tilewise.cli import app
from tilewise.inspect import matrix, model, sass

SCORES = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT"
VALUES = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR16].tnspB, R88, gsb0"
ONE_LEFT, ALL_DONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXP = "MUFU.EX2 R3, R4"


def loop(*texts):
    return sass.Loop(tuple(sass.Instruction(16 * i, text) for i, text in enumerate(texts)))


@pytest.mark.parametrize("body, overlap", [
    ([SCORES, VALUES, ONE_LEFT, EXP, "@P0 " + EXP, ALL_DONE], (2, 2)),
    ([SCORES, VALUES, ONE_LEFT, ALL_DONE, EXP, EXP], (0, 2)),           # what ptxas makes of a plain kernel
    ([SCORES, VALUES, ONE_LEFT, EXP, "MUFU.RCP R3, R4", ALL_DONE, EXP, EXP], (1, 3)),
    ([EXP, SCORES, VALUES, ONE_LEFT, EXP, ALL_DONE], (1, 2)),           # the first runs after the trip before waited for all
    ([EXP, ALL_DONE, EXP, SCORES, VALUES, ONE_LEFT, EXP], (2, 3)),      # the same loop, begun elsewhere
    ([SCORES, VALUES, ONE_LEFT, EXP, ALL_DONE, SCORES, VALUES, ONE_LEFT, ALL_DONE], (1, 1)),
    ([SCORES, ALL_DONE, EXP, VALUES, ALL_DONE], None),                  # not meant to overlap
    ([SCORES, VALUES, ONE_LEFT, EXP], None),
    ([SCORES, VALUES, ONE_LEFT, ALL_DONE], None),
    (["MUFU.EX2 R3, R4", "DEPBAR.LE SB0, 0x1", "DEPBAR.LE SB0, 0x0"], None),    # waits for other copies
])
def test_exponentials_overlap_between_the_wait_for_one_and_the_wait_for_all(body, overlap):
    assert loop(*body).overlap == overlap


def test_the_loop_that_overlaps_least_counts():
    half, most, none = [loop(SCORES, VALUES, ONE_LEFT, *[EXP] * early, ALL_DONE, *[EXP] * late)
                        for early, late in ((1, 1), (9, 3), (0, 0))]
    assert sass.least_overlap([most, half, none]) == (1, 2)
    assert sass.least_overlap([none]) is None


def test_wgmma_takes_half_its_columns_in_cycles_and_reads_operands_from_shared_memory():
    scores, values = loop(SCORES, VALUES).body
    assert model.tensor_cycles(scores) == model.tensor_cycles(values) == 64 * 128 * 16 / 2048
    assert model.shared_bytes(scores) == 2 * (64 + 128) * 16
    assert model.shared_bytes(values) == 2 * 128 * 16
    tf32 = loop("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR16], RZ, !UPT").body[0]
    assert model.tensor_cycles(tf32) == 64 * 64 * 8 / 1024
    assert model.shared_bytes(tf32) == 4 * (64 + 64) * 8


@pytest.mark.parametrize("text, bytes_of_a_thread", [
    ("LDS R2, [R3]", 4), ("LDS.64 R2, [R3+0x8]", 8), ("@P1 STS.128 [R0+UR38], R24", 16), ("STSM.16.M88.4 [R6], R12", 16),
    ("LDSM.16.MT88.2 R2, [R6]", 8), ("STG.E desc[UR50][R2.64], R5", 0), (EXP, 0),
])
def test_loads_and_stores_of_shared_memory(text, bytes_of_a_thread):
    assert model.shared_bytes(loop(text).body[0]) == 128 * bytes_of_a_thread


def test_bytes_of_a_descriptors_block():
    assert model.block_bytes("tensordesc<bf16[1, 1, 128, 64],NVMMASharedLayout(rank=4)>") == 128 * 64 * 2
    assert model.block_bytes("tensordesc<fp32[1, 1, 64, 64],NVMMASharedLayout(rank=4)>") == 64 * 64 * 4
    assert model.block_bytes("tensordesc<fp8e4nv[1, 1, 64, 128],NVMMASharedLayout(rank=4)>") == 64 * 128
    with pytest.raises(ValueError, match="expected the type of a TMA descriptor"):
        model.block_bytes("*bf16")


@pytest.fixture(scope="module")
def forward():
    """A case and what was made of it."""
    case = next(case for case in aot.shipped() if case.name == "hopper forward d128 full")
    return case, inspect.build(case)


def test_a_compiled_forward_overlaps_and_its_row_says_so(forward):
    case, compiled = forward
    report = inspect.examine(compiled, case)
    row = matrix._numbers(report)
    assert report.setmaxnreg
    assert row["setmaxnreg"]
    assert row["overlap"] == list(report.overlap)
    assert report.overlap[0] > report.overlap[1] / 2 > 0
    assert inspect.failures(report, case) == []

    early = loop(SCORES, VALUES, ONE_LEFT, EXP, ALL_DONE, EXP)
    late = loop(SCORES, VALUES, ONE_LEFT, EXP, ALL_DONE, EXP, EXP, EXP, EXP)
    assert inspect.failures(replace(report, loops=(early,)), case) == []
    lost = replace(report, loops=(early, late), setmaxnreg=False)
    assert inspect.failures(lost, case) == ["partitions without setmaxnreg", "only 1 of 5 exponentials overlap with wgmma"]
    unspecialised = replace(lost, warps=case.num_warps, spills=0)
    assert inspect.failures(unspecialised, case) == []
    plain = matrix._numbers(replace(lost, loops=()))
    assert not {"overlap", "setmaxnreg"} & set(plain)


def test_the_model_of_a_compiled_forward(forward):
    case, compiled = forward
    rows, cols, dim = 128, case.constants["BLOCK_N"], case.constants["BLOCK_D"]
    masked, whole = model.trips(compiled, case)
    for trip in (masked, whole):
        assert len(trip.loops) == case.constants["BLOCK_M"] // 64
        assert trip.flops == 4 * rows * cols * dim
        assert trip.cycles["tensor"] == trip.flops / 4096
        assert trip.cycles["MUFU"] >= rows * cols / 16
        assert trip.cycles[trip.busiest] == max(trip.cycles.values())
        assert trip.ceiling <= 132 * 4096 * 1.98e9
    assert len(masked.loops[0].body) > len(whole.loops[0].body)
    operands = 2 * (rows * dim + 2 * (2 * cols * dim))      # Q once; K and V by either warpgroup
    loaded = 2 * 2 * cols * dim
    assert whole.cycles["shared"] == (operands + loaded) / 128
    assert whole.cycles["tensor"] == max(whole.cycles.values())
    assert model.table([(case, masked), (case, whole)]).row_count == 2


def test_probabilities_in_fp8_stay_in_registers(forward):
    """Products of 32 columns a step; what shuffles is the maximum and the sum of rows, as without fp8."""
    case = next(case for case in aot.shipped() if case.name == "hopper forward d128 fp8 full")
    compiled = inspect.build(case)
    report = inspect.examine(compiled, case)
    assert inspect.failures(report, case) == []
    assert report.overlap[0] == report.overlap[1]
    whole, plain = (model.trips(of, which)[1] for of, which in ((compiled, case), (forward[1], forward[0])))
    for narrow, wide in zip(whole.loops, plain.loops, strict=True):
        count, of_plain = (Counter(i.opcode.split(".")[0] for i in loop.body) for loop in (narrow, wide))
        assert count["QGMMA"] == of_plain["HGMMA"] / 2 == 128 // 32 + 128 // 32
        assert count["SHFL"] == of_plain["SHFL"]
        assert count["STS"] == count["STSM"] == count["LDSM"] == 0
        assert count["F2FP"] == 64 // 2                 # two numbers each, of which two make up a register
    assert whole.cycles["tensor"] == plain.cycles["tensor"] / 2


def test_the_command_prints_the_model_and_refuses_other_gpus(forward, monkeypatch):
    monkeypatch.setattr(cli, "console", Console(width=200))
    run = CliRunner().invoke(app, ["inspect", "--model", "--filter", forward[0].name])
    assert run.exit_code == 0, run.output
    assert run.output.count(forward[0].name) == 2
    assert "not a measurement" in run.output
    refused = CliRunner().invoke(app, ["inspect", "--model", "--arch", "sm_80"])
    assert refused.exit_code == 2
    assert "expected --arch sm_90, got sm_80" in refused.output
