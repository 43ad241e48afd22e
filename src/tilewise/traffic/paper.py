"""The FlashAttention paper's traffic and memory beside ours, Figure 2 and Table 21, from closed forms and counts.

Nothing here runs attention. Times are a roofline's (`roofline.py`), printed numbers are in `published.tsv`.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch

import tilewise as tw
from tilewise import costs, devices
from tilewise.backends.triton.configs import choose
from tilewise.costs import PLAIN, Blocks, Extras, Moved, Sizes
from tilewise.problem import make
from tilewise.traffic.kernels import predicted, shipped
from tilewise.traffic.operations import counted_standard
from tilewise.traffic.result import aligned, giga, published, result, row
from tilewise.traffic.shapes import Shape

GPT2_MEDIUM = Sizes.square(batch=64, heads=16, seqlen=1024, head_dim=64)       # of Figure 2, fp16
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)         # of Table 21
COLUMNS = (64, 128, 256, 384, 512)                                             # B_c of Figure 2, middle, and M / 4 d
KERNELS = Blocks(16, 256)               # of the CUDA kernels published with the paper, for head dims up to 64
SPARSE = Sizes.square(batch=64, heads=16, seqlen=4096, head_dim=64)            # Figure 2, right
BLOCK = 128                             # of its layouts


class Account(NamedTuple):
    """What an implementation moves, forward and backward, and what is assumed."""
    name: str
    method: str                         # "standard" or "flash"
    assumes: str
    moved: Moved
    counted: int | None                 # bytes counted operation by operation, where that is so


def standard_accounts(s: Sizes) -> list[Account]:
    padding, byte = s.batch * s.seqlen_k, 1
    kinds = (("plain", "two products and a softmax", PLAIN),
             ("masked", "a boolean mask filled in, forward and backward", Extras("fill", padding * byte)),
             ("masked, dropout", "that and dropout", Extras("fill", padding * byte, True)),
             ("added mask", "a mask added, whose backward is free", Extras("add", padding * s.itemsize)),
             ("added mask, dropout", "that and dropout", Extras("add", padding * s.itemsize, True)))
    return [Account(f"standard, {name}", "standard", words,
                    costs.standard_forward(s, extras) + costs.standard_backward(s, extras), counted_standard(s, extras).total)
            for name, words, extras in kinds]


def flash_accounts(s: Sizes, fast: int) -> list[Account]:
    """fast: elements of M."""
    of_paper = costs.paper_blocks(fast, s.head_dim)
    accounts = []
    for blocks, words in ((of_paper, f"B_c = M / 4d = {of_paper.k}"), (KERNELS, f"B_c = {KERNELS.k}, of its CUDA kernels")):
        for zeroed in (False, True):
            moved = costs.flash1_forward(s, blocks, zeroed=zeroed) + costs.flash1_backward(s, blocks, zeroed=zeroed)
            name, first = (", zeroed", "; O, l, m and dQ set first") if zeroed else ("", "")
            accounts.append(Account(f"FlashAttention, B_c {blocks.k}{name}", "flash", words + first, moved, None))
    return accounts


def our_account(s: Sizes, device: devices.Device) -> Account:
    problem, x = Shape(s.seqlen_q, batch=s.batch, heads=s.heads, head_dim=s.head_dim).described()
    config = choose("forward", problem, device.arch)
    kernels = shipped(problem, x, device.arch, backward=True)
    moved = sum((Moved(kernel.read, kernel.written) for kernel in kernels), Moved())
    words = f"forward in tiles of {config.BLOCK_M} x {config.BLOCK_N}, keys inside; no cache"
    return Account("Tilewise (triton)", "flash", words, moved, None)


def table(device: devices.Device) -> dict[str, Any]:
    """Figure 2, left: slow-memory traffic of attention in GPT-2 medium, forward and backward, and both published versions."""
    s = GPT2_MEDIUM
    accounts = [*standard_accounts(s), *flash_accounts(s, device.fast // s.itemsize), our_account(s, device)]
    once = 2 * (s.q + s.k + s.v) + s.out + s.q + s.k + s.v + 2 * s.out
    printed = published("figure2-left")
    shown = {m: ", ".join(f"{p.value} ({p.version})" for p in printed if p.unit == "GB" and p.method == m)
             for m in ("standard", "flash")}
    rows, lines = [], [["GB, forward and backward", "read", "written", "total", "counted", "assumes"]]
    for a in accounts:
        read, written = sum(a.moved.read.values()), sum(a.moved.written.values())
        counted = "-" if a.counted is None else giga(a.counted)
        lines.append([a.name, giga(read), giga(written), giga(a.moved.total), counted, a.assumes])
        near = {p.version: {"bytes": round(p.value * 1e9), "hardware": p.hardware} for p in printed
                if p.unit == "GB" and p.method == a.method}
        known = {"closed form": {"count": a.moved.total}} | ({} if a.counted is None else {"counted": {"count": a.counted}})
        setting = {"mode": "forward+backward", "batch": s.batch, "seqlen": s.seqlen_q, "heads": s.heads, "head_dim": s.head_dim,
                   "dtype": "float16", "assumes": a.assumes}
        rows.append(row("table", a.name, setting, known, published=near))
    text = aligned(lines)
    text += ["", f"printed: standard {shown['standard']} GB; FlashAttention {shown['flash']} GB (A100)",
             f"every tensor once, the least there is: {giga(once)} GB"]
    text += ["", *flops_lines(s, device, printed)]
    return result(rows, text)


def flops_lines(s: Sizes, device: devices.Device, printed: Any) -> list[str]:
    """FLOPs of the forward pass: what FlashAttention-2 saves is not products."""
    blocks = costs.paper_blocks(device.fast // s.itemsize, s.head_dim)
    works = (("standard", costs.standard_work(s)), ("FlashAttention", costs.flash1_work(s, blocks)),
             ("FlashAttention, its CUDA kernels", costs.flash1_work(s, KERNELS)),
             ("FlashAttention-2, same tiles", costs.flash2_work(s, KERNELS)))
    rows = [["GFLOP, forward", "products", "exponentials", "other", "times 16"]]
    rows += [[name, giga(w.products), giga(w.exponentials), giga(w.arithmetic), giga(16 * (w.exponentials + w.arithmetic))]
             for name, w in works]
    ratio = (2 + 5) / (2 + 4)           # products per pass: recomputation adds one to standard attention's six
    gflops = {p.method: p.value for p in printed if p.unit == "GFLOPs"}
    return [*aligned(rows), "", "times 16: as many products a tensor core does meanwhile (FlashAttention-2, section 3.1, A100)",
            f"products, forward and backward: {giga(costs.products(s.scores, s.head_dim) * 6)} standard, "
            f"{giga(costs.products(s.scores, s.head_dim) * 7)} with recomputation, ratio {ratio:.3f}; printed "
            f"{gflops['standard']} and {gflops['flash']}, ratio {gflops['flash'] / gflops['standard']:.3f}"]


def figure2(device: devices.Device) -> dict[str, Any]:
    """Figure 2: the table; traffic and time of FlashAttention against B_c with its knee; block-sparse cost against density."""
    left, middle, right = table(device), block_sizes(device), densities(device)
    return result([*left["rows"], *middle["rows"], *right["rows"]], [*left["lines"], "", *middle["lines"], "", *right["lines"]])


def block_sizes(device: devices.Device) -> dict[str, Any]:
    """FlashAttention's forward against B_c. Its units work one after another within a block: their times are added; slow memory
    is busy at the same time. Beyond the knee it is no longer what bounds."""
    s, limit = GPT2_MEDIUM, device.fast // GPT2_MEDIUM.itemsize // (4 * GPT2_MEDIUM.head_dim)
    rows, lines, knee = [], [["B_c", "GB", "slow memory ms", "arithmetic ms", "bound by", "fits"]], None
    for columns in COLUMNS:
        blocks = Blocks(min(columns, s.head_dim), columns)
        moved, work = costs.flash1_forward(s, blocks), costs.flash1_work(s, blocks)
        memory = moved.total / device.bandwidth
        compute = (work.products / device.rate("half") + work.exponentials / device.exponentials
                   + work.arithmetic / device.arithmetic)
        if knee is None and memory <= compute:
            knee = columns
        setting = {"mode": "forward", "block_k": columns, "device": device.name, "slow_memory_s": memory,
                   "arithmetic_s": compute, "fits": columns <= limit}
        rows.append(row("block size", f"B_c {columns}", setting,
                        {"closed form": {"count": moved.total, "seconds": max(memory, compute)}}))
        lines.append([str(columns), giga(moved.total), f"{memory * 1e3:.2f}", f"{compute * 1e3:.2f}",
                      "slow memory" if memory > compute else "arithmetic", "yes" if columns <= limit else "no"])
    where = f"at B_c {knee}" if knee else "beyond these"
    return result(rows, ["FlashAttention forward, GPT-2 medium, against the block size", *aligned(lines),
                         f"knee {where} on {device.name}: from there arithmetic bounds, and traffic no longer decides (the "
                         f"paper measured 256); M / 4d = {limit}"])


def densities(device: devices.Device) -> dict[str, Any]:
    """Block-sparse attention at N = 4096, forward and backward: cost in proportion to the tiles kept (Proposition 4)."""
    s = SPARSE
    n = s.seqlen_q // BLOCK
    rows, lines, dense = [], [["density", "GB", "GFLOP", "ms", "of dense"]], 0.0
    one = torch.zeros(s.head_dim, dtype=torch.float16).expand(1, s.seqlen_q, 1, s.head_dim)
    config = choose("forward", make(one, one, one, mask=blocks_mask(n, 1))[0], device.arch)     # the same tiles for all
    for per_row in (n, n // 2, n // 4, n // 8, n // 16, 1):
        problem, x = make(one, one, one, mask=blocks_mask(n, per_row))
        kernels = predicted(problem, x, Blocks(config.BLOCK_M, config.BLOCK_N), backward=True)
        heads = s.batch * s.heads
        nbytes, flops = heads * sum(k.bytes for k in kernels), heads * sum(k.products for k in kernels)
        other = heads * sum((k.exponentials or 0) / device.exponentials for k in kernels)
        seconds = max(nbytes / device.bandwidth, flops / device.rate("half"), other)
        dense = dense or seconds
        density = per_row / n
        rows.append(row("block-sparse", f"density {density:.4f}", {
            "mode": "forward+backward", "seqlen": s.seqlen_q, "batch": s.batch, "heads": s.heads, "head_dim": s.head_dim,
            "density": density, "flops": flops, "device": device.name}, {"closed form": {"count": nbytes, "seconds": seconds}}))
        lines.append([f"{density:.1%}", giga(nbytes), giga(flops), f"{seconds * 1e3:.2f}", f"{seconds / dense:.1%}"])
    return result(rows, [f"Block-sparse, N {s.seqlen_q}, blocks of {BLOCK}, forward and backward, roofline of {device.name}",
                         *aligned(lines)])


def blocks_mask(n: int, per_row: int) -> tw.Mask | None:
    """So many blocks in each row of n; None: all."""
    return tw.block_mask(tw.patterns.random_blocks(n, per_row), block_size=BLOCK) if per_row < n else None


def memory() -> dict[str, Any]:
    """Table 21: memory of attention, forward and backward, against N. Standard attention's peak is counted, operation by
    operation; Tilewise needs inputs, outputs, gradients, and lse and delta."""
    printed = {(p.method, p.x): p.value for p in published("table21")}
    rows, lines = [], [["N", "standard MB", "Tilewise MB", "ratio", "printed PyTorch", "printed FlashAttention", "ratio"]]
    for n in LENGTHS:
        s = Sizes.square(batch=16, heads=8, seqlen=n, head_dim=64)
        peak = counted_standard(s).peak
        ours = 2 * (s.q + s.k + s.v + s.out) + 2 * s.rows * costs.STATISTIC
        theirs = {name: printed[method, n] for name, method in (("PyTorch", "standard"), ("FlashAttention", "flash"))
                  if (method, n) in printed}
        lines.append([str(n), f"{peak / 1e6:,.0f}", f"{ours / 1e6:,.0f}", f"{peak / ours:.1f}",
                      *(f"{theirs[name]:,.0f}" if name in theirs else "-" for name in ("PyTorch", "FlashAttention")),
                      f"{theirs['PyTorch'] / theirs['FlashAttention']:.1f}" if len(theirs) == 2 else "-"])
        near = {name: {"bytes": round(value * 1e6), "hardware": "A100-40"} for name, value in theirs.items()}
        rows.append(row("memory", f"N {n}", {"mode": "forward+backward", "seqlen": n, "batch": 16, "heads": 8, "head_dim": 64,
                                             "dtype": "float16"}, {"tilewise": {"bytes": ours}, "standard": {"bytes": peak}},
                        published=near))
    return result(rows, ["Peak memory of attention, batch 16, 8 heads, d 64, fp16, forward and backward", *aligned(lines)])
