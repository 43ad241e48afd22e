"""The demo from end to end, in its smallest size, and what it measures with."""

import json
import re
import sys
import time

import pytest
import torch

pytest.importorskip("matplotlib")

from tilewise.demo import page, run
from tilewise.demo.measure import Case, measure, time_calls
from tilewise.demo.results import STANDARD, TILEWISE
from tilewise.demo.settings import doubling

linux = pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
CASE = Case("reference", (256,), 1, 2, 16, "float32", "cpu", limit=64 << 20)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    job = run.prepare(out=str(tmp_path_factory.mktemp("demo") / "report"), quick=True, device="cpu")
    stages = []
    results = run.execute(job, lambda stage, done, total, words: stages.append((stage, done, total)))
    return results, page.write(results, job.out), stages


def test_both_trainings_have_the_same_losses(finished):
    results, _, _ = finished
    assert len(results.standard) == len(results.tilewise) == results.settings.recipe.steps
    assert results.loss_difference() < 1e-3
    assert results.tilewise[-1].loss < results.tilewise[0].loss


@linux
def test_tilewise_goes_on_where_standard_attention_is_refused(finished):
    results, _, _ = finished
    refused = results.refused(STANDARD)
    assert refused is not None
    assert results.refused(TILEWISE) is None
    assert max(results.measured(TILEWISE)) > refused > max(results.measured(STANDARD))
    assert all(row.seconds > 0 for row in results.rows if not row.refused)


def test_headlines_are_the_rows_ratios(finished):
    results, _, _ = finished
    headline = results.headline()
    rows = [results.measured(backend)[headline.length] for backend in (STANDARD, TILEWISE)]
    assert headline.speedup == pytest.approx(rows[0].seconds / rows[1].seconds)
    assert headline.memory == pytest.approx(rows[0].bytes / rows[1].bytes)
    assert headline.longest == max(results.measured(TILEWISE))


def test_the_page_is_whole_and_needs_nothing_else(finished):
    results, path, _ = finished
    text = path.read_text(encoding="utf-8")
    assert text.count('<svg viewBox="') == text.count('role="img" aria-label="') == 3
    assert not re.findall(r"https?://(?!www\.w3\.org)|<script|<link|@import|mathdefault", text)
    assert "$" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)     # no placeholder is left
    lengths = re.findall(r"<th scope=row>([\d,]+)", text)
    assert lengths == [f"{n:,}" for n in sorted({row.length for row in results.rows})]
    assert results.machine["torch"] in text


def test_the_numbers_are_kept_beside_the_page(finished):
    results, path, _ = finished
    data = json.loads((path.parent / "results.json").read_text())
    assert data["headline"]["longest"] == results.headline().longest
    assert [point["loss"] for point in data["tilewise"]] == [point.loss for point in results.tilewise]
    assert len(data["rows"]) == len(results.rows)


def test_progress_ends_complete(finished):
    _, _, stages = finished
    last = {stage: (done, total) for stage, done, total in stages}
    assert list(last) == ["Training twice", "Writing text", "Measuring"]
    assert all(done == total for done, total in last.values())


def test_text_is_escaped(finished):
    results, _, _ = finished
    hostile = page.render(results.__class__(**(results.__dict__ | {"sample": "<script>alert(1)</script>"})))
    assert "<script>" not in hostile


@linux
def test_a_measurement_refused_by_memory_is_a_row_that_says_so():
    (row,) = measure(Case(**(CASE.__dict__ | {"lengths": (8192,), "limit": 16 << 20})))
    assert "memory" in row.refused


def test_a_measurement_that_fails_is_an_error_with_its_cause():
    with pytest.raises(RuntimeError, match="nonsense"):
        list(measure(Case(**(CASE.__dict__ | {"backend": "nonsense"}))))


def test_long_passes_are_measured_once():
    calls = []
    seconds = time_calls(lambda: calls.append(time.sleep(0.02)), torch.device("cpu"), patience=0.01)
    assert len(calls) == 1
    assert seconds >= 0.02
    time_calls(lambda: calls.append(time.sleep(0.1)), torch.device("cpu"), patience=10.0)
    assert len(calls) == 1 + 6


@pytest.mark.parametrize("options, message", [
    ({"device": "abacus"}, "device: expected auto or one of cpu"),
    ({"text": "/no/such/place"}, "text: no such file or folder"),
    ({"out": __file__ + "/inside"}, "out: cannot write"),
])
def test_bad_input_is_one_clear_error(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        run.prepare(**({"out": str(tmp_path), "quick": True} | options))


def test_doubling():
    assert doubling(512, 5000) == (512, 1024, 2048, 4096)
    assert doubling(3, 3) == (3,)
