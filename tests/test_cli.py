"""The command line: quick to answer, plain about errors, and never an interpreter of what it is given."""

import re

import pytest
from typer.testing import CliRunner

from tilewise.cli import app
from tilewise.mask_text import parse_mask


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
    assert "4 x 4 tiles: 6 skipped, 4 masked, 6 computed whole" in output


def test_mask_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    code, _ = call("mask", "causal()", "--png", tmp_path / "mask.png")
    assert code == 0
    assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("text, same", [
    ("causal() | prefix(3)", "prefix([3]) | causal()"),
    ("~causal()", "full() & ~causal()"),
    ("window(2, None) & causal()", "window(left=2, right=0)"),
    ("documents([0, 0, 1, 1, -1, -1])", "documents([7, 7, 3, 3, -1, -2])"),
    ("chunked(3)", "documents([0, 0, 0, 1, 1, 1])"),
    ("key_lengths(4)", "prefix(4)"),
])
def test_masks_as_text_mean_what_they_say(text, same):
    assert parse_mask(text).draw(6, 6) == parse_mask(same).draw(6, 6)


@pytest.mark.parametrize("text", [
    "__import__('os').system('true')", "causal().__class__", "open('/etc/passwd')", "window(__import__('os'), 0)",
    "[causal() for x in [1]]", "causal() and full()", "causal() + full()", "lambda: causal()", "causal", "7",
    "'causal()'", "window(*[1, 2])", "window(**{'left': 1})", "window(1.5, 0)", "window(True, 0)", "causal(1)",
    "window(1)", "chunked(0)", "window(9**9**9, 0)", "prefix([[1]])", "", "causal() &", "~" * 1999 + "x", "(" * 1999,
    "~" * 3000 + "causal()", "chunked(99999999999999)",
])
def test_nothing_but_masks_is_read(text):
    with pytest.raises(ValueError, match=r"mask|chunked|window"):
        parse_mask(text)


@pytest.mark.parametrize("arguments, words", [
    (("mask", "nonsense()"), "mask: expected full, causal"),
    (("explain", "--window", "3"), 'window: expected "left,right"'),
    (("demo", "--device", "abacus"), "device: expected auto or one of cpu"),
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


def test_doctor_checks_this_machine():
    code, output = call("doctor")
    assert code == 0
    assert re.search(r"reference +cpu +\d\.\de-\d\d +ok", output)
    assert re.search(r"tiled +cpu +\d\.\de-\d\d +ok", output)
    assert re.search(r"triton +cpu +- +\S", output)         # said with its reason
    assert re.search(r"Attention on cpu is served by (cpu|tiled)\.", output)
