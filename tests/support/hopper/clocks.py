"""Happens-before: vector clocks, and the accesses to memory that they order."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Stamp = tuple[int, int]     # (agent, its time)


class Fault(Exception):
    """What is wrong with a kernel.

    kind       meaning
    race       two accesses to the same memory, at least one a write, which nothing orders
    proxy      data written by ordinary stores reaches TMA or wgmma without a fence in between
    phase      an mbarrier can be further than the phase that a waiter means
    barrier    arrivals or bytes beyond the count, thread counts that differ, left-over arrivals, use before init, ...
    deadlock   nothing can go on: who waits where for what
    unfinished a result or buffer used, or the kernel ended, before the wait for an asynchronous operation
    unwritten  read of shared memory that nothing has written
    bounds     address outside its tensor or buffer
    type       shapes or types that the device does not take
    unknown    something of the language that is not simulated
    crash      any other exception in the kernel
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class Clock(dict):
    """Agent -> time of its last event that is known here."""

    def join(self, other: dict[int, int]) -> None:
        for agent, time in other.items():
            if time > self.get(agent, 0):
                self[agent] = time

    def knows(self, stamp: Stamp) -> bool:
        return self.get(stamp[0], 0) >= stamp[1]


@dataclass
class Access:
    """One use of memory. `kind` is "read", "write" or "atomic"; asynchronous: by TMA or wgmma."""
    stamp: Stamp
    kind: str
    asynchronous: bool
    text: str
    region: Any = None
    fences: list[Stamp] = field(default_factory=list)       # of proxy fences after this write

    def conflicts(self, other: Access) -> bool:
        return {self.kind, other.kind} not in ({"read"}, {"atomic"})

    def check(self, clock: Clock, old: Access) -> None:
        """Raises if this access, whose agent knows `clock`, conflicts with an older one to the same memory."""
        if not self.conflicts(old):
            return
        if not clock.knows(old.stamp):
            raise Fault("race", f"{self.text}, while nothing orders it after {old.text}")
        if self.asynchronous and not old.asynchronous and old.kind != "read" and not any(map(clock.knows, old.fences)):
            raise Fault("proxy", f"{self.text}: no proxy fence since {old.text}")
