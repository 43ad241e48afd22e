"""The examples of docs/serving.md run, from top to bottom."""
import re
from pathlib import Path

import pytest
from support.backends import AVAILABLE

TEXT = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()


@pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/serving.md", "exec"), names)
    assert names["cache"].length(names["prompt"]) == names["n"] + 2


@pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")
def test_examples_for_newcomers_run():
    """Those of docs/coming-from.md, which assert what they show."""
    text = (Path(__file__).parents[1] / "docs" / "coming-from.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/coming-from.md", "exec"), names)
