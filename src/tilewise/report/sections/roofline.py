"""The roofline: what a device could do for the bytes that a case moves (`tilewise traffic roofline`), and what was measured."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tilewise.pages.words import digits, duration
from tilewise.report import charts, names
from tilewise.report.blocks import Block, Cell, Heading, Picture, Table, Text
from tilewise.report.charts import Roof
from tilewise.report.results import Entry, File, Row

PART, MODEL = "roofline", "least time, by the model"
DEVICES = {"cpu": "This CPU"}
NEEDED = ("peak", "bandwidth", "intensity", "flops")
INTRO = ("The sloped line is what memory allows, the level one what the arithmetic units allow (Williams, Waterman and "
         "Patterson 2009). FLOPs are those that an algorithm really makes, bytes those that it has to move; how far below the "
         "roof a point lies is what is left to gain.")


def build(files: Sequence[File]) -> list[Block]:
    modelled: dict[str, list[Row]] = defaultdict(list)
    for file in files:
        for row in file.rows:
            numbers = [row.setting.get(name) for name in NEEDED]
            if row.part == PART and all(isinstance(n, (int, float)) and n > 0 for n in numbers):
                modelled[str(row.setting.get("device", "a device without a name"))].append(row)
    found = [block for device, rows in modelled.items() for block in of_device(device, rows, files)]
    return found and [Text(INTRO), *found]


def of_device(device: str, rows: Sequence[Row], files: Sequence[File]) -> list[Block]:
    modelled: list[tuple[float, float]] = []
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    lines: list[list[Cell | str]] = []
    for row in rows:
        setting, least = row.setting, row.ours.seconds if row.ours else None
        if not least:
            continue
        modelled.append((setting["intensity"], setting["flops"] / least))
        entry = measured(row, device, files)
        seconds = entry.seconds if entry else None
        if entry and seconds:
            points[entry.name].append((setting["intensity"], setting["flops"] / seconds))
        lines.append([f"{setting.get('algorithm', '')}, {case(row)}", digits(setting["intensity"]),
                      str(setting.get("bound", "")), duration(least), duration(seconds) if seconds else "–",
                      f"{least / seconds:.0%}" if seconds else "–"])
    if not lines:
        return []
    first = rows[0].setting
    roof = Roof(f"roof: {flops(first['peak'])}, {first['bandwidth'] / 1e9:,.0f} GB/s", first["peak"], first["bandwidth"])
    drawn = dict(points) or {MODEL: modelled}
    table = Table(f"Roofline of {device}", ["case", "FLOP per byte", "bound by", "least time", "measured", "least ÷ measured"],
                  lines, "The numbers", detail=True)
    words = f"{len(lines)} cases below the {roof.words} of {device}"
    above = sum(y > roof.flops for of in points.values() for _, y in of)
    return [Heading(DEVICES.get(device, device)),
            Picture("", words, partial(charts.roofline, drawn, roof, charts.looks(list(drawn))), table),
            *[Text(f"{above} points lie above the roof, which cannot be: the machine was slower when its roof was measured.",
                   "bad")] * bool(above)]


def flops(peak: float) -> str:
    return f"{peak / 1e12:,.0f} TFLOP/s" if peak >= 1e12 else f"{peak / 1e9:,.0f} GFLOP/s"


def measured(row: Row, device: str, files: Sequence[File]) -> Entry | None:
    """The contender whose model a row is, in a row of the same setting that was measured on this device."""
    for file in files:
        if device in file.machine.split() or device == file.device == "cpu":
            for other in file.rows:
                if other.part != PART and facts(other.setting) == facts(row.setting) and names.is_attention(other):
                    entry = names.standard(other) if row.setting.get("algorithm") == "standard" else other.ours
                    if entry and entry.seconds:
                        return entry
    return None


def facts(setting: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows of the same case agree in, whatever their settings call it."""
    heads, mask = setting.get("heads"), setting.get("mask") or ("causal" if setting.get("causal") else "full")
    return (setting.get("batch"), setting.get("seqlen") or setting.get("seqlen_q"), heads, setting.get("kv_heads") or heads,
            setting.get("head_dim"), setting.get("dtype"), mask, setting.get("mode"))


def case(row: Row) -> str:
    """A setting in words."""
    batch, seqlen, heads, _, head_dim, dtype, mask, mode = facts(row.setting)
    return f"B {batch} N {seqlen} H {heads} D {head_dim} {dtype} {mask} {mode}"
