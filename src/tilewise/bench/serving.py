"""Attention as servers and trainers of unequal sequences call it: packed batches, prompts in chunks, drafted tokens."""
from __future__ import annotations

from tilewise.bench import chunks, packed
from tilewise.bench.suite import Trial, Wanted


def trials(wanted: Wanted) -> list[Trial]:
    bars = packed.BARS if wanted.device.type == "cpu" else None
    found = [packed.trial(setting, wanted.device, bars=bars)
             for setting in packed.settings(wanted.device, wanted.quick)]
    return found + [trial for setting in chunks.settings(wanted.device, wanted.quick)
                    for trial in chunks.trials(setting, wanted.device)]
