"""How much of a paper's protocol a machine does."""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Cut:
    """Sizes of a protocol, by the names of their fields in words."""
    dtype: str = "float16"
    seconds: float = 2.0                # for all methods of one setting together

    def words(self, paper: Cut) -> str:
        """What is other than in the paper; nothing, if nothing is."""
        pairs = [(f.name, getattr(self, f.name), getattr(paper, f.name)) for f in fields(self) if f.name != "seconds"]
        return ", ".join(f"{name} {mine} (paper: {theirs})" for name, mine, theirs in pairs if mine != theirs)


class Cuts(NamedTuple):
    """Those of the paper itself, done on a GPU; in quick runs on a GPU; on a CPU; in quick runs on a CPU."""
    paper: Cut
    quick: Cut
    cpu: Cut
    cpu_quick: Cut

    def of(self, device: torch.device, quick: bool) -> Cut:
        if device.type == "cuda":
            return self.quick if quick else self.paper
        return self.cpu_quick if quick else self.cpu

    def lines(self, device: torch.device, quick: bool) -> list[str]:
        words = self.of(device, quick).words(self.paper)
        return [f"  cut for this machine: {words}"] if words else []
