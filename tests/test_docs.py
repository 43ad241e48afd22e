"""The examples of the docs run, from top to bottom of a page."""
import functools
import re
from pathlib import Path

import pytest
import torch
from support.backends import AVAILABLE

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
