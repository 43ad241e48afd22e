"""All measurements of the CPU backend, written as each is done: what `tilewise bench --cpu` runs."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tilewise import doctor
from tilewise.bench import record
from tilewise.bench.cpu import butterfly, compiling, decode, dense, others, packed, plot, table
from tilewise.bench.serving.contest import Row

PARTS = {"dense": dense, "packed": packed, "decode": decode, "butterfly": butterfly, "compiling": compiling,
         "others": others}
TOO_SMALL = "--quick: these shapes are too small to tell about the bars"
Progress = Callable[[str, int, int, str], None]         # part, settings done, settings of the part, what is measured now


def benchmark(*, quick: bool = False, out: Path | None = None,
              progress: Progress = lambda part, done, total, words: None) -> Row:
    """One setting after another; one's failure does not cost the others. Beside `out`, the picture.

    Raises RuntimeError where the backend does not serve.
    """
    check = doctor.check_backend("cpu", "cpu")
    if check.error is None:
        raise RuntimeError(f"backend cpu: {check.reason}")
    stamp = record.stamp()
    result: Row = stamp | {"device": stamp["machine"]["CPU"], "threads": torch.get_num_threads(),
                           "wait_policy": os.environ.get("OMP_WAIT_POLICY"), "quick": quick, "rows": [], "lines": []}
    for name, part in PARTS.items():
        settings = part.settings(quick)
        for done, setting in enumerate(settings):
            progress(name, done, len(settings), str(setting))
            result["rows"].append({"part": name, "title": part.TITLE, "case": str(setting), "setting": asdict(setting)}
                                  | attempt(part, setting))
            result["lines"] = table.lines(result["rows"]) + [TOO_SMALL] * quick
            record.write(out, result)
        progress(name, len(settings), len(settings), "")
    if out is not None:
        result["lines"].append(picture(result, out.with_suffix(".svg")))
    return result


def attempt(part: Any, setting: Any) -> Row:
    """What a part finds, or its failure."""
    try:
        return part.measure(setting)
    except Exception as error:  # such as memory
        return {"contenders": {}, "figures": [], "error": record.words(error)}


def picture(result: Row, path: Path) -> str:
    """Draws it; where, or why not."""
    try:
        plot.save(result["rows"], path, f"{result['device']}, {result['threads']} threads")
    except Exception as error:  # such as no matplotlib
        return f"no picture: {record.words(error)}"
    return f"Drawn: {path}"
