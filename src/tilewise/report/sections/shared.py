"""What several sections do: rows by machine, tables of who takes how long, pictures over sequence length."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from tilewise.pages.words import digits, duration, length, ratio
from tilewise.report import charts, names
from tilewise.report.blocks import Block, Cell, Heading, Picture, Table
from tilewise.report.charts import Curve, Guide, Words
from tilewise.report.results import DONE, Entry, File, Ratio, Row

NOTHING = "–"
Value = Callable[[Entry], float | None]


def machines(files: Sequence[File]) -> dict[str, list[File]]:
    """Files by what they ran on, in the order of the files."""
    found = defaultdict(list)
    for file in files:
        found[file.machine].append(file)
    return dict(found)


def each_machine(files: Sequence[File], benchmarks: Sequence[str], build: Callable[[list[Row]], list[Block]]) -> list[Block]:
    """What `build` makes of each machine's rows, below its name."""
    found: list[Block] = []
    for machine, of in machines(files).items():
        rows = [row for file in of if file.benchmark in benchmarks for row in file.rows]
        blocks = [block for block in build(rows) if not isinstance(block, Table) or block.rows] if rows else []
        if blocks:
            found += [Heading(machine, note=origin([file for file in of if file.benchmark in benchmarks])), *blocks]
    return found


def origin(files: Sequence[File]) -> str:
    """Versions, threads, commits and days of files of one machine."""
    environments = [of for file in files if isinstance(of := file.others.get("environment"), Mapping)]
    found = (each("torch {}", [file.facts.get("torch", "").split(",")[0] for file in files]),
             each("threads: {}", [of.get("threads") for of in environments]),
             each("commit {}", [(file.commit or "")[:12] for file in files]), each("{}", [file.date[:10] for file in files]))
    return "; ".join(filter(None, found))


def each(words: str, values: Iterable[object]) -> str:
    """Different values within some words; nothing without values."""
    there = dict.fromkeys(str(value) for value in values if value)
    return words.format(", ".join(there)) if there else ""


def everyone(rows: Iterable[Row]) -> list[str]:
    """All contenders of some rows: ours, standard attention, then by first appearance."""
    return list(charts.looks([name for row in rows for name in row.entries]))


def ratio_cell(found: Ratio | None, *, other: str = "") -> Cell | str:
    """How many times faster, with quartiles; what is slower says so."""
    if found is None:
        return NOTHING
    words = f"{ratio(found.median)}{f' {other}' if other else ''}"
    return Cell(words, "bad" if found.median < 1 else "")


def spread(found: Ratio | None) -> str:
    """The quartiles of a ratio."""
    return "" if found is None or found.quartiles is None else "{:.3g} to {:.3g}".format(*found.quartiles)


def state(entry: Entry | None, value: Value, words: Words) -> Cell | str:
    """An entry's number, or why it has none."""
    if entry is None:
        return ""
    found = value(entry) if entry.state in DONE else None
    if found is not None:
        return words(found)
    return NOTHING if entry.state in (*DONE, "absent") else Cell(entry.state, "bad" if entry.state == "wrong" else "")


def contest(rows: Sequence[Row], caption: str, folded: str = "") -> Table:
    """Each case: our time, the fastest other implementation, standard attention."""
    lines: list[list[Cell | str]] = []
    unit, rate = flops(rows)
    for row in rows:
        best, standard = names.best_peer(row), names.best_standard(row)
        lines.append([row.case, state(row.ours, lambda e: e.seconds, duration), state(row.ours, rate, digits),
                      Cell(f"{names.title(best[0])}, {duration(row.entries[best[0]].seconds or 0)}") if best else NOTHING,
                      ratio_cell(best[1] if best else None), spread(best[1] if best else None),
                      ratio_cell(standard[1] if standard else None)])
    head = ["case", "Tilewise", unit, "fastest other", "times faster", "quartiles", "than standard"]
    return without_empty(Table(caption, head, lines, folded))


def flops(rows: Sequence[Row]) -> tuple[str, Value]:
    """A unit that suits everyone's FLOPs per second, and how many of it."""
    most = max((e.tflops for row in rows for e in row.entries.values() if e.tflops), default=0.0)
    return ("TFLOP/s", lambda e: e.tflops) if most >= 1 else ("GFLOP/s", lambda e: e.tflops and 1000 * e.tflops)


def without_empty(table: Table) -> Table:
    """The table without columns that say nothing."""
    if not table.rows:
        return table
    said = [{c.text if isinstance(c, Cell) else c for c in column} - {"", NOTHING} for column in zip(*table.rows, strict=True)]
    kept = [i for i in range(len(table.head)) if i == 0 or said[i]]
    return Table(table.caption, [table.head[i] for i in kept], [[row[i] for i in kept] for row in table.rows],
                 table.folded, table.detail)


def all_times(rows: Sequence[Row], caption: str, value: Value = lambda e: e.seconds, words: Words = duration,
              folded: str = "Every contender's time") -> Table:
    """Each case and the number of each contender."""
    who = everyone(rows)
    lines = [[row.case, *(state(row.entries.get(name), value, words) for name in who)] for row in rows]
    return without_empty(Table(caption, ["case", *map(names.title, who)], lines, folded, detail=bool(folded)))


def pictures(rows: Sequence[Row], *, key: Callable[[Row], tuple[str, ...]], value: Value, words: Words, label: str,
             x: Callable[[Row], Any] = names.length, x_label: str = "sequence length, tokens", lengths: bool = True,
             log_y: bool = True, guides: Callable[[list[Row]], Sequence[Guide]] = lambda rows: ()) -> list[Picture]:
    """A picture for each group of rows with two lengths or more, all contenders in it. key: a group's name, in parts."""
    look = charts.looks([name for row in rows for name in row.entries])
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if x(row):
            groups[key(row)].append(row)
    found: list[Picture] = []
    for parts, of in apart(groups, x).items():
        of = sorted(of, key=x)
        drawn = [Curve(name, [(x(r), v) for r in of if name in r.entries and (v := value(r.entries[name])) is not None],
                       [x(r) for r in of if name in r.entries and r.entries[name].state == "refused"])
                 for name in look if all(names.role(r.entries[name]) != "ruler" for r in of if name in r.entries)]
        drawn = [curve for curve in drawn if curve.points]
        if not drawn or max(len({place for place, _ in curve.points}) for curve in drawn) < 2:
            continue
        title = ", ".join(part for part in parts if part)
        said = f"{label} against {x_label}, {title}: " + "; ".join(
            f"{names.title(c.name)} {words(c.points[0][1])} to {words(c.points[-1][1])}" for c in drawn)
        table = Table(f"{label}, {title}", [x_label.split(",")[0], *(names.title(c.name) for c in drawn)],
                      [[length(x(r)) if lengths else f"{x(r):.3g}",
                        *(state(r.entries.get(c.name), value, words) for c in drawn)] for r in of], "The numbers", detail=True)
        draw = partial(charts.curves, drawn, look, x=x_label, y=label, words=words, log_y=log_y, lengths=lengths,
                       guides=guides(of))
        found.append(Picture(title, said, draw, table))
    return found


def apart(groups: dict[tuple[str, ...], list[Row]], x: Callable[[Row], Any]) -> dict[tuple[str, ...], list[Row]]:
    """Groups in which no two rows stand at one place: others are divided by batch and heads."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for key, of in groups.items():
        crowded = len({x(row) for row in of}) < len(of)
        for row in of:
            found[(*key, shape(row)) if crowded else key].append(row)
    return found


def shape(row: Row) -> str:
    """Batch and heads in words."""
    heads, kv_heads = row.whole("heads", 0), row.whole("kv_heads", 0)
    return ", ".join([f"batch {row.whole('batch')}"] * ("batch" in row.setting)
                     + [f"{heads} heads" + (f" on {kv_heads}" if kv_heads not in (0, heads) else "")] * bool(heads))


def head_dim(row: Row) -> str:
    return f"head dim {row.setting['head_dim']}" if "head_dim" in row.setting else ""


def grouped(row: Row) -> str:
    """Whether query heads share key heads."""
    heads, kv_heads = row.whole("heads", 0), row.whole("kv_heads", 0)
    return f"{heads // kv_heads} heads share a key head" if kv_heads and heads > kv_heads else ""


def modes(rows: Sequence[Row]) -> list[str]:
    """Passes that are there, in their order."""
    there = dict.fromkeys(map(names.mode, rows))
    return [m for m in names.MODE_ORDER if m in there] + [m for m in there if m and m not in names.MODE_ORDER]
