"""Every comparison that Tilewise loses, in plain sight."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.pages.words import duration, ratio
from tilewise.report import names
from tilewise.report.blocks import Block, Cell, Table, Text
from tilewise.report.headline import Loss, losses
from tilewise.report.results import File
from tilewise.report.sections.shared import machines, spread


def build(files: Sequence[File]) -> list[Block]:
    found, count = losses(files)
    if not count:
        return []
    if not found:
        return [Text(f"In none of the {count} comparisons of these files, with other implementations and with standard attention, "
                     "is Tilewise slower.")]
    several = len(machines(files)) > 1
    head = ["case", *["machine"] * several, "against", "times its speed", "quartiles", "Tilewise", "the other"]
    return [Text(f"In {len(found)} of the {count} comparisons of these files, with other implementations and with standard attention, "
                 "Tilewise is slower or does not run. Where the quartiles lie on both sides of 1, the two are about as fast."),
            Table("Slower or not run, worst first", head, [line(loss, several) for loss in found])]


def line(loss: Loss, several: bool) -> list[Cell | str]:
    ours, other = loss.row.ours, loss.row.entries[loss.other]
    where: list[Cell | str] = [loss.row.case, *[loss.file.machine] * several, names.title(loss.other)]
    if loss.found is None:
        return [*where, Cell(loss.reason, "bad"), "", "–", duration(other.seconds or 0)]
    about = loss.found.quartiles is not None and loss.found.quartiles[1] >= 1
    return [*where, Cell(ratio(loss.found.median), "" if about else "bad"), spread(loss.found),
            duration(ours.seconds or 0) if ours else "", duration(other.seconds or 0)]
