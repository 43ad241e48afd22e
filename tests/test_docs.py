"""The examples of docs/serving.md and docs/statistics.md run, from top to bottom."""
import re
from pathlib import Path

import pytest
from support.backends import AVAILABLE

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs")


def run(name: str, examples: int) -> dict:
    """The names that a page's examples leave."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert len(blocks) == examples
    names: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names


def test_serving():
    names = run("serving.md", 5)
    assert names["cache"].length(names["prompt"]) == names["n"] + 2


def test_statistics(capsys):
    names = run("statistics.md", 3)
    assert names["cache"].lengths.tolist() == [128, 128]
    assert names["out"].isfinite().all()
    assert "entropy/head3" in capsys.readouterr().out
