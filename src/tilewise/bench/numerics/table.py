"""Results as lines of plain text, and as tables in Markdown."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from tilewise.bench.contest import BOTH
from tilewise.bench.numerics import causes
from tilewise.bench.record import Entry, Row

TENSORS = "out", "lse", "dq", "dk", "dv"
INTERPRETED = "interpreter"             # the part of a result that was measured in Triton's interpreter
CAUSES = "causes"                       # the part that says what one rounding costs
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
                            if entry["state"] not in ("right", "timed"))
    return [f"{name}: {state}: {reason}"[:128] for name, state, reason in reasons]


def markdown(rows: Sequence[Row]) -> str:
    """A table for each part; each chooses what is telling, of all that was measured."""
    parts = [part for part in TABLES if any(row["part"] == part for row in rows)]
    return "\n\n".join(TABLES[part]([row for row in rows if row["part"] == part]) for part in parts)


def of_inputs(rows: Sequence[Row]) -> str:
    """A line for each kind of inputs, in bf16."""
    chosen = [row for row in rows if row["setting"]["dtype"] == "bfloat16"]
    columns = product(("out", "dq"), ("cpu", "sdpa flash", "sdpa math", "standard"))
    return one_table(chosen, columns, "inputs", lambda s: s["kind"])


def of_causes(rows: Sequence[Row]) -> str:
    """A line for each kind of inputs, in bf16, of what one rounding costs."""
    columns = [*product(("out",), causes.CAUSES[:3]), *product(("dq",), causes.CAUSES)]
    return one_table(rows, columns, "inputs", lambda s: s["kind"])


def of_interpreted(rows: Sequence[Row]) -> str:
    """A line for each dtype and two kinds of inputs."""
    chosen = [row for row in rows if row["setting"]["kind"] in ("normal", "scores x 64")]
    return one_table(chosen, product(("out", "dq"), ("triton (interpreter)", "cpu", "sdpa flash", "standard")), "inputs",
                     lambda s: f"{s['kind']}, {SHORT[s['dtype']]}")


def of_lengths(rows: Sequence[Row]) -> str:
    """A line for each number of keys and dtype."""
    return one_table(rows, product(("out", "dq"), ("cpu", "sdpa flash", "standard")), "keys",
                     lambda s: f"{s['seqlen_k']:,}, {SHORT[s['dtype']]}")


TABLES = {"inputs": of_inputs, CAUSES: of_causes, INTERPRETED: of_interpreted, "lengths": of_lengths}


def one_table(rows: Sequence[Row], columns: Iterable[tuple[str, str]], head: str, label: Callable[[Any], str]) -> str:
    """Root mean square errors over those of the truth; columns: (tensor, contender)."""
    columns = [(tensor, name) for tensor, name in columns if any(of(row, tensor, name) for row in rows)]
    found = [[head, *(f"{tensor}: {name}" for tensor, name in columns)], ["---"] * (1 + len(columns))]
    for row in rows:
        pairs = [of(row, tensor, name) for tensor, name in columns]
        found.append([label(row["setting"]), *(f"{pair[0] / pair[1]:.1e}" if pair else "" for pair in pairs)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in found)


def of(row: Row, tensor: str, name: str) -> list[float] | None:
    """The root mean squares of a contender's errors and of the truth, if it has this tensor."""
    entry = row["contenders"].get(name)
    return entry["rms"].get(tensor) if entry is not None and "rms" in entry else None
