"""The examples of docs run, from top to bottom."""
import re
from pathlib import Path

import pytest
from support.backends import AVAILABLE

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")


def run(name: str, blocks: int) -> dict:
    """The names that the examples of a page define."""
    found = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert len(found) == blocks
    names: dict = {}
    for block in found:
        exec(compile(block, f"docs/{name}", "exec"), names)
    return names


def test_serving():
    names = run("serving.md", 5)
    assert names["cache"].length(names["prompt"]) == names["n"] + 2


def test_transformers():
    pytest.importorskip("transformers")
    names = run("transformers.md", 2)
    assert names["answer"].shape == (2, 48)
    assert all(p.grad.isfinite().all() for p in names["model"].parameters())
