"""The examples of the pages in docs run, from top to bottom."""
import re
from pathlib import Path

import pytest
from support.backends import AVAILABLE

DOCS = Path(__file__).parents[1] / "docs"


def run(page: str, count: int) -> dict:
    """The names that the `count` examples of a page leave behind."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(blocks) == count
    names: dict = {}
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), names)
    return names


@pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
def test_serving():
    names = run("serving.md", 5)
    assert names["cache"].length(names["prompt"]) == names["n"] + 2


@pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
def test_derivatives():
    run("derivatives.md", 2)
