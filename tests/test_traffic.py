"""Traffic in closed form against counts of torch operations, the paper's printed numbers, rooflines, and the command line."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from support import results
from typer.testing import CliRunner

import tilewise as tw
from tilewise import costs, devices
from tilewise.cli import app
from tilewise.costs import PLAIN, Blocks, Extras, Moved, Sizes, dense_walk
from tilewise.traffic import ncu, paper, roofline, slopes
from tilewise.traffic.operations import Counting, counted_standard
from tilewise.traffic.result import published
from tilewise.traffic.shapes import Shape, tiles_of


def gb(n):
    return n / 1e9


# ---- standard attention: closed forms against operations, counted ------------------------------------------------------

EXTRAS = {"plain": PLAIN, "fill": Extras("fill", 3 * 40), "add": Extras("add", 3 * 40 * 2), "dropout": Extras(dropout=True),
          "scale": Extras(scale=True), "all": Extras("fill", 3 * 40, True, True)}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", EXTRAS)
def test_standard_attention_moves_what_the_form_says(name, backward):
    s = Sizes(3, 2, 2, 56, 40, 16, 24)
    form = costs.standard_forward(s, EXTRAS[name]) + (costs.standard_backward(s, EXTRAS[name]) if backward else Moved())
    counted = counted_standard(s, EXTRAS[name], backward)
    assert sum(counted.read.values()) == sum(form.read.values())
    assert sum(counted.written.values()) == sum(form.written.values())


def test_standard_attention_in_units_of_the_paper():
    s = Sizes.square(2, 3, 64, 16)
    a, x = s.scores * 2, s.q
    assert costs.standard_forward(s).total == 4 * a + 4 * x
    assert costs.standard_backward(s).total == 7 * a + 8 * x


def test_counting_operations_views_expansion_and_memory():
    with Counting() as counted:
        x = torch.empty(8, 4, device="meta")
        y = x.t()[:2] + torch.empty(4, 1, device="meta").expand(4, 8)[:2]
        peak = counted.peak
        del x, y
        torch.empty(1, device="meta")
    assert counted.read["add"] == 2 * 8 * 4 + 2 * 4
    assert counted.written["add"] == 2 * 8 * 4
    assert peak == 4 * (32 + 4 + 16)
    assert counted.in_use == 0
    assert counted.peak == peak


# ---- FlashAttention's and FlashAttention-2's counts ----------------------------------------------------------------------

def test_theorem_2_and_5_of_flash_attention():
    """2 X + 3 Tc X and 4 X + 5 Tc X (proofs of Theorems 2 and 5), and l and m."""
    s, blocks = Sizes.square(2, 4, 1024, 64), Blocks(64, 256)
    row = s.rows * 4
    assert costs.flash1_forward(s, blocks).total == 2 * s.q + 4 * 3 * s.q + 4 * 4 * row
    assert costs.flash1_backward(s, blocks).total == 4 * s.q + 4 * 5 * s.q + 4 * 2 * row


def walked(s, blocks):
    """Algorithm 2's loads and stores in the order in which it does them, in bytes."""
    total = 0
    for _ in range(s.batch * s.heads):
        for first in range(0, s.seqlen_k, blocks.k):
            total += min(blocks.k, s.seqlen_k - first) * 2 * s.head_dim * s.itemsize
            for row in range(0, s.seqlen_q, blocks.q):
                rows = min(blocks.q, s.seqlen_q - row)
                total += rows * (3 * s.head_dim * s.itemsize + 4 * 4)
    return total


def test_flash_attention_forward_is_its_loops():
    s, blocks = Sizes.square(1, 2, 100, 16), Blocks(16, 48)
    assert costs.flash1_forward(s, blocks).total == walked(s, blocks)


def test_block_sparse_cost_is_in_proportion():
    """Proposition 4: what depends on the tiles falls with their share, K and V do not."""
    s, blocks = Sizes.square(1, 2, 4096, 64), Blocks(64, 256)
    once = s.k + s.v
    dense, sparse = costs.flash1_forward(s, blocks), costs.flash1_forward(s, blocks, share=0.125)
    assert sparse.total - once == pytest.approx((dense.total - once) / 8, rel=1e-6)


def test_no_algorithm_is_below_the_bound():
    """Proposition 3 for ours: N² d² / M elements, at M = 4 d B, are a lower bound up to a constant, here below it."""
    for side in (16, 64, 256):
        s = Sizes.square(1, 1, 4096, 64)
        moved = costs.flash2_forward(s, dense_walk(s, Blocks(side, side))).total / s.itemsize
        bound = costs.lower_bound(s, 4 * 64 * side)
        assert bound < moved < 16 * bound


def test_paper_blocks():
    assert costs.paper_blocks(192 * 1024 // 2, 64) == Blocks(64, 384)
    assert costs.paper_blocks(192 * 1024 // 2, 128) == Blocks(128, 192)


def test_flash_attention_2_divides_less():
    s, blocks = Sizes.square(1, 1, 2048, 64), Blocks(128, 128)
    first, second = costs.flash1_work(s, blocks), costs.flash2_work(s, blocks)
    assert first.products == second.products
    assert second.arithmetic < first.arithmetic


# ---- the paper's figures ------------------------------------------------------------------------------------------------

def test_figure_2_left():
    """The printed 40.3 GB are standard attention's with an added mask and dropout, 4.4 GB FlashAttention's with O, l, m and dQ
    set first."""
    printed = {(p.version, p.method): p.value for p in published("figure2-left") if p.unit == "GB"}
    rows = {row["case"]: row for row in paper.table(devices.device("A100-40"))["rows"]}

    def total(case):
        return gb(rows[case]["contenders"]["closed form"]["count"])

    assert total("standard, added mask, dropout") == pytest.approx(printed["arXiv", "standard"], rel=0.005)
    assert total("FlashAttention, B_c 384, zeroed") == pytest.approx(printed["arXiv", "flash"], rel=0.01)
    assert total("standard, masked") == pytest.approx(printed["NeurIPS", "standard"], rel=0.05)
    for row in rows.values():
        if "counted" in row["contenders"]:
            assert row["contenders"]["counted"] == row["contenders"]["closed form"]


def test_figure_2_middle_and_right():
    found = paper.figure2(devices.device("A100-40"))["rows"]
    blocks = [row for row in found if row["part"] == "block size"]
    moved = [row["contenders"]["closed form"]["count"] for row in blocks]
    assert moved == sorted(moved, reverse=True)
    bounded = [row["setting"]["block_k"] for row in blocks if row["setting"]["slow_memory_s"] <= row["setting"]["arithmetic_s"]]
    assert min(bounded) == 256                                              # where the paper's curve flattens
    sparse = [row for row in found if row["part"] == "block-sparse"]
    dense = sparse[0]["contenders"]["closed form"]["seconds"]
    for row in sparse[1:]:
        share = row["contenders"]["closed form"]["seconds"] / dense
        assert row["setting"]["density"] < share < row["setting"]["density"] + 0.05


def test_memory_is_linear_and_many_times_less():
    rows = {row["setting"]["seqlen"]: row["contenders"] for row in paper.memory()["rows"]}
    q = torch.empty(64, dtype=torch.float16).expand(16, 4096, 8, 64)
    inputs_and_results = 8 * 16 * 4096 * 8 * 64 * 2
    own = tw.explain(q, q, q, backend="tiled").workspace[1]
    assert rows[4096]["tilewise"]["bytes"] <= inputs_and_results + own                      # tiled holds tiles too
    assert rows[65536]["tilewise"]["bytes"] == 512 * rows[128]["tilewise"]["bytes"]
    assert rows[2048]["standard"]["bytes"] > 10 * rows[2048]["tilewise"]["bytes"]
    assert rows[4096]["standard"]["bytes"] > 20 * rows[4096]["tilewise"]["bytes"]


# ---- devices, rooflines, exponents --------------------------------------------------------------------------------------

def test_devices_have_sources_and_rates():
    for found in devices.table().values():
        assert found.source
        assert found.products["half"] > found.products["fp32"] > 0
        assert found.exponentials < found.arithmetic
    assert devices.device("h200").exponentials == pytest.approx(3.9e12, rel=0.02)    # as the FlashAttention-3 paper says
    with pytest.raises(ValueError, match=r"device: expected cpu or one of A100-40, .*, got 'abacus'"):
        devices.device("abacus")


def test_this_cpu_is_measured(one_thread):
    found = devices.this_cpu()
    assert found.products["fp32"] > found.arithmetic / 4 > 0
    assert found.products["half"] > 0.8 * found.products["fp32"]
    assert min(found.bandwidth, found.exponentials) > 0
    x = torch.randn(512, 512)
    assert 2 * 512**3 / devices.seconds(lambda: x @ x) < 1.25 * found.products["fp32"]       # nothing is above the roof
    scores = torch.randn(1 << 14)
    assert len(scores) / devices.seconds(scores.exp) < 1.25 * found.exponentials


def test_rooflines_say_what_bounds():
    h200 = devices.device("H200")

    def estimate(shape, backward=False):
        problem, x = shape.described()
        return roofline.standard(problem, h200, backward), roofline.tilewise(problem, x, h200, backward, shape.splits)

    standard, ours = estimate(Shape(8192, heads=16, head_dim=128))
    assert (standard.bound, ours.bound) == ("slow memory", "products")
    assert ours.time == pytest.approx(4 * 16 * 8192**2 * 128 / 989.4e12)
    _, decode = estimate(Shape(1, 65536, heads=16, kv_heads=2, head_dim=128, splits=32))
    assert decode.bound == "slow memory"
    keys_and_values = 2 * 2 * 65536 * 128 * 2
    assert decode.time == pytest.approx(keys_and_values / 4.8e12, rel=0.02)
    _, narrow = estimate(Shape(8192, heads=16, head_dim=16))
    assert narrow.bound == "exponentials"
    causal = estimate(Shape(8192, heads=16, head_dim=128, causal=True))[1]
    assert 0.5 < causal.time / ours.time < 0.52


def test_rooflines_of_what_was_measured(tmp_path):
    """A row for each algorithm, shape and pass that a roofline is for; on a CPU the backward has 2.5 times the products."""
    data = results.attention("cpu")
    for row in data["rows"]:
        row["setting"]["causal"] = row["setting"]["mask"] == "causal"
    data["rows"] = [row for row in data["rows"] if row["setting"]["seqlen"] == 2048]
    (tmp_path / "a.json").write_text(json.dumps(data))
    done = CliRunner().invoke(app, ["traffic", "roofline", "--of", str(tmp_path / "a.json"), "--device", "cpu", "--out",
                                    str(tmp_path / "r.json"), "--svg", str(tmp_path / "r.svg")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len({row["case"] for row in rows}) == len(rows) == 8
    flops = {(s["algorithm"], s["mode"], s.get("causal", False)): s["flops"] for s in (row["setting"] for row in rows)}
    for causal in (False, True):
        assert flops["Tilewise", "forward+backward", causal] == pytest.approx(3.5 * flops["Tilewise", "forward", causal])
    assert flops["Tilewise", "forward", True] < 0.6 * flops["Tilewise", "forward", False]
    found = CliRunner().invoke(app, ["report", str(tmp_path / "a.json"), str(tmp_path / "r.json"), "--markdown", "--section",
                                     "roofline"])
    assert found.exit_code == 0, found.output
    (tmp_path / "a.json").write_text(json.dumps(results.memory()))
    done = CliRunner().invoke(app, ["traffic", "roofline", "--of", str(tmp_path / "a.json")])
    assert "--of: expected a result of `tilewise bench attention`" in done.output


def test_exponents_of_a_law_come_out():
    points = [(n, d, m, 3 * n**2 * d**2 // m) for n in (64, 128, 256) for d in (16, 32) for m in (64, 128)]
    fit = slopes.fit("law", points)
    assert fit.off < 1e-9
    assert max(fit.errors.values()) < 1e-9
    noisy = slopes.fit("noisy", [(n, d, m, b * (1 + 0.1 * math.sin(i))) for i, (n, d, m, b) in enumerate(points)])
    assert all(abs(noisy.exponents[name] - slopes.THEORY[name]) < 4 * noisy.errors[name] for name in slopes.THEORY)
    assert min(noisy.errors.values()) > 0.001


def test_exponents_of_everything_moved_at_long_sequences():
    from tilewise.traffic.commands import asymptotic

    for fit in asymptotic():
        assert fit.off < 0.02, fit.part


# ---- measured, the command line -----------------------------------------------------------------------------------------

NCU = '''==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","forward_entry","dram__bytes_read.sum","Mbyte","1,234.5"
"0","1","forward_entry","dram__bytes_write.sum","Kbyte","12.5"
"1","1","preprocess_entry","dram__bytes_read.sum","byte","7"
==PROF== Disconnected
'''


def test_what_ncu_prints_is_read():
    assert ncu.parse(NCU.splitlines()) == [
        {"name": "forward_entry", "read": 1_234_500_000, "written": 12_500},
        {"name": "preprocess_entry", "read": 7, "written": 0}]
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        ncu.parse(["==ERROR== no leave"])


@pytest.mark.skipif(ncu.missing() is None, reason="ncu is here")
def test_measuring_without_a_gpu_says_why():
    done = CliRunner().invoke(app, ["traffic", "measure"])
    assert done.exit_code == 2
    assert "DRAM traffic is measured" in done.output


@pytest.mark.parametrize("arguments, words", [
    (["table", "--device", "abacus"], "device: expected cpu or one of"),
    (["count", "--tiles", "60,64"], "tiles: expected powers"),
    (["count", "--tiles", "64"], 'tiles: expected "queries,keys"'), (["count", "--dtype", "int8"], "dtype: expected one of"),
    (["roofline", "--mask", "nonsense("], "Error"), (["memory", "--png", "x.svg"], "--png: expected a file that ends in .png"),
    (["roofline", "--device", "T4", "--dtype", "float32", "--head-dim", "512"], "no forward kernel is shipped")])
def test_wrong_arguments_are_one_line(arguments, words):
    done = CliRunner().invoke(app, ["traffic", *arguments])
    assert done.exit_code == 2
    assert words in done.output.replace("\n", " ")
    assert "Traceback" not in done.output


def test_tables_pictures_and_files(tmp_path):
    pytest.importorskip("matplotlib")
    out, svg, png = tmp_path / "f.json", tmp_path / "f.svg", tmp_path / "f.png"
    done = CliRunner().invoke(app, ["traffic", "figure2", "--out", str(out), "--svg", str(svg), "--png", str(png)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["benchmark"] == "traffic"
    assert len({row["case"] for row in found["rows"]}) == len(found["rows"])
    assert "GPT-2 medium" in svg.read_text()
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert all(line in done.output for line in found["lines"])


def test_count_runs_in_a_process_of_its_own(tmp_path):
    """Started where Triton does not interpret, as a user's shell is."""
    pytest.importorskip("triton")
    out = tmp_path / "count.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = "from tilewise.cli import app; app()"
    arguments = ["traffic", "count", "--seqlen-q", "40", "--causal", "--tiles", "32,32", "--head-dim", "32", "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["contenders"]["counted"]["count"] == row["contenders"]["closed form"]["count"]
    keys = 32 + 40                                                          # the two blocks of queries see so many
    assert row["setting"]["read"] == {"k": keys * 64, "q": 40 * 64, "v": keys * 64}


def test_tiles_of_text():
    assert tiles_of("128, 64") == Blocks(128, 64)
