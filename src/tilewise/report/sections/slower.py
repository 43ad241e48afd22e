"""Every comparison that Tilewise loses, in plain sight."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.pages.words import duration, ratio
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Table, Text
from tilewise.report.headline import Duel, Loss, duels, severity
from tilewise.report.results import File
from tilewise.report.sections.shared import machines, spread

FEW = 10        # that are shown at once


def build(files: Sequence[File]) -> list[Block]:
    every = duels(files)
    count, lost = sum(duel.compared for duel in every), [loss for duel in every for loss in duel.losses]
    if not count:
        return []
    if not lost:
        return [Text(f"In none of the {count} comparisons of these files, with other implementations and with standard "
                     "attention, is Tilewise slower.")]
    several = len(machines(files)) > 1
    head = ["case", *["machine"] * several, "against", "times its speed", "quartiles", "Tilewise", "the other"]
    lines = [line(loss, several) for loss in sorted(lost, key=severity)]
    folded = f"All {len(lost)}, worst first" if len(lost) > FEW else ""
    return [Text(f"In {len(lost)} of the {count} comparisons of these files, with other implementations and with standard "
                 "attention, Tilewise is slower or does not run. Where the quartiles lie on both sides of 1, the two are "
                 "about as fast."),
            *([by_other(every, several)] if folded else []),
            Table("Slower or not run, worst first", head, lines, folded, detail=bool(folded))]


def by_other(every: Sequence[Duel], several: bool) -> Table:
    """How often, against whom."""
    head = ["against", *["machine"] * several, "benchmark", "slower in", "at worst", "where"]
    lines: list[list[Cell | str]] = []
    for duel in every:
        if duel.losses:
            worst = duel.losses[0]
            lines.append([names.title(duel.other), *[duel.file.machine] * several, duel.file.benchmark,
                          f"{len(duel.losses)} of {duel.compared} cases",
                          Cell(ratio(severity(worst)) if worst.found else "not run", "bad"), Cell(worst.row.case, "long")])
    return Table("Against whom, and how often", head, lines)


def line(loss: Loss, several: bool) -> list[Cell | str]:
    ours, other = loss.row.ours, loss.row.entries[loss.other]
    where: list[Cell | str] = [loss.row.case, *[loss.file.machine] * several, names.title(loss.other)]
    if loss.found is None:
        return [*where, Cell(loss.reason, "bad"), "", "–", duration(other.seconds or 0)]
    about = loss.found.quartiles is not None and loss.found.quartiles[1] >= 1
    return [*where, Cell(ratio(loss.found.median), "" if about else "bad"), spread(loss.found),
            duration(ours.seconds or 0) if ours else "", duration(other.seconds or 0)]
