"""`tilewise report`: what it says of made-up results whose numbers are known, and what it refuses."""
import json
import random
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from support import results

pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from tilewise import report
from tilewise.cli import app
from tilewise.pages.svg import log_ticks
from tilewise.pages.words import duration, length, ratio, size
from tilewise.report import headline, markdown, names, page, sections
from tilewise.report.blocks import Picture, Table
from tilewise.report.results import Problem, read


class Outline(HTMLParser):
    """Text by section, and whether all that is opened is closed."""
    VOID = ("meta", "link", "br", "path", "use", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.tables, self.here = [], {}, [], "top"
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.here = dict(attributes)["id"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.sections[self.here] = self.sections.get(self.here, "") + data
        if self.open and self.open[-1] in ("th", "td") and self.tables:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return results.write(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def made(paths, tmp_path_factory):
    return report.write(paths, tmp_path_factory.mktemp("made") / "report")


@pytest.fixture(scope="module")
def outline(made):
    return Outline(made.read_text(encoding="utf-8"))


def write(folder, data, name="a.json"):
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


# ---- what the page says -----------------------------------------------------------------------------------------------

def test_the_page_is_whole_and_needs_nothing_else(made, outline):
    text = made.read_text(encoding="utf-8")
    assert outline.open == []
    assert not re.findall(r"https?://(?!www\.w3\.org)|<script|@import|src=|<image", text)
    assert not re.search(r"\$[a-z_{]|mathdefault", text)
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) <= set(ids)


def test_every_section_is_there_once_its_file_is(outline):
    wanted = {"slower", "speed", "memory", "decode", "sparse", "cpu", "promises", "overhead", "traffic", "roofline", "paper",
              "numerics", "refused", "origin"}
    assert wanted <= set(outline.sections)
    assert "tilewise bench masks --out masks.json" in outline.sections["missing"]
    assert "bench memory" not in outline.sections["missing"]


def test_headlines_are_the_medians_and_name_both_ends(paths):
    """By the laws of the made-up times, ours against each other one is a function of length alone."""
    files = [file for file in read(paths) if file.device == "cuda"]
    best, standard, memory, longer, copy = headline.cards(files)
    law = [500 * n / (n + 1500) / (520 * n / (n + 700)) for n in results.LENGTHS]
    middle = sorted(law)[2] / 2 + sorted(law)[3] / 2
    assert best.number == f"{ratio(1 / middle)} slower"
    assert best.tone == "bad"
    worst, at_best = best.words.split("from ")[1].split(" to ")
    assert worst.startswith(f"{ratio(min(law))} (")
    assert at_best.startswith(f"{ratio(max(law))} (")
    assert "512 tokens" in worst
    assert "16,384 tokens" in at_best
    assert "against SDPA cudnn" in at_best
    assert best.words.startswith("than the fastest of SDPA flash, SDPA cudnn, SDPA efficient and FlexAttention, in")
    assert "60 cases" in standard.words             # of 72, in which it was refused at the longest length
    assert standard.number.endswith("faster")
    assert memory.number == f"{ratio(2 * 16 * 16384**2 * 3 / (16384 * 16 * 4 * 130))} less memory"
    assert longer.number == f"{ratio(4)} longer"
    assert "65,536" in longer.words
    assert "16,384" in longer.words
    assert "out of memory" in longer.words
    assert copy.number == f"{2800 / 3400:.0%} of a copy"


def test_the_summary_is_a_table_of_passes_and_peers(paths):
    """By the same laws: of each pass the median over lengths; memory at the longest sequence of both, where it is least."""
    section, = sections.build([file for file in read(paths) if file.device == "cuda"], ["summary"])
    table = next(block for block in section.blocks if isinstance(block, Table))
    others = table.head[1:]
    assert list(others) == ["standard attention", "SDPA flash", "SDPA cudnn", "SDPA efficient", "FlexAttention"]
    assert [row[0] for row in table.rows] == ["forward, 24 cases", "backward, 24 cases", "forward + backward, 24 cases",
                                              "memory, forward", "memory, forward + backward"]
    law = sorted(500 * n / (n + 1500) / (330 * n / (n + 700)) for n in results.LENGTHS)
    assert table.rows[0][2].text == f"{ratio((law[2] + law[3]) / 2)} faster ({ratio(law[0])} to {ratio(law[-1])})"
    assert [cell if isinstance(cell, str) else cell.text for cell in table.rows[3][1:3]] == [
        "8,192× less at 16k tokens", "2.0× less at 64k tokens"]
    assert {block.title for block in section.blocks if isinstance(block, Picture)} == {
        "Speed: forward + backward, bf16, head dim 64, causal", "Memory: forward + backward, bf16, head dim 128, causal"}


def test_memory_that_is_computed_is_no_headline(tmp_path):
    """Only what was measured on the machine counts."""
    data = results.memory() | {"benchmark": "traffic"}
    assert headline.memory(read([write(tmp_path, data)])) is None
    assert headline.memory(read([write(tmp_path, results.memory())])).number == "189× less memory"


def test_errors_relative_to_the_truth(paths, tmp_path):
    numerics = next(path for path in paths if path.stem == "numerics")
    done = tilewise(numerics, "--markdown", "--section", "rounding", "--part", "lengths", "--pictures", tmp_path)
    assert done.exit_code == 0
    assert "| error of out | Tilewise | standard attention | SDPA flash |" in done.stdout
    assert "| 2,048 keys, bf16 | 3.9e-03 | 7.8e-03 | 1.6e-02 |" in done.stdout       # dq, of SDPA growing with length
    assert len(list(tmp_path.glob("*.svg"))) == 4


def test_losses_are_all_in_plain_sight(paths, outline):
    files = read(paths)
    every = [loss for duel in headline.duels(files) for loss in duel.losses]
    slower = [(row.case, name) for file in files for row in file.rows for name, e in row.timed().items()
              if names.kind(name) in ("peer", "standard") and row.ours.seconds and e.seconds < row.ours.seconds]
    assert sorted((loss.row.case, loss.other) for loss in every) == sorted(slower)
    assert f"In {len(slower)} of the " in outline.sections["slower"]
    listed = next(t for t in outline.tables if t[0][-1] == "the other")
    assert len(listed) - 1 == len(slower)
    assert f"{sum(loss.file.device == 'cuda' for loss in every)} of " in outline.sections["top"]


def test_what_does_not_run_is_a_loss(tmp_path):
    data = results.cpu()
    data["rows"][0]["contenders"]["tilewise"] = {"state": "refused", "reason": "head dims over 512"}
    data["rows"][0]["times_faster"] = {}
    data["rows"] = data["rows"][:1]
    file, = read([write(tmp_path, data)])
    duel, = headline.duels([file])
    assert duel.losses[0].reason == "refused: head dims over 512"
    assert "head dims over 512" in page.render([file])


def test_without_losses_the_page_says_so(tmp_path):
    data = results.cpu()
    del data["rows"][1]
    assert "In none of the 1 comparisons" in page.render(read([write(tmp_path, data)]))


def test_rulers_and_our_own_are_no_peers():
    row, = (r for r in read_rows(results.cpu()) if r.part == "dense" and r.setting["seqlen"] == 2048)
    assert list(names.peers(row)) == ["sdpa"]
    assert names.kind("tilewise paged 16") == names.kind("hopper") == "ours"
    assert names.kind("copy") == "ruler"
    assert names.kind("standard in a loop") == "standard"
    assert names.kind("sdpa flash") == "peer"


def read_rows(data):
    from tilewise.report.results import Reader
    return [Reader("x").row(row, "rows") for row in data["rows"]]


def test_tables_hold_the_numbers(outline):
    memory = next(t for t in outline.tables if t[0][-1] == "standard ÷ Tilewise")
    assert memory[0][1:4] == ["Tilewise", "standard attention", "SDPA flash"]
    row = next(r for r in memory if r[0].startswith("forward N 16384"))
    assert row[1:] == [size(16384 * 64), size(32 * 16384**2), size(16384 * 128), "8,192×"]
    assert next(r for r in memory if r[0].startswith("forward N 65536"))[2] == "refused"
    decode = next(t for t in outline.tables if "of a copy" in t[0])
    assert {r[decode[0].index("of a copy")] for r in decode[1:]} == {"82%"}
    sparse = next(t for t in outline.tables if t[0][-1] == "cost over ideal")
    assert [r[-1] for r in sparse[1:]] == ["1.11", "1.12", "1.14", "1.18", "1.26"]
    promised = next(t for t in outline.tables if t[0][-1] == "met")
    assert [r[-1] for r in promised[1:]] == ["yes", "no", "yes"]
    errors = next(t for t in outline.tables if t[0][-1] == "allowed")
    assert [r[0].rsplit(", ", 1)[1] for r in errors[1:]] == ["out", "dq"]
    assert "NaN" in errors[1]
    closest = next(t for t in outline.tables if t[0][1] == "within")
    assert {r[0]: r[1:3] for r in closest[1:]} == {"Tilewise": ["2 of 2", "0.2"], "standard attention": ["2 of 2", "0.5"],
                                                   "SDPA flash": ["1 of 2", "1.5"], "FlexAttention": ["0 of 1", "inf"]}
    traffic = next(t for t in outline.tables if t[0][-1] == "counted ÷ closed form")
    assert {r[-1] for r in traffic[1:]} == {"1.025"}
    assert traffic[1][3] == "4.4 GB"
    paper = next(t for t in outline.tables if "table 9 (published)" in t[0][-1])
    assert "table 9, beside what was published of A100-40GB" in outline.sections["paper"]
    assert paper[1][-1] == "1.02 ms"


def test_pictures_come_with_their_numbers(made):
    figures = re.findall(r"<figure>.*?</figure>", made.read_text(encoding="utf-8"), re.DOTALL)
    assert len(figures) > 20
    for figure in figures:
        assert figure.count("<details") == figure.count("<table>") == figure.count("<svg ") == 1
        assert len(re.search(r'role="img" aria-label="([^"]*)"', figure)[1]) > 40


def test_machines_are_never_mixed(outline):
    assert outline.sections["speed"].count(results.GPU) == outline.sections["speed"].count(results.CPU) == 1
    assert f"On {results.GPU}" in outline.sections["top"]
    assert f"On {results.CPU}, 4 cores" in outline.sections["top"]


def test_who_was_not_timed(outline):
    words = outline.sections["refused"]
    assert "dq: error 3.1e-02, allowed 8.0e-03" in words
    assert "it is not installed" in words
    assert words.index("wrong") < words.index("absent")


def test_unfinished_and_quick_are_said_first(tmp_path):
    text = page.render(read([write(tmp_path, results.memory() | {"complete": False, "quick": True})]))
    assert text.index("Unfinished, with only some of the cases: a.json") < text.index("Quick runs") < text.index("<main>")
    assert "unfinished: not all its cases are measured" in text


def test_a_benchmark_of_another_version_is_a_table(tmp_path):
    text = page.render(read([write(tmp_path, results.cpu() | {"benchmark": "telepathy"})]))
    assert "<code>telepathy</code>" in text
    assert "forward N 8192 H 4 D 64 float32 full" in text


def test_text_of_files_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'`|&$x$\\"
    text = json.dumps(results.attention())
    for victim in ("sdpa cudnn", "bfloat16", results.GPU, "it is not installed"):
        text = text.replace(victim, json.dumps(evil)[1:-1])
    data = json.loads(text)
    data["rows"] = [row for row in data["rows"] if row["setting"]["head_dim"] == 64][:9]
    out = report.write([write(tmp_path, data, "<b>.json")], tmp_path / "out")
    text = out.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>.json" not in text
    assert Outline(text).open == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    written = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "<script" not in written
    for table in re.findall(r"(?m)(?:^\|.*\n)+", written):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_same_files_make_the_same_page(paths):
    few = read([path for path in paths if path.stem in ("memory", "cpu")])
    assert page.render(few) == page.render(few)


# ---- what is refused --------------------------------------------------------------------------------------------------

def changed(change):
    data = results.cpu()
    change(data)
    return data


def in_row(name, value, of="tilewise"):
    return changed(lambda data: data["rows"][0]["contenders"][of].update({name: value}))


@pytest.mark.parametrize("data, message", [
    ("{", r"a\.json: expected a JSON file of `tilewise bench --out`, got no JSON"),
    ("[]", r"a\.json: the file: expected an object"),
    ("{}", r"a\.json: expected a result of `tilewise bench --out`, .* got no benchmark"),
    (changed(lambda d: d.update(rows=[])), r"a\.json: expected rows, got none"),
    (changed(lambda d: d.update(rows={})), r"a\.json: rows: expected a list"),
    (changed(lambda d: d.update(device="abacus")), r"a\.json: device: expected cpu or cuda, got 'abacus'"),
    (changed(lambda d: d["rows"].append(d["rows"][0])), r"a\.json: expected each case once, got 'forward N 2048"),
    (changed(lambda d: d["rows"][1].pop("case")), r"a\.json: rows\[1\]: expected a case"),
    (in_row("seconds", float("nan")), r"a\.json: rows\[0\] \(forward .*\): tilewise: seconds: expected a finite number, got"),
    (in_row("seconds", None), r"tilewise: seconds: expected a finite number, got None"),
    (in_row("seconds", -1), r"tilewise: seconds: expected a number above 0, got -1"),
    (in_row("seconds", True), r"tilewise: seconds: expected a finite number, got True"),
    (in_row("state", "fine", "sdpa"), r"sdpa: state: expected one of timed, right, wrong, refused, absent, got 'fine'"),
    (changed(lambda d: d["rows"][0]["times_faster"]["sdpa"].update(quartiles=[1])), r"sdpa: quartiles: expected two numbers"),
])
def test_bad_files_are_one_clear_error(tmp_path, data, message):
    path = write(tmp_path, data)
    with pytest.raises(Problem, match=message):
        report.write([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


ODD = [None, float("nan"), float("inf"), -1, 0, True, "", "x", [], {}, [1], 1e300, 1e-300, 2**70]


def places(value, path=()):
    """The way to everything inside some JSON."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key)
        yield from places(one, (*path, key))


@pytest.mark.parametrize("name", ["memory", "decode", "sparse", "cpu", "traffic", "paper", "numerics"])
def test_whatever_a_file_holds_is_shown_or_refused(tmp_path, name):
    choose = random.Random(0)
    original = results.MADE[name]()
    everywhere = list(places(original))
    outcomes = set()
    for _ in range(40):
        data = json.loads(json.dumps(original))
        *way, last = choose.choice(everywhere)
        inside = data
        for key in way:
            inside = inside[key]
        inside[last] = choose.choice(ODD)
        try:
            files = read([write(tmp_path, data)])
            outcomes.add(markdown.whole(files, sections.build(files))[:9])
        except Problem as problem:
            outcomes.add(str(problem).split(":")[0])
    assert outcomes == {"# Tilewis", str(tmp_path / "a.json")}


def test_files_that_measure_the_same_are_refused(tmp_path):
    first, second = (write(tmp_path, results.cpu(), name) for name in ("a.json", "b.json"))
    with pytest.raises(Problem, match=r"expected each file once, got it twice"):
        read([first, first])
    with pytest.raises(Problem, match=r"b\.json: a\.json holds case .* too: expected one measurement of each case"):
        read([first, second])
    with pytest.raises(Problem, match="expected at least one"):
        read([])


# ---- the command line -------------------------------------------------------------------------------------------------

def tilewise(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_command(paths, tmp_path):
    memory = next(path for path in paths if path.stem == "memory")
    done = tilewise(memory, "--out", tmp_path / "new" / "folder")
    assert done.exit_code == 0
    assert (tmp_path / "new" / "folder" / "index.html").exists()
    assert "189× less memory" in (tmp_path / "new" / "folder" / "report.md").read_text(encoding="utf-8")


def test_markdown_sections(paths):
    memory = next(path for path in paths if path.stem == "memory")
    done = tilewise(memory, "--markdown", "--section", "memory")
    assert done.exit_code == 0
    assert "| forward N 1024 H 16 D 128 bfloat16 causal | 64 KiB | 32 MiB | 128 KiB | 512× |" in done.stdout
    assert "#" not in done.stdout
    assert tilewise(memory, "--markdown", "--section", "headline").stdout.startswith(f"**{results.GPU}**")
    assert tilewise(memory, "--markdown").stdout.startswith("# Tilewise, measured")


def test_markdown_with_pictures(paths, tmp_path, monkeypatch):
    memory = next(path for path in paths if path.stem == "memory")
    monkeypatch.chdir(tmp_path)
    done = tilewise(memory, "--markdown", "--section", "memory", "--pictures", "figures/here")
    shown = re.findall(r"!\[(.*?)\]\((.*?)\)", done.stdout)
    assert [title for title, _ in shown] == [f"{mode}, bf16, head dim 128, causal" for mode in names.MODE_ORDER[::2]]
    assert {(tmp_path / path).resolve() for _, path in shown} == set((tmp_path / "figures" / "here").iterdir())
    for picture in (tmp_path / "figures" / "here").iterdir():
        root = ElementTree.parse(picture).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "peak memory beside inputs and outputs against sequence length" in root.get("aria-label")
        assert "prefers-color-scheme" in picture.read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments, message", [
    (["--pictures", "x"], "--pictures: expected only with --section"),
    (["--part", "dense"], "--part: expected only with --section"),
    (["--markdown", "--section", "cpu", "--part", "x"], "--part: expected one of compiling, dense, got 'x'"),
    (["--section", "speed"], "--section: expected only with --markdown"),
    (["--markdown", "--section", "magic"], "--section: expected one of headline, summary"),
    (["--markdown", "--section", "decode"], "--section: decode: these files hold nothing for it"),
    (["--out", __file__], "File exists"),
])
def test_command_refuses(paths, arguments, message):
    done = tilewise(next(path for path in paths if path.stem == "cpu"), *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_one_line(tmp_path):
    done = tilewise(tmp_path / "none.json")
    assert done.exit_code == 2
    assert "none.json" in done.stderr


def test_markdown_needs_no_matplotlib(paths, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)       # importing it fails, as if it were not there
    assert tilewise(paths[1], "--markdown", "--section", "memory").exit_code == 0
    done = tilewise(paths[1], "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "pip install 'tilewise[plots]'" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- words ------------------------------------------------------------------------------------------------------------

def test_numbers_in_words():
    ratios = {0.00224: "0.0022×", 0.923: "0.92×", 1.234: "1.23×", 4.56: "4.6×", 45.6: "46×", 8192: "8,192×"}
    assert {x: ratio(x) for x in ratios} == ratios
    assert [duration(x) for x in (3e-6, 1.5e-3, 2.0, 1234.0)] == ["3 µs", "1.5 ms", "2 s", "1,234 s"]
    assert [size(x) for x in (512, 3 * 2**20, 2**33)] == ["0.5 KiB", "3 MiB", "8 GiB"]
    assert [length(x) for x in (512, 1000, 131072, 2**20)] == ["512", "1,000", "128k", "1M"]


@pytest.mark.parametrize("low, high", [(1.1, 9.0), (1e-6, 40.0), (0.9, 1.2), (3e-4, 2e-3)])
def test_ticks_lie_inside_and_are_few(low, high):
    ticks = log_ticks(low, high, str)
    assert all(low <= value <= high for value, _ in ticks)
    assert 1 <= len(ticks) <= 7


def test_every_known_benchmark_has_a_section():
    from tilewise.report.sections.comparisons import KNOWN
    assert set(KNOWN) - {"attention"} <= set(sections.SLUGS)
