"""FlashAttention-2's benchmark (Dao 2023, section 4.1), which FlashAttention-3's forward and backward charts repeat.

16k tokens in all, hidden size 2048, N from 512 to 16k, head dims 64 and 128 (FlashAttention-3: 256 too), full and causal,
fp16; TFLOP/s by the formula 4 B N^2 D H forward, half of it if causal, 2.5 times that backward.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

from tilewise.bench import attention
from tilewise.bench.contest import PASSES, Outcome
from tilewise.bench.paper import published, tables
from tilewise.bench.paper.cut import Cut, Cuts
from tilewise.bench.peers import NO_GRADIENTS, Contender
from tilewise.bench.record import Row
from tilewise.bench.shapes import Shape
from tilewise.bench.suite import Trial, Wanted

TITLE = "FlashAttention-2 and -3, attention speed"
LENGTHS = tuple(2**i for i in range(9, 15))
HEAD_DIMS = 64, 128, 256


@dataclass(frozen=True)
class Sizes(Cut):
    """tokens: of all sequences together; hidden: head_dim x heads."""
    tokens: int = 16384
    hidden: int = 2048


CUTS = Cuts(Sizes(), Sizes(seconds=0.5, tokens=2048), Sizes("float32", tokens=2048, hidden=256),
            Sizes("float32", 0.1, tokens=512, hidden=256))


def trials(wanted: Wanted) -> list[Trial]:
    """All points of all charts that a device does."""
    cut = CUTS.of(wanted.device, wanted.quick)
    assert isinstance(cut, Sizes)
    shapes = [Shape(cut.tokens // n, n, cut.hidden // d, cut.hidden // d, d, causal, cut.dtype)
              for d, causal, n in product(HEAD_DIMS, (False, True), LENGTHS) if n <= cut.tokens]
    return [trial(shape, wanted, cut.seconds) for shape in shapes]


def trial(shape: Shape, wanted: Wanted, seconds: float) -> Trial:
    of = {mode: published.flash_attention_2(mode, shape.head_dim, shape.causal, shape.seqlen) for mode in PASSES}
    name, facts = f"D {shape.head_dim} {shape.mask} N {shape.seqlen}", asdict(shape) | {"mask": shape.mask}
    return published.Trial(TITLE, name, facts, PASSES, partial(measure, shape, wanted, seconds), published=of)


def measure(shape: Shape, wanted: Wanted, seconds: float) -> dict[str, Outcome]:
    """Everyone, but FlexAttention where it would compile half a minute for each shape and then has no gradients."""
    field = attention.contenders(shape, wanted)
    if wanted.device.type != "cuda":
        field = [Contender(c.name, None, NO_GRADIENTS) if c.no_gradients else c for c in field]
    return attention.measure(shape, field, wanted.device, seconds=seconds)


def chart(row: Row) -> tuple[int, int, bool]:
    setting = row["setting"]
    return PASSES.index(setting["mode"]), setting["head_dim"], setting["causal"]


def lines(rows: Sequence[Row], wanted: Wanted) -> list[str]:
    """A table for each chart."""
    found = [TITLE, *CUTS.lines(wanted.device, wanted.quick)]
    for (mode, head_dim, causal), of_chart in tables.grouped(rows, chart).items():
        found += tables.grid(f"{PASSES[mode]}, D {head_dim}, {'causal' if causal else 'full'}; TFLOP/s",
                             [(str(row["setting"]["seqlen"]), row) for row in of_chart], "tflops", 1)
    return found + tables.remarks(rows)
