"""Results as lines of plain text."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.bench.contest import BOTH
from tilewise.bench.record import Entry, Row

TENSORS = "out", "lse", "dq", "dk", "dv"
INTERPRETED = "interpreter"             # the part of a result that was measured in Triton's interpreter
CAUSES = "causes"                       # the part that says what one rounding costs


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
