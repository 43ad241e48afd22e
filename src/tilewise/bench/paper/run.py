"""All protocols, one measurement after another, written as each is done."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise.bench import record
from tilewise.bench.paper import figure, flash_attention, flash_attention_2, flash_decoding
from tilewise.bench.paper.race import Row
from tilewise.bench.timing import alive

PROTOCOLS: dict[str, Any] = {"flash-attention-2": flash_attention_2, "flash-decoding": flash_decoding,
                             "flash-attention": flash_attention}
SAME = "benchmark", "device", "quick", "commit"         # of a file that is continued
Progress = Callable[[str, int, int, str], None]         # protocol, measurements done, of how many, what is measured now


def benchmark(device: torch.device, *, quick: bool = False, out: Path | None = None, only: Sequence[str] = tuple(PROTOCOLS),
              resume: bool = False, progress: Progress = lambda part, done, total, words: None) -> Row:
    """One measurement's failure does not cost the others. Beside `out`, the picture of FlashAttention's figure 3.

    only: keys of PROTOCOLS. resume: rows that `out` has from this commit and device are kept.
    """
    head: Row = {"benchmark": "paper", "device": device.type, "quick": quick, "complete": False}
    result = record.stamp() | head | {"rows": [], "lines": []}
    rows = {row["case"]: row for row in kept(out, result)} if resume and out is not None else {}
    every = [(name, m) for name in PROTOCOLS if name in only for m in PROTOCOLS[name].measurements(device, quick)]
    for i, (name, measurement) in enumerate(every):
        progress(name, i, len(every), str(measurement))
        if any(case not in rows for case in measurement.cases()):
            rows |= {row["case"]: {"part": name, **row} for row in attempt(PROTOCOLS[name], measurement, device)}
        result["rows"] = list(rows.values())
        result["complete"] = i + 1 == len(every)
        result["lines"] = lines(result, device)
        record.write(out, result)
    if out is not None and "flash-attention" in only:
        result["lines"].append(picture(result, out.with_suffix(".svg")))
        record.write(out, result)
    return result


def kept(path: Path, result: Row) -> list[Row]:
    """Rows of an earlier run, but those that failed. Raises ValueError where it was another device or other code."""
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    if other := [f"{name}: {old.get(name)}, now {result[name]}" for name in SAME if old.get(name) != result[name]]:
        raise ValueError(f"{path}: cannot be continued: {'; '.join(other)}")
    return [row for row in old["rows"] if "error" not in row]


def attempt(protocol: Any, measurement: Any, device: torch.device) -> list[Row]:
    """A protocol's rows, or its failure."""
    try:
        return protocol.measure(measurement, device)
    except Exception as error:  # such as memory
        if not alive(device):
            raise SystemExit(f"{measurement}: {record.words(error)}; the device no longer answers") from None
        return [{"case": case, "setting": {}, "contenders": {}, "times_faster": {}, "error": record.words(error)}
                for case in measurement.cases()]


def lines(result: Row, device: torch.device) -> list[str]:
    found = [f"Measured on {where(result)}; published numbers are of other hardware."]
    for name, protocol in PROTOCOLS.items():
        of_protocol = [row for row in result["rows"] if row["part"] == name]
        failed = [f"  {row['case']}: {row['error']}"[:128] for row in of_protocol if "error" in row]
        whole = [row for row in of_protocol if "error" not in row]
        found += [*(protocol.lines(whole, device, result["quick"]) if whole else []), *failed]
    return found


def where(result: Row) -> str:
    return result["machine"]["GPU" if result["device"] == "cuda" else "CPU"]


def picture(result: Row, path: Path) -> str:
    """Draws it; where, or why not."""
    try:
        figure.save(result["rows"], path, where(result))
    except Exception as error:  # such as no matplotlib
        return f"no picture: {record.words(error)}"
    return f"Drawn: {path}"
