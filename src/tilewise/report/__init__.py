"""Reports: what result files of the benchmarks say, as one page or as Markdown.

    tilewise report bench-report/*.json --out report

`results` reads and checks files, `names` says who is who in them, `sections/` turn them into `blocks`, of which `page` makes
HTML and `markdown` Markdown. Ratios are taken within one row of one file, never across machines.
"""
from tilewise.report.page import write

__all__ = ["write"]
