"""What masks and score functions cost: capturing them, finding their tiles, gradients of the tables that they read."""
from __future__ import annotations

from functools import partial
from typing import Any

from tilewise.bench import first_calls, table_gradients, tiles
from tilewise.bench.contest import BOTH
from tilewise.bench.suite import Trial, Wanted

LENGTHS = 4096, 16384, 131072, 1048576          # of what is classified
BLOCK = 128


def trials(wanted: Wanted) -> list[Trial]:
    quick, device = wanted.quick, wanted.device
    called = first_calls.Setting(repeats=1 if quick else 5)
    learned = table_gradients.Setting(seqlen=512, repeats=1, seconds=1.0) if quick else table_gradients.Setting()
    found = [Trial("functions", f"{what}, N {called.seqlen}", facts(called), first_calls.MODES,
                   partial(first_calls.measure, what, called, device, not quick)) for what in first_calls.FUNCTIONS]
    found += [Trial("tiles", f"N {n}", {"seqlen": n, "block": BLOCK}, (tiles.CLASSIFY,), partial(tiles.measure, n, BLOCK))
              for n in LENGTHS[:1 if quick else None]]
    return found + [Trial("tables", f"{name}, N {learned.seqlen}", facts(learned), (BOTH,),
                          partial(table_gradients.measure, name, learned, device), table_gradients.BARS)
                    for name in table_gradients.tables(1, 1)]


def facts(setting: first_calls.Setting | table_gradients.Setting) -> dict[str, Any]:
    return {"batch": 1, "heads": setting.heads, "head_dim": setting.head_dim, "dtype": "float32", "seqlen": setting.seqlen}
