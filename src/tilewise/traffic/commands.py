"""What `tilewise traffic count`, `roofline`, `slopes` and `measure` do: results, without a terminal."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tilewise import costs, devices
from tilewise.bench.record import Row
from tilewise.costs import Blocks, Sizes, dense_walk
from tilewise.traffic import ncu, roofline, slopes
from tilewise.traffic.apart import apart
from tilewise.traffic.result import aligned, giga, result, row
from tilewise.traffic.shapes import Shape

FLOPS = ("products", "exponentials", "arithmetic")


def count(shape: Shape, tiles: Blocks, backward: bool) -> dict[str, Any]:
    """One problem, counted in the interpreter, by kernel and tensor, beside the closed forms."""
    launches = apart("count", shape=asdict(shape), tiles=tuple(tiles), backward=backward)
    rows, table, flops = [], [["kernel", "tensor", "read", "written", "closed form"]], [["kernel", *FLOPS]]
    for launch in launches:
        counted, form = launch["counted"], launch["form"]
        name, known = counted["name"], isinstance(form, dict)
        for tensor in sorted({*counted["read"], *counted["written"]}):
            pair = [counted[side].get(tensor, 0) for side in ("read", "written")]
            same = known and pair == [form[side].get(tensor, 0) for side in ("read", "written")]
            verdict = "same" if same else "differs" if known else "none"
            table.append([name, tensor, *(f"{n:,}" if n else "-" for n in pair), verdict])
        flops.append([name, *(f"{counted[unit]:,}" for unit in FLOPS)])
        total = {what: sum(of["read"].values()) + sum(of["written"].values())
                 for what, of in (("counted", counted), ("closed form", form)) if isinstance(of, dict)}
        setting = shape.setting | {"tile_q": tiles.q, "tile_k": tiles.k} | {side: counted[side] for side in ("read", "written")}
        rows.append(row("count", name, setting | {unit: counted[unit] for unit in FLOPS},
                        {what: {"count": n} for what, n in total.items()}))
    reasons = sorted({launch["form"] for launch in launches if isinstance(launch["form"], str)})
    lines = [f"{shape}; tiles of {tiles.q} x {tiles.k}; bytes", *aligned(table), "", "FLOPs", *aligned(flops)]
    return result(rows, [*lines, *(f"no closed form: {reason}" for reason in reasons)])


def estimate(shape: Shape, device: devices.Device, backward: bool) -> dict[str, Any]:
    """The least time of standard attention and of Tilewise on a device, and what bounds it."""
    estimates, rows = least_times(shape, device, backward)
    lines = [["ms at least", *devices.UNITS, "GB once", "GB asked for", "FLOP/byte", "bound by"]]
    for e in estimates:
        lines.append([e.name, *(f"{e.seconds[unit] * 1e3:.3f}" for unit in devices.UNITS), giga(e.least), giga(e.most),
                      f"{e.intensity:.0f}", e.bound])
    ratio = estimates[0].time / estimates[1].time
    text = [f"{shape}, {words(backward)}, on {device.name} ({device.source})", *aligned(lines), "",
            f"standard attention takes at least {ratio:.1f} times as long"]
    if device.name == "cpu":
        problem, _ = shape.described()
        width = devices.width_of(problem.dtype, problem.precision)
        text += ["", "each cache as fast memory of M bytes, before what is beyond it", *level_lines(shape, device.rate(width))]
    return result(rows, text)


def estimates_of(measured: Sequence[Row], device: devices.Device) -> dict[str, Any]:
    """The same for each case of plain attention that was measured, forward passes and both passes.

    Raises ValueError where there is none.
    """
    found = passes(measured)
    if not found:
        raise ValueError("--of: expected a result of `tilewise bench attention`, got one without a case of attention")
    rows, lines = [], [["ms at least", *devices.UNITS, "FLOP/byte", "bound by"]]
    for shape, backward in found:
        estimates, of_shape = least_times(shape, device, backward)
        rows += of_shape
        lines += [[row["case"], *(f"{e.seconds[unit] * 1e3:.3f}" for unit in devices.UNITS), f"{e.intensity:.0f}", e.bound]
                  for row, e in zip(of_shape, estimates, strict=True)]
    return result(rows, [f"on {device.name} ({device.source})", *aligned(lines)])


def passes(measured: Sequence[Row]) -> list[tuple[Shape, bool]]:
    """Shapes of plain attention among rows, and whether with the backward pass."""
    settings = [row["setting"] for row in measured if row["part"] == "attention"]
    return [(Shape(s["seqlen"], 0, s["batch"], s["heads"], s["kv_heads"], s["head_dim"], s["dtype"], s["causal"]),
             s["mode"] != "forward") for s in settings if s["mode"] in ("forward", "forward+backward")]


def least_times(shape: Shape, device: devices.Device, backward: bool) -> tuple[list[roofline.Estimate], list[dict[str, Any]]]:
    """Estimates of standard attention and of Tilewise, and their rows."""
    problem, x = shape.described()
    estimates = [roofline.standard(problem, device, backward),
                 roofline.tilewise(problem, x, device, backward, shape.splits)]
    mode, width = words(backward), devices.width_of(problem.dtype, problem.precision)
    return estimates, [row("roofline", f"{e.name}, {shape}, {mode}", shape.setting | {
        "algorithm": e.name, "mode": mode.replace(" and ", "+"), "device": device.name, "peak": device.rate(width),
        "bandwidth": device.bandwidth, "flops": e.flops, "intensity": e.intensity, "bound": e.bound,
        "unit_seconds": e.seconds, "bytes_least": e.least},
        {"roofline": {"seconds": e.time, "count": e.most}}) for e in estimates]


def words(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def level_lines(shape: Shape, peak: float) -> list[str]:
    """Traffic past each level of a CPU's caches, with tiles that fit it: M = 4 d B (Algorithm 1, line 1)."""
    problem, _ = shape.described()
    s = roofline.sizes(problem)
    rows = [["level", "M, KiB", "GB/s beyond", "tile", "GB, forward", "ms", "products ms"]]
    for name, fast, bandwidth in devices.levels():
        side = max(16, min(fast // s.itemsize // (4 * s.head_dim), s.seqlen_q))
        moved = costs.flash2_forward(s, dense_walk(s, Blocks(side, side))).total
        products = costs.products(s.scores, s.head_dim + s.head_dim_v) / peak
        rows.append([name, f"{fast >> 10:,}", f"{bandwidth / 1e9:.0f}", str(side), giga(moved),
                     f"{moved / bandwidth * 1e3:.2f}", f"{products * 1e3:.2f}"])
    return aligned(rows)


ASYMPTOTIC = [(n, d, side) for n in (16384, 32768, 65536) for d in (64, 128, 256) for side in (64, 128)]


def exponents(quick: bool) -> dict[str, Any]:
    """Exponents of N, d and M, fitted from counts, and from closed forms where no one can count."""
    counts = apart("sweep", points=slopes.grid(quick), backward=True)
    fits = [*slopes.fits(counts), *asymptotic()]
    lines = [["log bytes against", *(f"log {name}" for name in slopes.THEORY), "off by", "points"],
             ["theory", *(f"{e:g}" for e in slopes.THEORY.values()), "", ""]]
    rows = []
    for fit in fits:
        lines.append([fit.part, *(f"{fit.exponents[n]:.3f} +- {fit.errors[n]:.3f}" for n in slopes.THEORY), f"{fit.off:.1%}",
                      str(fit.points)])
        rows.append(row("fits", fit.part, {"exponents": fit.exponents, "standard_errors": fit.errors, "off": fit.off,
                                           "points": fit.points}, {}))
    for c in counts:
        m = 4 * c["d"] * c["side"]
        moved = {kind: {"count": slopes.moved(c, ("forward",), kind)} for kind in ("streamed", "all")}
        setting = {"n": c["n"], "d": c["d"], "m": m, "theory": c["n"]**2 * c["d"]**2 / m}
        rows.append(row("exponents", f"N {c['n']}, d {c['d']}, M {m}", setting, moved))
    notes = ["", "streamed: tensors that pass again and again. all: also what is moved once, and rows' statistics: lower terms",
             "of the theorems' sums, which vanish as N d / M and d grow; at 16K to 64K by the closed forms, which counts bear",
             "out."]
    return result(rows, [*aligned(lines), *notes], quick)


def asymptotic() -> list[slopes.Fit]:
    """Of everything that is moved, by the closed forms."""
    found = []
    for part, moved in (("forward, all, 16K to 64K", lambda s, b: costs.flash2_forward(s, dense_walk(s, b)).total),
                        ("backward, all, 16K to 64K", lambda s, b: costs.flash2_backward(s, b).total),
                        ("FlashAttention forward", lambda s, b: costs.flash1_forward(s, b).total),
                        ("FlashAttention backward", lambda s, b: costs.flash1_backward(s, b).total)):
        points = ((n, d, 4 * d * side, moved(Sizes.square(1, 1, n, d), Blocks(side, side))) for n, d, side in ASYMPTOTIC)
        found.append(slopes.fit(part, points))
    return found


def measured(shape: Shape, backward: bool) -> dict[str, Any]:
    """DRAM's traffic on this GPU, kernel by kernel."""
    kernels = ncu.measure(asdict(shape), backward)
    rows = [row("measured", f"{i} {k['name']}", shape.setting | {"read": k["read"], "written": k["written"]},
                {"ncu": {"count": k["read"] + k["written"]}}) for i, k in enumerate(kernels)]
    lines = [["kernel", "MB read", "MB written"], *([k["name"][:60], *(f"{k[side] / 1e6:,.2f}" for side in ("read", "written"))]
                                                    for k in kernels)]
    return result(rows, [f"{shape}; DRAM, by Nsight Compute", *aligned(lines)], device="cuda")
