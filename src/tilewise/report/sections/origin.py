"""Where the numbers come from: files, machines, versions; and who was not timed."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Facts, Table, Text
from tilewise.report.results import DONE, File
from tilewise.report.sections.shared import machines

FEW = 3         # cases that are named one by one
INTRO = ("Before it is timed, each contender's results are held to the tolerance rule on the same inputs. Wrong: they "
         "missed it. Refused: it raised, for example for want of memory. Absent: it is not there on this machine.")


def refused(files: Sequence[File]) -> list[Block]:
    """Each contender that was refused, wrong or absent, with the reason and the cases."""
    several = len(machines(files)) > 1
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for file in files:
        for row in file.rows:
            if row.error:
                found[file.machine, "all", "failed", row.error].append(row.case)
            for name, entry in row.entries.items():
                if entry.state not in DONE:
                    found[file.machine, names.title(name), entry.state, entry.reason].append(row.case)
    if not found:
        return []
    weight = {"wrong": 0, "failed": 1, "refused": 2, "absent": 3}
    lines: list[list[Cell | str]] = []
    for (machine, who, state, reason), cases in sorted(found.items(), key=lambda item: weight[item[0][2]]):
        where = "; ".join(cases) if len(cases) <= FEW else f"{len(cases)} cases, from {cases[0]} to {cases[-1]}"
        lines.append([who, *[machine] * several, Cell(state, "bad" if state in ("wrong", "failed") else ""),
                      Cell(reason, "long"), Cell(where, "long")])
    return [Text(INTRO), Table("Not timed", ["contender", *["machine"] * several, "state", "reason", "cases"], lines)]


def build(files: Sequence[File]) -> list[Block]:
    lines: list[list[Cell | str]] = []
    for file in files:
        notes = ["unfinished: not all its cases are measured"] * (not file.complete) \
            + ["quick: shapes this small say little about speed"] * file.quick
        commit = (file.commit or "none")[:12] + ("+ changes" if (file.commit or "").endswith("+") else "")
        lines.append([file.name, file.benchmark, file.machine, str(len(file.rows)), date(file.date), commit,
                      Cell("; ".join(notes) or "complete", "bad" if notes else "")])
    found: list[Block] = [Table("Files", ["file", "benchmark", "machine", "cases", "date (UTC)", "commit", "state"], lines)]
    for machine, of in machines(files).items():
        first: dict[str, str] = {}
        for group in alike(of):
            facts = {**group[0].facts, **{k: said(v) for k, v in group[0].others.items()}}
            names_of = [("Files", ", ".join(file.name for file in group))] if len(files) > 1 else []
            other = {k: v for k, v in facts.items() if v != first.get(k, "")}
            found.append(Facts(f"{machine}, what differs" if first else machine, [*names_of, *other.items()]))
            first = first or facts
    return found


def alike(files: Sequence[File]) -> list[list[File]]:
    """Files of one machine, those that say the same of it together."""
    groups: dict[str, list[File]] = defaultdict(list)
    for file in files:
        groups[str([sorted(file.facts.items()), sorted((k, str(v)) for k, v in file.others.items())])].append(file)
    return list(groups.values())


def date(text: str) -> str:
    return text[:16].replace("T", " ") or "–"


def said(value: object) -> str:
    """A fact of a file in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
