"""The command line: quick to answer, plain about errors, and never an interpreter of what it is given."""

import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import tilewise as tw
from tilewise import cli
from tilewise.cli import app
from tilewise.draw import of_one_head
from tilewise.mask_text import parse_mask, read_mask

GATES = Path(__file__).parents[1] / "results/gates.json"


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_help_names_every_command():
    code, output = call("--help")
    assert code == 0
    for command in ("demo", "explain", "mask", "inspect", "doctor"):
        assert command in output


@pytest.mark.parametrize("command", ["demo", "explain", "mask"])
def test_every_command_shows_an_example(command):
    code, output = call(command, "--help")
    assert code == 0
    assert f"tilewise {command} " in output


def test_version():
    from importlib.metadata import version

    assert call("--version") == (0, f"tilewise {version('tilewise')}\n")


def test_mask_draws_what_is_visible():
    code, output = call("mask", "causal() & window(1, 0)", "--rows", 4)
    assert code == 0
    assert output.splitlines()[:4] == ["■ · · ·", "■ ■ · ·", "· ■ ■ ·", "· · ■ ■"]


def test_mask_counts_its_tiles():
    _, output = call("mask", "causal()", "--rows", 16, "--tile", 4)
    assert "4 x 4 tiles: 6 skipped, 4 masked, 6 computed whole: 62.5% of the work of full attention" in output


@pytest.mark.parametrize("part, whole, words", [(0, 9, "0%"), (9, 9, "100%"), (1, 9999, "<0.1%"), (9998, 9999, ">99.9%"),
                                                (1, 8, "12.5%")])
def test_shares_do_not_round_to_nothing_or_everything(part, whole, words):
    assert cli.share(part, whole) == words


def on_a_terminal(monkeypatch, *arguments, **options):
    options = dict(force_terminal=True, color_system="256", no_color=False, highlight=False, width=80) | options
    monkeypatch.setattr(cli, "console", Console(**options))
    return CliRunner().invoke(app, [str(argument) for argument in arguments]).output


def test_mask_is_coloured_by_the_class_of_its_tiles(monkeypatch):
    lines = on_a_terminal(monkeypatch, "mask", "causal()", "--rows", 4, "--tile", 2).splitlines()
    blue, orange, grey = "\x1b[38;5;33m■\x1b[0m", "\x1b[38;5;214m■\x1b[0m", "\x1b[38;5;244m·\x1b[0m"
    assert lines[3] == " ".join([blue, blue, orange, orange])
    assert lines[0] == " ".join([orange, grey, grey, grey])
    assert lines[5] == f"{blue} visible in a tile computed whole   {orange} visible in a masked tile   {grey} hidden"


def test_mask_is_plain_without_colour(monkeypatch):
    output = on_a_terminal(monkeypatch, "mask", "causal()", "--rows", 4, no_color=True)
    assert "\x1b" not in output
    assert "■ visible   · hidden" in output
    assert "\x1b" not in CliRunner().invoke(app, ["mask", "causal()"]).output      # not a terminal


@pytest.mark.parametrize("width, rows, drawn", [(80, 40, True), (80, 41, False), (200, 100, True), (200, 101, False)])
def test_mask_is_not_drawn_wider_than_the_terminal(monkeypatch, width, rows, drawn):
    output = on_a_terminal(monkeypatch, "mask", "full()", "--rows", rows, width=width)
    assert ("■" in output) == drawn
    assert ("--png FILE" in output) != drawn
    assert "100% of the work" in output


@pytest.mark.parametrize("arguments, drawn", [(("--rows", 64), True), (("--rows", 65), False), (("--cols", 65), False)])
def test_mask_is_drawn_up_to_64_where_there_is_no_terminal(arguments, drawn):
    _, output = call("mask", "full()", *arguments)
    assert ("■" in output) == drawn
    assert ("too many to draw as text here: --png FILE" in output) != drawn


def test_mask_counts_at_a_length_that_could_not_be_drawn(monkeypatch):
    monkeypatch.setattr(tw.Mask, "dense", None)
    code, output = call("mask", "causal()", "--at", 131072, "--tile", 128)
    assert code == 0
    assert "131,072 queries x 131,072 keys: 1,048,576 tiles of 128 x 128" in output
    assert re.search(r"skipped +50\.0% +523,776\n +masked +<0\.1% +1,024\ncomputed whole +50\.0% +523,776", output)
    assert re.search(r"50\.0% of the work of full attention, found in \S+ s ", output)
    assert "■" not in output


def test_mask_counts_tiles_of_128_at_a_length():
    _, output = call("mask", "blocks(butterfly(64), 128)", "--at", 8192)
    assert "4,096 tiles of 128 x 128" in output
    assert re.search(r"computed whole +10\.9% +448", output)       # 7 blocks in each row of 64


def test_mask_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    code, _ = call("mask", "causal()", "--png", tmp_path / "mask.png")
    assert code == 0
    assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("rows, cols", [(1500, 1500), (1, 4096), (4096, 1)])
def test_pictures_of_large_and_narrow_masks_have_the_size_of_others(tmp_path, rows, cols):
    pytest.importorskip("matplotlib")
    code, output = call("mask", "causal() & window(2, 0)", "--rows", rows, "--cols", cols, "--png", tmp_path / "mask.png")
    assert code == 0
    assert "Drawn: " in output
    assert "too many" not in output
    width, height = (int.from_bytes((tmp_path / "mask.png").read_bytes()[start:start + 4], "big") for start in (16, 20))
    assert 500 < width < 1200
    assert 150 < height < 3000


def test_no_line_is_lost_in_a_picture_of_a_large_mask():
    from tilewise.draw import _picture

    shown = torch.zeros(4000, 4000, dtype=torch.uint8)
    shown[:, 777] = 2
    picture, step = _picture(shown)
    assert step == 5
    assert (picture[:, 155, 0] < picture[:, 154, 0]).all()


@pytest.mark.parametrize("text, same", [
    ("causal() | prefix(3)", "prefix([3]) | causal()"),
    ("~causal()", "full() & ~causal()"),
    ("window(2, None) & causal()", "window(left=2, right=0)"),
    ("documents([0, 0, 1, 1, -1, -1])", "documents([7, 7, 3, 3, -1, -2])"),
    ("chunked(3)", "documents([0, 0, 0, 1, 1, 1])"),
    ("key_lengths(4)", "prefix(4)"),
    ("documents([0, 0, 1, 1, 1, 1], ids_k=[0, 1, 0, 1, 0, 0])",
     "documents(ids_q=[5, 5, 6, 6, 6, 6], ids_k=[5, 6, 5, 6, 5, 5])"),
    ("tree([-1, 0, 1, 2, 3, 4])", "causal()"),
    ("tree(parents=[-1, -1, -1, -1, -1, -1])", "window(0, 0)"),
    ("blocks(local(3, 0), 2)", "chunked(2)"),
    ("blocks(local(n=3, blocks=0), size=[2, 2])", "chunked(2)"),
    ("causal() & blocks(strided(2, 1), [3, 6])", "causal()"),
    ("blocks(axial(2, 3), 1)", "blocks(local(2, 0), 3) | blocks(strided(6, 3), 1)"),
    ("~blocks(global_blocks(2, 1), 3)", "~prefix(3) & ~blocks(strided(2, 1) & global_blocks(2, 1), 3)"),
])
def test_masks_as_text_mean_what_they_say(text, same):
    assert parse_mask(text).draw(6, 6) == parse_mask(same).draw(6, 6)


@pytest.mark.parametrize("text, layout", [
    ("butterfly(8)", tw.patterns.butterfly(8)),
    ("butterfly(8, factors=1, global_blocks=2)", tw.patterns.butterfly(8, 1, 2)),
    ("local(8, 1) | strided(8, 3)", tw.patterns.local(8, 1) | tw.patterns.strided(8, 3)),
    ("random_blocks(8, 2)", tw.patterns.random_blocks(8, 2)),
    ("random_blocks(8, 2, seed=5) & local(8, 4)", tw.patterns.random_blocks(8, 2, 5) & tw.patterns.local(8, 4)),
    ("bigbird(8)", tw.patterns.bigbird(8)),
    ("axial(2, 4) | global_blocks(8, 1)", tw.patterns.axial(2, 4) | tw.patterns.global_blocks(8, 1)),
])
def test_blocks_are_block_masks_of_patterns(text, layout):
    mask = parse_mask(f"blocks({text}, [2, 4])")
    assert isinstance(mask, tw.BlockMask)
    assert mask.block_size == (2, 4)
    assert repr(mask) == f"blocks({text}, [2, 4])"
    assert torch.equal(mask.dense(1, 1, 16, 32), tw.block_mask(layout, block_size=(2, 4)).dense(1, 1, 16, 32))


@pytest.mark.parametrize("text, words", [
    ("blocks(local(8, 1))", "expected blocks(layout, size), got blocks(local(8, 1))"),
    ("blocks(causal(), 4)", "blocks: layout: expected butterfly, local, "),
    ("blocks(~local(8, 1), 4)", "joined with & |, got ~local(8, 1)"),
    ("local(8, 1)", "expected full, causal, "),
    ("blocks(local(8), 4)", "expected local(n, blocks), got local(8)"),
    ("blocks(bigbird(8, depth=1), 4)", "expected bigbird(n, window=1, global_=2, random=3, seed=0), got bigbird(8, depth=1)"),
    ("blocks(local(8, -1), 4)", "expected a whole number >= 0 in a pattern, got -1"),
    ("blocks(local(8, None), 4)", "expected a whole number >= 0 in a pattern, got None"),
    ("blocks(butterfly(6), 4)", "butterfly: n: expected a power of two, got 6"),
    ("blocks(local(0, 1), 4)", "local: n: expected a number of blocks >= 1, got 0"),
    ("blocks(local(8, 1) | local(4, 1), 4)", "patterns of equally many blocks, got 8 and 4 in local(8, 1) | local(4, 1)"),
    ("blocks(local(99999, 1), 4)", "expected at most 4096 blocks on a side, got 99999"),
    ("blocks(axial(999, 999), 4)", "expected at most 4096 blocks on a side, got 998001"),
    ("blocks(local(8, 1), [4])", "blocks: size: expected a whole number or [queries, keys], got [4]"),
    ("blocks(local(8, 1), None)", "blocks: size: expected a whole number or [queries, keys], got None"),
    ("blocks(local(8, 1), 0)", "block_size: expected one or two integers >= 1, got 0"),
    ("blocks(*local(8, 1), 4)", "blocks: layout: expected butterfly"),
    ("window(1)", "expected window(left, right), got window(1)"),
    ("causal(**{'x': 1})", "expected causal(), got causal(**{'x': 1})"),
    ("prefix(None)", "prefix(None): expected a whole number or a list of at least one, got None"),
    ("prefix([])", "expected a whole number or a list of at least one, got []"),
    ("tree([-1, 0, 2])", "tree: parents: expected an earlier node, or -1 for a root, got parents[2] = 2"),
    ("~" * 600 + "causal()", "nested too deeply"),
])
def test_errors_name_what_was_expected_and_what_came(text, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        parse_mask(text)
    assert "\n" not in str(error.value)


def test_the_deepest_text_can_be_drawn():
    deep, plain = (call("mask", text, "--rows", 4)[1].splitlines()[:4] for text in ("~" * 140 + "causal()", "causal()"))
    assert deep == plain


FILE = """
import torch
import tilewise as tw
from beside import STEP

strides = torch.tensor([[1, 2, 4, 8], [3, 3, 3, 3]])

def dilated(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((q_idx - kv_idx) % strides[b, h] == 0)

def stepped(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx) % STEP == 0

def branching(b, h, q_idx, kv_idx):
    if q_idx > kv_idx:
        return True
    return False

def undefined(b, h, q_idx, kv_idx):
    return nowhere[q_idx]

def number(b, h, q_idx, kv_idx):
    return q_idx - kv_idx

def three(b, h, q_idx):
    return q_idx > 1

def product(b, h, q_idx, kv_idx):
    return q_idx * kv_idx > 7

made = tw.causal() & dilated
layout = tw.block_mask(tw.patterns.local(8, 0), block_size=2)
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "some_masks.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("STEP = 2")
    (tmp_path / "broken.py").write_text("import torch\n\nraise KeyError('no')\n")
    (tmp_path / "unfinished.py").write_text("def (:\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("beside", "some_masks"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("place", ["some_masks.py", "./some_masks.py", "some_masks"])
@pytest.mark.parametrize("name, row", [("dilated", "■ ■ ■ ■ · ·"), ("stepped", "· ■ · ■ · ■"), ("made", "■ ■ ■ ■ · ·"),
                                       ("layout", "· · ■ ■ · ·")])
def test_mask_draws_functions_and_masks_of_files_and_modules(files, place, name, row):
    code, output = call("mask", f"{place}:{name}", "--rows", 6)
    assert code == 0
    assert output.splitlines()[3] == row


@pytest.mark.parametrize("options, row", [(("--head", 1), "· ■ · ■ · ■ · ·"), (("--head", 2), "· ■ · · · ■ · ·"),
                                          (("--batch", 1, "--head", 2), "· · ■ · · ■ · ·")])
def test_mask_draws_the_sequence_and_head_that_is_asked_for(files, options, row):
    _, output = call("mask", f"{files}/some_masks.py:dilated", "--rows", 8, *options)
    assert output.splitlines()[5] == row


def test_one_head_is_the_same_as_among_all():
    table = torch.arange(6).reshape(2, 3)
    lengths = torch.tensor([5, 2])
    mask = (tw.causal() & (lambda b, h, q, k: (q + h) % (table[b, h] + 1) != k % 3)) | tw.prefix(lengths) & tw.window(7, 7)
    for whole in (mask, tw.prefix(lengths), tw.documents(torch.tensor([[0] * 9, [0] * 4 + [1] * 5]))):
        for b, h in ((0, 0), (1, 2)):
            one = of_one_head(whole, b, h)
            assert torch.equal(one.dense(1, 1, 9, 9)[0, 0], whole.dense(2, 3, 9, 9)[b, h])
            assert torch.equal(one.classify(1, 1, 9, 9, 4, 4)[0, 0], whole.classify(2, 3, 9, 9, 4, 4)[b, h])


@pytest.mark.parametrize("arguments, words", [
    (("absent.py:dilated",), "mask: no such file: absent.py"),
    ((".py:dilated",), "mask: no such file: .py"),
    (("absent_module:dilated",), "mask: absent_module: ModuleNotFoundError: No module named 'absent_module'"),
    (("some/where:dilated",), "mask: expected FILE.py:NAME or MODULE:NAME, got some/where before the colon"),
    (("some_masks.py:dilatd",), "mask: some_masks.py: expected dilatd in it, it has dilated, stepped, "),
    (("beside.py:dilated",), "mask: beside.py: expected dilated in it, it has neither a mask nor a mask function"),
    (("some_masks.py:strides",), "mask: some_masks.py: strides: expected a function mask_mod(b, h, q_idx, kv_idx) "
                                 "or a tw.Mask, got Tensor"),
    (("some_masks.py:STEP",), "mask: some_masks.py: STEP: expected a function"),
    (("some_masks.py:undefined",), "mask: some_masks.py, line 20: NameError: name 'nowhere' is not defined"),
    (("some_masks.py:number",), "number: a mask_mod returns a boolean for each score, got a whole number"),
    (("some_masks.py:three",), "three: expected mask_mod(b, h, q_idx, kv_idx): too many positional arguments"),
    (("broken.py:dilated",), "mask: broken.py, line 3: KeyError: 'no'"),
    (("unfinished.py:dilated",), "mask: unfinished.py: SyntaxError: "),
    (("leaving.py:dilated",), "mask: leaving.py, line 2: SystemExit: 3"),
    (("some_masks.py:dilated", "--head", 4), "mask: 16 queries x 16 keys: dilated: strides: expected an index of "
                                             "dimension 1 from 0 to 3, got one that may reach from 4 to 4"),
    (("some_masks.py:product", "--at", 131072), "mask: 131072 queries x 131072 keys: an index expression may reach"),
    (("blocks(local(4, 1), 2)",), "mask: 16 queries x 16 keys: block_mask: layout: expected an index of dimension 0 from"),
    (("documents([0, 1])", "--rows", 4), "mask: 4 queries x 4 keys: documents: ids_q: expected an index of dimension 0"),
    (("tree([-1, 0])", "--rows", 4), "mask: 4 queries x 4 keys: tree: parents: expected an index of dimension 0 from 0 to 1"),
    (("causal()", "--at", 131072, "--tile", 4), "--tile: expected at most 8192 tiles on a side, --tile 16 or more, got 3"),
    (("causal()", "--at", 128, "--rows", 4), "--at: counts tiles and draws nothing: leave out --rows, --cols and --png"),
])
def test_mask_errors_are_one_line(files, arguments, words):
    code, output = call("mask", *arguments)
    assert code == 2
    assert output.startswith("Error: " + words)
    assert len(output.splitlines()) == 1


def test_what_a_function_may_not_do_is_said_with_its_line(files):
    for command in (("mask", "some_masks.py:branching"), ("explain", "--mask", "some_masks.py:branching")):
        code, output = call(*command)
        assert code == 2
        assert output.startswith("Error: branching, line 15: the value of an index expression is not known")
        assert output.splitlines()[1:] == ["    if q_idx > kv_idx:"]


def test_files_are_run_only_by_their_name_and_leave_no_trace_in_the_path(files):
    before = list(sys.path)
    assert repr(read_mask("some_masks.py:dilated")) == "dilated"
    assert repr(read_mask(" causal() ")) == "causal()"
    with pytest.raises(ValueError, match="mask: expected full, causal"):
        parse_mask("some_masks")
    assert sys.path == before


def test_explain_takes_masks_as_mask_does(files):
    code, output = call("explain", "--seqlen-q", 1024, "--mask", "causal() & blocks(local(8, 1), 128)", "--window", "256,0")
    assert code == 0
    assert "computed" in output
    assert call("explain", "--seqlen-q", 64, "--mask", "some_masks.py:stepped")[0] == 0
    code, output = call("explain", "--mask", "blocks(local(4, 1), 16)")
    assert code == 2
    assert output.startswith("Error: block_mask: layout: expected an index")


@pytest.mark.parametrize("arguments, words", [
    (("mask", "nonsense()"), "mask: expected full, causal"),
    (("explain", "--window", "3"), 'window: expected "left,right"'),
    (("demo", "--device", "abacus"), "device: expected auto or one of cpu"),
    (("explain", "--device", "abacus"), "device: expected one that works here, got abacus: "),
    (("inspect", "--store", GATES, "--filter", "abacus"), "--arch, --filter: expected one of gfx942, "),
    (("inspect", "--store", GATES, "--arch", "sm_70"), "--arch, --filter: expected one of gfx942, "),
    (("demo", "--text", "/no/such/place"), "text: no such file or folder"),
])
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, output = call(*arguments)
    assert code == 2
    assert output.startswith("Error: " + words)
    assert len(output.splitlines()) == 1


def test_explain_names_the_backend_without_the_memory_of_the_problem():
    code, output = call("explain", "--seqlen-q", 1 << 20, "--heads", 64, "--kv-heads", 8, "--backend", "tiled")
    assert code == 0
    assert "tiled" in output


def test_inspect_prints_a_line_for_each_kernel():
    code, output = call("inspect", "--store", GATES, "--filter", "decode d128 16 plain", "--arch", "sm_90")
    assert code == 0
    title, *rows = output.splitlines()
    assert re.match(r"kernel +warps +registers +spills +shared +tensor instructions +hot loop +overlap +failures", title)
    assert rows
    assert all(re.match(r"decode d128 16 plain .*@ sm_90 +\d+ +\d+", row) for row in rows)


def test_doctor_checks_this_machine():
    code, output = call("doctor")
    assert code == 0
    assert re.search(r"reference +cpu +\d\.\de-\d\d +ok", output)
    assert re.search(r"tiled +cpu +\d\.\de-\d\d +ok", output)
    assert re.search(r"triton +cpu +- +\S", output)         # said with its reason
    assert re.search(r"Attention on cpu is served by (cpu|tiled)\.", output)
