"""The examples of the docs run, from top to bottom of a page, and pages show what the code prints and `results/` holds."""
import functools
import importlib.util
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch
from support import results
from support.backends import AVAILABLE, GPU

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")


def run(page: str, count: int) -> dict:
    """The names that a page's examples leave behind."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(blocks) == count
    names: dict = {}
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), names)
    return names


def test_serving():
    names = run("serving.md", 5)
    assert names["cache"].length(names["prompt"]) == names["n"] + 2


def test_pytorch(monkeypatch):
    """With a compiler that traces alike and makes no code, which would take a minute."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    names = run("pytorch.md", 7)
    assert names["cache"].lengths.tolist() == [0, 0]
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_transformers():
    pytest.importorskip("transformers")
    names = run("transformers.md", 2)
    assert names["answer"].shape == (2, 48)
    assert all(p.grad.isfinite().all() for p in names["model"].parameters())


def test_statistics(capsys):
    names = run("statistics.md", 3)
    assert names["cache"].lengths.tolist() == [128, 128]
    assert names["out"].isfinite().all()
    assert "entropy/head3" in capsys.readouterr().out


def test_coming_from():
    run("coming-from.md", 5)


def test_derivatives():
    run("derivatives.md", 2)


def load_script():
    loader = SourceFileLoader("docs", str(DOCS.parent / "scripts" / "docs"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("docs", loader))
    loader.exec_module(module)
    return module


@pytest.mark.skipif(GPU, reason="the pages show a machine without a GPU")
def test_pages_show_what_the_code_prints():
    script = load_script()
    for page in script.pages(DOCS.parent):
        old = page.read_text(encoding="utf-8")
        assert script.anywhere(script.rewritten(old, page.parent, look=True)) == script.anywhere(old), page.name


def test_tables_and_pictures_of_results_are_written_again(tmp_path):
    pytest.importorskip("matplotlib")
    script = load_script()
    results.write(tmp_path, "memory")
    page = """Before.

<!-- $ tilewise report memory.json --markdown --section memory --pictures figures -->
what was here
<!-- end -->

After.
"""
    with pytest.raises(SystemExit, match=r"figures/memory-synthetic-gpu-forward-.*\.svg is missing: run python scripts/docs"):
        script.rewritten(page, tmp_path, look=True)
    assert not (tmp_path / "figures").exists()
    new = script.rewritten(page, tmp_path)
    assert new.startswith("Before.\n\n<!-- $ tilewise")
    assert new.endswith("<!-- end -->\n\nAfter.\n")
    assert "what was here" not in new
    assert "| forward N 4096 H 16 D 128 bfloat16 causal | 256 KiB |" in new
    assert all((tmp_path / path).exists() for path in re.findall(r"\]\((figures/.*?)\)", new))
    assert script.rewritten(new, tmp_path) == script.rewritten(new, tmp_path, look=True) == new
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(SystemExit, match="expected a JSON file"):
        script.rewritten(new, tmp_path)
