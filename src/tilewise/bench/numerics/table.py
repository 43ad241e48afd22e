"""Results as lines of plain text, and as tables in Markdown."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilewise.bench.contest import BOTH
from tilewise.bench.record import Entry, Row

TENSORS = "out", "lse", "dq", "dk", "dv"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def lines(rows: Sequence[Row]) -> list[str]:
    """Each setting and contender: root mean square and maximum of the errors against fp64."""
    found = ["error against fp64: root mean square, maximum      " + " ".join(f"{name:>15}" for name in TENSORS)]
    for row in rows:
        found.append(row["case"].removesuffix(f" {BOTH}"))
        for name, entry in row["contenders"].items():
            if "rms" in entry:
                cells = " ".join(f"{pair(entry, tensor):>15}" for tensor in TENSORS)
                found.append(f"  {name + ' (wrong)' * (entry['state'] == 'wrong'):48} {cells}")
    return found + gaps(rows)


def pair(entry: Entry, tensor: str) -> str:
    return f"{entry['rms'][tensor][0]:.1e} {entry['errors'][tensor][0]:.1e}" if tensor in entry["rms"] else "-"


def gaps(rows: Sequence[Row]) -> list[str]:
    """Who has no number, or a wrong one, and why: a line for each."""
    reasons = dict.fromkeys((name, entry["state"], entry["reason"]) for row in rows for name, entry in row["contenders"].items()
                            if entry["state"] != "right")
    return [f"{name}: {state}: {reason}"[:128] for name, state, reason in reasons]


def by_input(rows: Sequence[Row], tensor: str) -> str:
    """Root mean square errors of one tensor: a line for each kind of inputs and dtype, a column for each contender."""
    return markdown(rows, [tensor], lambda s: [s["kind"], SHORT[s["dtype"]]], ["inputs", "dtype"])


def by_length(rows: Sequence[Row], tensors: Sequence[str]) -> str:
    """The same of rows of growing length."""
    return markdown(rows, tensors, lambda s: [f"{s['seqlen_k']:,}", SHORT[s["dtype"]]], ["keys", "dtype"])


def markdown(rows: Sequence[Row], tensors: Sequence[str], label: Any, heads: Sequence[str]) -> str:
    names = list(dict.fromkeys(name for row in rows for name, entry in row["contenders"].items() if "rms" in entry))
    columns = [(tensor, name) for tensor in tensors for name in names
               if any(tensor in row["contenders"][name].get("rms", {}) for row in rows)]
    titles = [name if len(tensors) == 1 else f"{tensor}, {name}" for tensor, name in columns]
    found = [[*heads, *titles], ["---"] * (len(heads) + len(columns))]
    for row in rows:
        of = [row["contenders"].get(name, {}).get("rms", {}).get(tensor) for tensor, name in columns]
        found.append(label(row["setting"]) + ["" if x is None else f"{x[0]:.1e}" for x in of])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in found)
