"""FlashAttention-2's benchmark (Dao 2023, section 4.1), which FlashAttention-3's forward and backward charts repeat.

16k tokens in all, hidden size 2048, N from 512 to 16k, head dims 64 and 128 (FlashAttention-3: 256 too), full and causal,
fp16; TFLOP/s by the formula 4 B N^2 D H forward, half of it if causal, 2.5 times that backward.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch

from tilewise.bench.paper import passes, published, tables
from tilewise.bench.paper.inputs import Setting
from tilewise.bench.paper.methods import of_flash_attention_2
from tilewise.bench.paper.race import Row

TITLE = "FlashAttention-2 and -3, attention speed"
LENGTHS = tuple(2**i for i in range(9, 15))
HEAD_DIMS = 64, 128, 256


@dataclass(frozen=True)
class Cut:
    """tokens: of all sequences together; hidden: head_dim x heads."""
    tokens: int
    hidden: int
    dtype: str = "float16"
    seconds: float = 2.0

    def words(self) -> str:
        pairs = ("tokens", self.tokens, PAPER.tokens), ("hidden size", self.hidden, PAPER.hidden), ("", self.dtype, PAPER.dtype)
        return ", ".join(f"{name} {mine} (paper: {theirs})".strip() for name, mine, theirs in pairs if mine != theirs)


PAPER = Cut(16384, 2048)
CPU, CPU_QUICK, CUDA_QUICK = Cut(2048, 256, "float32"), Cut(512, 256, "float32", 0.1), Cut(2048, 2048, seconds=0.5)


@dataclass(frozen=True)
class Measurement:
    setting: Setting

    def cases(self) -> list[str]:
        s = self.setting
        return [f"d {s.head_dim} {'causal' if s.causal else 'full'} N {s.seqlen} {mode}" for mode in passes.WORK]

    def __str__(self) -> str:
        return self.cases()[0].removesuffix(" forward")


def cut_for(device: torch.device, quick: bool) -> Cut:
    if device.type == "cuda":
        return CUDA_QUICK if quick else PAPER
    return CPU_QUICK if quick else CPU


def measurements(device: torch.device, quick: bool = False) -> list[Measurement]:
    """All points of all charts that a device does."""
    cut = cut_for(device, quick)
    return [Measurement(Setting(cut.tokens // n, n, cut.hidden // d, d, cut.dtype, causal, seconds=cut.seconds))
            for d, causal, n in product(HEAD_DIMS, (False, True), LENGTHS) if n <= cut.tokens]


def measure(measurement: Measurement, device: torch.device) -> list[Row]:
    """A row for each pass."""
    s = measurement.setting
    found = passes.measure(s, of_flash_attention_2(s, device), device)
    return [{"case": case, "setting": asdict(s) | {"mode": mode}, **found[mode],
             "published": published.flash_attention_2(mode, s.head_dim, s.causal, s.seqlen)}
            for case, mode in zip(measurement.cases(), passes.WORK, strict=True)]


def lines(rows: Sequence[Row], device: torch.device, quick: bool) -> list[str]:
    """A table for each chart."""
    found, words = [TITLE], cut_for(device, quick).words()
    charts = tables.grouped(rows, lambda row: tuple(row["setting"][name] for name in ("mode", "head_dim", "causal")))
    for (mode, head_dim, causal), of_chart in charts.items():
        title = f"{mode}, d {head_dim}, {'causal' if causal else 'full'}; TFLOP/s"
        found += tables.grid(title, [(str(row["setting"]["seqlen"]), row) for row in of_chart], "tflops", 1)
    return found + tables.remarks(rows) + ([f"cut: {words}"] if words else [])
