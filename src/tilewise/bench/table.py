"""Benchmark results as lines of plain text."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STATES = {"wrong": "wrong", "refused": "-", "absent": ""}


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each shape and pass; columns of those who took part; reasons for the rest at the end.

    Numbers are FLOP/s; the last column says how many times faster the first contender is than the fastest other.
    """
    names = list(dict.fromkeys(name for row in rows for name, entry in row.get("contenders", {}).items()
                               if entry["state"] != "absent"))
    widths = [max(len(name), 6) for name in names]
    heads = " ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))
    unit, factor = ("TFLOP/s", 1) if _fastest(rows) >= 1 else ("GFLOP/s", 1000)
    found = [f"{unit:22} {heads} {'ratio':>6}"]
    for row in rows:
        for mode in ("forward", "backward"):
            found.append(f"{_title(row['shape'])} {'fwd' if mode == 'forward' else 'bwd'} " + (
                row["error"] if "error" in row else _cells(row["contenders"], mode, names, widths, factor)))
    return found + _remarks(rows)


def _title(shape: dict[str, Any]) -> str:
    length = f"{shape['seqlen'] // 1024}k" if shape["seqlen"] % 1024 == 0 else str(shape["seqlen"])
    return f"d{shape['head_dim']:<4} {length:>4} {'causal' if shape['causal'] else 'full':7}"


def _fastest(rows: Sequence[dict[str, Any]]) -> float:
    return max((entry["forward"]["tflops"] for row in rows for entry in row.get("contenders", {}).values()
                if "forward" in entry), default=0.0)


def _cells(entries: dict[str, Any], mode: str, names: Sequence[str], widths: Sequence[int], factor: int) -> str:
    rates = {name: entry[mode]["tflops"] for name, entry in entries.items() if mode in entry}
    cells = [f"{rates[name] * factor:.3g}" if name in rates else STATES.get(entries[name]["state"], "") for name in names]
    first, best = next(iter(entries)), max((rate for name, rate in list(rates.items())[1:]), default=0.0)
    ratio = f"{rates[first] / best:.2f}" if best and first in rates else ""
    return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + f" {ratio:>6}"


def _remarks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why there is no number: one line per contender and reason."""
    reasons: dict[tuple[str, str, str], int] = {}
    for row in rows:
        for name, entry in row.get("contenders", {}).items():
            if entry["state"] != "timed":
                key = name, entry["state"], entry["reason"]
                reasons[key] = reasons.get(key, 0) + 1
    return [f"{name}: {state}{f' {times} times' if times > 1 and state != 'absent' else ''}: {reason}"[:160]
            for (name, state, reason), times in reasons.items()]
