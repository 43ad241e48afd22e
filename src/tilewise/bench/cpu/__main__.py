"""A result's table in Markdown, for the docs: python -m tilewise.bench.cpu results/bench_cpu.json"""
import json
import sys
from pathlib import Path

from tilewise.bench.cpu.table import markdown

print(markdown(json.loads(Path(sys.argv[1]).read_text())["rows"]))
