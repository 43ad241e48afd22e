"""Forward pass over a packed batch, beside SDPA on the same batch padded to its longest, and one sequence after another."""
from __future__ import annotations

from functools import partial

import torch

from tilewise.bench.cpu.figures import FASTER, Ratio, ratios
from tilewise.bench.cpu.race import CPU, Entrant, race
from tilewise.bench.serving.contest import Found, Gate, Row
from tilewise.bench.serving.packed import Batch, Contender, Setting, contenders, gate_of
from tilewise.bench.timing import Call

TITLE = "packed sequences, lengths log-uniform"
RIVALS = {"sdpa padded": "SDPA, padded", "sdpa in a loop": "SDPA, in a loop"}


def settings(quick: bool = False) -> list[Setting]:
    if quick:
        return [Setting(4, False, 2, longest=256, dtype="float32", seconds=0.2, promised=2.0)]
    return [Setting(29, False, 8, dtype="float32", seconds=40.0, promised=2.0)]        # 16,547 tokens, 29 to 3,469 each


def measure(setting: Setting) -> Row:
    batch = Batch(setting, CPU)
    gate, bars = gate_of(batch), {"sdpa padded": setting.promised}
    field = {c.name: entrant(c, batch, gate) for c in contenders(batch) if c.name == "tilewise" or c.name in RIVALS}
    rows, timed = race(field, {}, setting.seconds)
    wanted = [Ratio(FASTER, words, name, "tilewise", bars.get(name)) for name, words in RIVALS.items()]
    return {"lengths": setting.lengths(), "contenders": rows, "figures": ratios(wanted, timed)}


def entrant(contender: Contender, batch: Batch, gate: Gate) -> Entrant:
    forward = torch.no_grad()(contender.forward)
    return Entrant(forward, partial(last_head, forward, batch), gate)


def last_head(forward: Call, batch: Batch) -> Found:
    out = forward(0)
    assert isinstance(out, torch.Tensor)
    return {"out": batch.flat(out)[None, :, -1:]}
