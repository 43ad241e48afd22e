"""Results of this room as pictures, readable without colours too. Needs matplotlib."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID = "#1f2430", "#e5e7eb"
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#f0e442", "#56b4e9"   # Okabe and Ito's
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++")
Panel = Callable[["Axes", list[Mapping[str, Any]]], None]


def save(result: Mapping[str, Any], path: Path) -> None:
    """One panel for each part that has one. The format is that of the path's suffix."""
    import matplotlib
    from matplotlib.figure import Figure

    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        parts.setdefault(row["part"], []).append(row)
    drawn = [(PANELS[part], rows) for part, rows in parts.items() if part in PANELS]
    picture = Figure(figsize=(5.2 * len(drawn) + (1.5 if len(drawn) == 1 else 0), 4.2), layout="constrained")
    for axes, (panel, rows) in zip(picture.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        panel(axes, rows)
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tilewise"}):
        picture.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)      # the same file each time


def accounts(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    """Bars of traffic, and what is printed as ticks."""
    names = [row["case"] for row in rows]
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        ours, flash = row["case"].startswith("Tilewise"), row["case"].startswith("Flash")
        axes.barh(place, row["contenders"]["closed form"]["count"] / 1e9, 0.7, color=BLUE if ours else SKY if flash else ORANGE,
                  hatch="" if ours else HATCHES[1] if flash else HATCHES[2], edgecolor="white")
        for version in row["published"].values():
            axes.plot([version["bytes"] / 1e9] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
    axes.set_yticks(list(places), names)
    axes.set_xlabel("GB, forward and backward; ticks: printed")
    axes.set_title("GPT-2 medium: slow-memory traffic", loc="left")


def against_blocks(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    x = [row["setting"]["block_k"] for row in rows]
    axes.plot(x, [row["contenders"]["closed form"]["count"] / 1e9 for row in rows], "o-", color=BLUE, label="traffic, GB")
    axes.plot(x, [row["setting"]["slow_memory_s"] * 1e3 for row in rows], "s--", color=ORANGE, label="slow memory, ms")
    axes.plot(x, [row["setting"]["arithmetic_s"] * 1e3 for row in rows], "^:", color=GREEN, label="arithmetic, ms")
    axes.plot(x, [row["contenders"]["closed form"]["seconds"] * 1e3 for row in rows], "-", color=INK, linewidth=3, alpha=0.3,
              label="time: the slower")
    axes.set_xticks(x)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block of keys, B_c")
    axes.legend(fontsize=8)
    axes.set_title("Forward against the block size", loc="left")


def against_density(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    x = [100 * row["setting"]["density"] for row in rows]
    y = [row["contenders"]["closed form"]["seconds"] * 1e3 for row in rows]
    axes.plot(x, y, "o-", color=BLUE, label="block-sparse")
    axes.axhline(y[0], color=ORANGE, linestyle="--", label="dense")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("blocks kept, %")
    axes.set_ylabel("ms, roofline")
    axes.legend(fontsize=8)
    axes.set_title(f"Block-sparse, N {rows[0]['setting']['seqlen']}", loc="left")


def of_memory(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    x = [row["setting"]["seqlen"] for row in rows]
    for name, style, colour in (("standard", "s--", ORANGE), ("tilewise", "o-", BLUE)):
        axes.loglog(x, [row["contenders"][name]["bytes"] / 1e6 for row in rows], style, color=colour, label=name)
    for name, marker in (("PyTorch", "x"), ("FlashAttention", "+")):
        there = [row for row in rows if name in row["published"]]
        axes.plot([row["setting"]["seqlen"] for row in there], [row["published"][name]["bytes"] / 1e6 for row in there], marker,
                  color=INK, label=f"{name}, printed")
    axes.set_xlabel("sequence length")
    axes.set_ylabel("MB at the peak")
    axes.legend(fontsize=8)
    axes.set_title("Memory, forward and backward", loc="left")


def of_exponents(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    for kind, marker, colour in (("streamed", "o", BLUE), ("all", "s", ORANGE)):
        shown = [row for row in rows if kind in row["contenders"]]
        axes.loglog([row["setting"]["theory"] for row in shown], [row["contenders"][kind]["count"] for row in shown], marker,
                    color=colour, label=kind, markerfacecolor="none")
    line = sorted(row["setting"]["theory"] for row in rows)
    unit = rows[0]["contenders"]["streamed"]["count"] / rows[0]["setting"]["theory"]
    axes.loglog(line, [unit * t for t in line], "-", color=INK, linewidth=1, label="in proportion")
    axes.set_xlabel("N² d² / M")
    axes.set_ylabel("bytes counted, forward")
    axes.legend(fontsize=8)
    axes.set_title("Counted traffic against theory", loc="left")


def of_kernels(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    """A bar for what each kernel reads and one for what it writes, in parts by tensor."""
    bars = [(f"{row['case']}, {side}", row["setting"][side]) for row in rows for side in ("read", "written")]
    tensors = sorted({name for _, by_tensor in bars for name in by_tensor})
    colours = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, "#999999", "white")
    longest = max(sum(by_tensor.values()) for _, by_tensor in bars)
    for place, (_, by_tensor) in zip(range(len(bars), 0, -1), bars, strict=True):
        left = 0
        for i, name in enumerate(tensors):
            if name in by_tensor:
                axes.barh(place, by_tensor[name], 0.7, left=left, color=colours[i % 8], hatch=HATCHES[i // 8 % 8],
                          edgecolor=INK, linewidth=0.5)
                if by_tensor[name] > 0.03 * longest:
                    axes.text(left + by_tensor[name] / 2, place, name, ha="center", va="center", fontsize=7,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
                left += by_tensor[name]
    axes.set_yticks(list(range(len(bars), 0, -1)), [label for label, _ in bars])
    axes.set_xlabel("bytes")
    axes.set_title("Counted by tensor", loc="left")


def of_roofs(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    first = rows[0]["setting"]
    peak, bandwidth = first["peak"], first["bandwidth"]
    marked = [row["setting"]["intensity"] for row in rows]
    low, high = min([*marked, peak / bandwidth]) / 4, max([*marked, peak / bandwidth]) * 4
    axes.loglog([low, peak / bandwidth, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12], "-", color=INK)
    algorithms = dict.fromkeys(row["setting"]["algorithm"] for row in rows)
    for algorithm, marker, colour in zip(algorithms, ("s", "o"), (ORANGE, BLUE), strict=True):
        of = [row for row in rows if row["setting"]["algorithm"] == algorithm]
        bounds = ", ".join(dict.fromkeys(row["setting"]["bound"] for row in of))
        speeds = [row["setting"]["flops"] / row["contenders"]["roofline"]["seconds"] / 1e12 for row in of]
        axes.loglog([row["setting"]["intensity"] for row in of], speeds, marker, color=colour, markersize=8,
                    label=f"{algorithm}: {bounds}")
    axes.set_xlabel("FLOP per byte of slow memory")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=8)
    axes.set_title(f"Roofline of {first['device']}", loc="left")


PANELS: dict[str, Panel] = {
    "table": accounts, "block size": against_blocks, "block-sparse": against_density, "memory": of_memory,
    "exponents": of_exponents, "count": of_kernels, "roofline": of_roofs}
