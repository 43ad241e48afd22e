"""Results as lines of plain text, and as tables in Markdown."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tilewise.bench.contest import BOTH
from tilewise.bench.record import Entry, Row

TENSORS = "out", "lse", "dq", "dk", "dv"
INTERPRETED = "interpreter"             # the part of a result that was measured in Triton's interpreter
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def lines(rows: Sequence[Row]) -> list[str]:
    """Each setting and contender: root mean square and maximum of the errors against fp64; "!" where the rule allows less."""
    found = [f"{'error against fp64: root mean square, maximum':46} " + " ".join(f"{name:>15}" for name in TENSORS)]
    for row in rows:
        found.append(row["case"].removesuffix(f" {BOTH}"))
        for name, entry in row["contenders"].items():
            if "rms" in entry:
                cells = " ".join(f"{pair(entry, tensor):>15}" for tensor in TENSORS)
                found.append(f"  {'! ' * (entry['state'] == 'wrong') + name:44} {cells}")
    return found + gaps(rows)


def pair(entry: Entry, tensor: str) -> str:
    return f"{entry['rms'][tensor][0]:.1e} {entry['errors'][tensor][0]:.1e}" if tensor in entry["rms"] else "-"


def gaps(rows: Sequence[Row]) -> list[str]:
    """Who has no number, or a wrong one, and why: a line for each."""
    reasons = dict.fromkeys((name, entry["state"], entry["reason"]) for row in rows for name, entry in row["contenders"].items()
                            if entry["state"] != "right")
    return [f"{name}: {state}: {reason}"[:128] for name, state, reason in reasons]


def of_inputs(rows: Sequence[Row]) -> str:
    """A line for each kind of inputs, in bf16."""
    chosen = [row for row in rows if row["part"] == "inputs" and row["setting"]["dtype"] == "bfloat16"]
    return markdown(chosen, ("out", "dq", "dk"), ("cpu", "sdpa flash", "sdpa math", "standard"), "inputs", lambda s: s["kind"])


def of_lengths(rows: Sequence[Row]) -> str:
    """A line for each number of keys and dtype."""
    chosen = [row for row in rows if row["part"] == "lengths"]
    return markdown(chosen, ("out", "lse", "dq"), ("cpu", "sdpa flash", "standard"), "keys",
                    lambda s: f"{s['seqlen_k']:,}, {SHORT[s['dtype']]}")


def of_dtypes(rows: Sequence[Row]) -> str:
    """A line for each dtype of the rows that Triton's interpreter took part in."""
    chosen = [row for row in rows if row["part"] == INTERPRETED and row["setting"]["kind"] in ("normal", "scores x 16")]
    return markdown(chosen, ("out", "dq"), ("triton (interpreter)", "cpu", "sdpa flash", "standard"), "inputs",
                    lambda s: f"{s['kind']}, {SHORT[s['dtype']]}")


TABLES = {"inputs": of_inputs, "lengths": of_lengths, "dtypes": of_dtypes}     # of docs/numerics.md


def markdown(rows: Sequence[Row], tensors: Sequence[str], names: Sequence[str], head: str, label: Callable[[Any], str]) -> str:
    """Root mean square errors over those of the truth."""
    columns = [(tensor, name) for tensor in tensors for name in names
               if any(tensor in row["contenders"].get(name, {}).get("rms", {}) for row in rows)]
    found = [[head, *(f"{tensor}: {name}" for tensor, name in columns)], ["---"] * (1 + len(columns))]
    for row in rows:
        pairs = [row["contenders"].get(name, {}).get("rms", {}).get(tensor) for tensor, name in columns]
        found.append([label(row["setting"]), *("" if pair is None else f"{pair[0] / pair[1]:.1e}" for pair in pairs)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in found)
