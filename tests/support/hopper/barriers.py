"""mbarriers (arrivals, transaction bytes, phases) and named barriers (bar.sync, bar.arrive)."""
from __future__ import annotations

from support.hopper.clocks import Clock, Fault, Stamp
from support.hopper.machine import Actor, site

RESERVED = 2    # named barriers that Triton itself uses, besides one for each worker partition


class MBarrier:
    """`phase` counts from 0 and is the one that is not yet complete."""

    def __init__(self, count: int, name: str, stamp: Stamp):
        if count < 1:
            raise Fault("barrier", f"{name} is initialised with a count of {count} at {site()}")
        self.count, self.name, self.initialised = count, name, stamp
        self.phase, self.pending, self.bytes = 0, count, 0
        self.clock, self.completed = Clock(), Clock()
        self.seen: dict[Actor, tuple[int, Stamp]] = {}   # the last phase that each actor has seen complete, and when

    def __str__(self) -> str:
        return f"{self.name} (phase {self.phase}: {self.pending} of {self.count} arrivals and {self.bytes} bytes missing)"

    def _used_by(self, actor: Actor) -> None:
        if not actor.clock.knows(self.initialised):
            raise Fault("barrier", f"{actor.name} at {site()} uses {self.name}, but nothing orders it after its init")

    def arrive(self, actor: Actor, count: int, transaction: int = 0) -> None:
        self._used_by(actor)
        if count > self.pending:
            raise Fault("barrier", f"{actor.name} at {site()} arrives {count} times at {self}")
        self.pending -= count
        self.bytes += transaction
        if self.bytes >= 2 ** 20:
            raise Fault("barrier", f"{actor.name} at {site()} expects {self.bytes} bytes at {self.name}; it counts to 2 ** 20")
        self.clock.join(actor.clock)
        self._advance()

    def deliver(self, transaction: int, stamp: Stamp) -> None:
        self.bytes -= transaction
        self.clock.join(dict([stamp]))
        self._advance()

    def _advance(self) -> None:
        if self.pending or self.bytes > 0:
            return
        if self.bytes < 0:
            raise Fault("barrier", f"{-self.bytes} bytes more than expected arrive at {self.name} in phase {self.phase}")
        for actor, (phase, stamp) in self.seen.items():
            if phase == self.phase - 1 and not self.clock.knows(stamp):
                raise Fault("phase", f"phase {self.phase} of {self.name} can complete before {actor.name} has seen {phase}")
        self.phase, self.pending = self.phase + 1, self.count
        self.completed, self.clock = self.clock, Clock()

    def wait(self, actor: Actor, parity: int) -> None:
        """Waits for a phase of this parity: the one after the last that the actor has seen, or that one again."""
        if parity not in (0, 1):
            raise Fault("barrier", f"{actor.name} at {site()} waits for phase {parity} of {self.name}; it must be 0 or 1")
        self._used_by(actor)
        last = self.seen[actor][0] if actor in self.seen else None
        meant = -parity if last is None else last if last % 2 == parity else last + 1
        self._not_beyond(actor, meant)
        actor.pause(lambda: (self.phase - 1) % 2 == parity, lambda: f"parity {parity} of {self}")
        self._not_beyond(actor, meant)
        if self.phase:
            actor.clock.join(self.completed)
        self.seen[actor] = (self.phase - 1, actor.tick())

    def _not_beyond(self, actor: Actor, meant: int) -> None:
        if self.phase - 1 > meant:
            raise Fault("phase", f"{actor.name} at {site()} waits for phase {meant} of {self.name}, which has completed phase "
                                 f"{self.phase - 1}")


class NamedBarrier:
    """A generation is complete when the given number of threads has come."""

    def __init__(self, number: int):
        self.number = number
        self.threads: int | None = None
        self.arrived = self.generation = 0
        self.members: dict[Actor, Stamp] = {}       # of this generation, with their arrivals
        self.previous: dict[Actor, Stamp] = {}      # of the one before
        self.clocks = [Clock()]                     # of every generation

    def __str__(self) -> str:
        names = ", ".join(actor.name for actor in self.members) or "nobody"
        return f"named barrier {self.number} ({self.arrived} of {self.threads} threads are there: {names})"

    def arrive(self, actor: Actor, threads: int) -> None:
        reserved = RESERVED + len(actor.program.actors) - 1
        if not reserved <= self.number < 16 or threads % 32:
            raise Fault("barrier", f"{actor.name} at {site()}: named barrier {self.number} of {threads} threads; numbers from "
                                   f"{reserved} to 15 are free and threads come in warps of 32")
        if self.threads not in (None, threads):
            raise Fault("barrier", f"{actor.name} at {site()} says {threads} threads to {self}")
        if actor in self.members or (actor in self.previous and not all(map(actor.clock.knows, self.previous.values()))):
            raise Fault("barrier", f"{actor.name} at {site()} can arrive twice at {self}")
        self.threads, self.arrived = threads, self.arrived + actor.threads
        self.members[actor] = actor.tick()
        self.clocks[-1].join(actor.clock)
        if self.arrived > threads:
            raise Fault("barrier", f"{actor.name} at {site()} is too many at {self}")
        if self.arrived == threads:
            self.threads, self.arrived, self.generation = None, 0, self.generation + 1
            self.previous, self.members = self.members, {}
            self.clocks.append(Clock())

    def sync(self, actor: Actor, threads: int) -> None:
        generation = self.generation
        self.arrive(actor, threads)
        actor.pause(lambda: self.generation > generation, lambda: str(self))
        actor.clock.join(self.clocks[generation])
        actor.synchronise()
