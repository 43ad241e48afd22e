"""The roofline: how much a device could do for the bytes that a case moves, and how much each contender did."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

from tilewise.report import charts, names
from tilewise.report.blocks import Block, Heading, Picture, Table, Text
from tilewise.report.charts import Roof
from tilewise.report.results import File
from tilewise.report.sections.shared import machines


def build(files: Sequence[File]) -> list[Block]:
    found: list[Block] = []
    for machine, of in machines(files).items():
        roofs = [roof for file in of for roof in roofs_of(file)]
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        lines = []
        for row in (row for file in of for row in file.rows):
            intensity = row.setting.get("flop_per_byte")
            if isinstance(intensity, (int, float)) and intensity > 0:
                for name, entry in row.entries.items():
                    if entry.tflops:
                        points[name].append((float(intensity), entry.tflops))
                        lines.append([f"{row.case}, {names.title(name)}", f"{intensity:.3g}", f"{entry.tflops:.3g}",
                                      f"{entry.tflops / reach(roofs, intensity):.0%}" if roofs else ""])
        if points and roofs:
            table = Table("Roofline", ["case", "FLOP per byte", "TFLOP/s", "of the roof"], lines, "The numbers", detail=True)
            words = f"{len(lines)} points below the roofs of {machine}: " + "; ".join(r.words for r in roofs)
            found += [Heading(machine), Picture("", words, partial(charts.roofline, dict(points), roofs, charts.looks(list(points))),
                                                table)]
    return found and [Text("The sloped line is what memory allows, the level one what the arithmetic units allow; a case's distance "
                           "below them is what is left (Williams, Waterman and Patterson 2009)."), *found]


def roofs_of(file: File) -> list[Roof]:
    """Of a file's `roofs`: {words: {"tflops": ..., "gb_per_s": ...}}."""
    roofs = file.others.get("roofs")
    if not isinstance(roofs, Mapping):
        return []
    return [Roof(str(words), float(roof["tflops"]), float(roof["gb_per_s"])) for words, roof in roofs.items()
            if isinstance(roof, Mapping) and all(isinstance(roof.get(k), (int, float)) and roof[k] > 0 for k in ("tflops", "gb_per_s"))]


def reach(roofs: Sequence[Roof], intensity: float) -> float:
    """The highest TFLOP/s that the roofs allow at an intensity."""
    return max(min(roof.tflops, intensity * roof.gb_per_s / 1e3) for roof in roofs)
