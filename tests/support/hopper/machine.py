"""Partitions, asynchronous operations, and the seeded scheduler that decides which of them goes next.

A `Program` is one CTA. Its partitions are `Actor`s: threads, of which one runs at a time, until it pauses at its next use of
memory or barriers. An `Operation` is a TMA transfer or a wgmma: it starts after all that its issuer has done, is performed at
some later step, and only who waits for it knows that it has ended. Races are found by clocks, so in almost every schedule.
"""
from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FrameType
from typing import Any

import numpy as np

from support.hopper.clocks import Clock, Fault, Stamp

MARK = "__simulated__"      # in the globals of simulated functions
IDLE = 50                   # steps without effect, as of a spin loop, after which everyone gets a turn
SPIN = 200                  # such turns of everyone after which spinning is a deadlock


class _Stop(BaseException):
    """Ends an actor when another one has failed."""


def me() -> Actor:
    """The actor that is running."""
    actor = threading.current_thread()
    assert isinstance(actor, Actor)
    return actor


def places() -> Iterator[tuple[str, int, str]]:
    """(file, line, function) of the kernel's lines that are running, innermost first, up to the partition's function."""
    frame: FrameType | None = sys._getframe(1)
    last = getattr(threading.current_thread(), "function", "")
    while frame is not None:
        if MARK in frame.f_globals and f"{os.sep}triton{os.sep}" not in frame.f_code.co_filename:
            yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
            if frame.f_code.co_name == last:
                return
        frame = frame.f_back


def place() -> tuple[str, int, str]:
    return next(places(), ("", 0, ""))


def site() -> str:
    return " in ".join(f"{os.path.basename(file)}:{line} ({function})" for file, line, function in places())


class Operation:
    """Asynchronous work of an actor. `perform` runs at some step once the operation `after` is done."""

    def __init__(self, actor: Actor, what: str, perform: Callable[[Operation], None], after: Operation | None = None):
        machine = actor.machine
        self.text = f"{what} of {actor.name} at {site()}"
        self.perform, self.after, self.done = perform, after, False
        self.clock = Clock(actor.clock)
        self.stamp: Stamp = (machine.new_agent(), 1)
        self.result: Any = None
        self.weight = machine.operation_weight()
        actor.tick()
        machine.operations.append(self)

    def ready(self) -> bool:
        return self.after is None or self.after.done


class Program:
    """One CTA: its place in the grid, partitions, shared memory and barriers."""

    def __init__(self, machine: Machine, coordinates: tuple[int, int, int], grid: tuple[int, int, int]):
        self.machine, self.coordinates, self.grid = machine, coordinates, grid
        self.actors: list[Actor] = []
        self.allocations: list[Any] = []
        self.named_barriers: dict[int, Any] = {}
        self.loads: list[Operation] = []

    def finish(self, clock: Clock) -> None:
        """Checks what must hold when the last partition ends."""
        for load in self.loads:
            if not clock.knows(load.stamp):
                raise Fault("unfinished", f"{load.text} is never waited for")
        mbarriers = [barrier for allocation in self.allocations for barrier in allocation.barriers.values()]
        for barrier in [*(b for b in self.named_barriers.values() if b.arrived), *(b for b in mbarriers if b.bytes)]:
            raise Fault("barrier", f"left over at the end: {barrier}")


class Actor(threading.Thread):
    """A partition."""

    def __init__(self, program: Program, function: str, number: int, body: Callable[[], None], threads: int,
                 clock: dict[int, int]):
        super().__init__(daemon=True)
        self.program, self.machine, self.body, self.threads = program, program.machine, body, threads
        self.number = number
        self.become(function)
        self.agent, self.clock = self.machine.new_agent(), Clock(clock)
        self.synchronised = 0               # own time at the last barrier of all its threads
        self.retired: list[Stamp] = []      # operations waited for since then
        self.baton = threading.Semaphore(0)
        self.condition: Callable[[], bool] | None = None
        self.awaited: Callable[[], str] = lambda: "its start"
        self.where, self.finished = "", False
        self.products: list[Operation] = []     # not waited for, oldest first: wgmma,
        self.stores: list[Operation] = []       # reads of shared memory by TMA stores,
        self.writes: list[Operation] = []       # writes to global memory by TMA stores
        self.weight = self.machine.actor_weight()
        program.actors.append(self)
        self.machine.actors.append(self)
        self.start()

    def become(self, function: str) -> None:
        """Runs this function as its partition's."""
        of = f" of {self.program.coordinates}" if self.program.grid != (1, 1, 1) else ""
        self.function, self.name = function, f"{function}#{self.number}{of}"

    def run(self) -> None:
        self.baton.acquire()
        try:
            if self.machine.error is None:
                with np.errstate(all="ignore"):
                    self.body()
                    for operation in self.products + self.stores:
                        raise Fault("unfinished", f"{operation.text} is never waited for")
                    self._end()
        except _Stop:
            self.finished = True
        except BaseException as error:
            self.finished = True
            self.machine.fail(error)

    def _end(self) -> None:
        self.finished = True
        self.machine.actors.remove(self)
        self.machine.effect()
        if all(actor.finished for actor in self.program.actors):
            self.program.finish(self.clock)
            self.machine.programs.remove(self.program)
        following = self.machine.next_actor()
        (self.machine.done if following is None else following.baton).release()

    def pause(self, condition: Callable[[], bool] | None = None, awaited: Callable[[], str] = lambda: "its turn") -> None:
        """Lets others run; goes on at some step at which `condition` holds."""
        self.condition, self.awaited, self.where = condition, awaited, site()
        self.machine.visited.add(place()[:2])
        following = self.machine.next_actor()
        if following is not self:
            assert following is not None
            following.baton.release()
            self.baton.acquire()
            if self.machine.error is not None:
                raise _Stop
        self.condition = None

    def ready(self) -> bool:
        return self.condition is None or self.condition()

    def tick(self) -> Stamp:
        """A new event."""
        self.clock[self.agent] = self.clock.get(self.agent, 0) + 1
        return self.agent, self.clock[self.agent]

    def synchronise(self) -> None:
        """A barrier of all threads of the partition."""
        _, self.synchronised = self.tick()
        self.retired.clear()

    def published(self) -> Clock:
        """What a single thread can release to others: nothing that other threads did since their last barrier."""
        clock = Clock({**self.clock, self.agent: self.synchronised})
        for agent, _ in self.retired:
            del clock[agent]
        return clock

    def retire(self, queue: list[Operation], outstanding: int, what: str) -> None:
        """Waits until at most `outstanding` operations of `queue` are in flight."""
        retired = queue[:max(len(queue) - outstanding, 0)]
        self.pause(lambda: all(operation.done for operation in retired), lambda: f"{len(retired)} {what}")
        for operation in retired:
            self.clock.join(dict([operation.stamp]))
            queue.remove(operation)
            self.retired.append(operation.stamp)


class Machine:
    """The chip: runs the programs of a grid, at most `resident` at a time, under the schedule of a seed.

    ordered: tensors to which programs must add in a fixed order.
    Seeds in turn make operations happen as early as they can, as late as they can, and at random (twice).
    """

    def __init__(self, seed: int, ordered: Collection[str], gluon: bool):
        self.random, self.ordered, self.gluon, self.resident = random.Random(seed), ordered, gluon, 1
        self.mode = ("early", "late", "mixed", "mixed")[seed % 4]
        self.pending: list[Callable[[], None]] = []     # programs to start
        self.programs: list[Program] = []
        self.actors: list[Actor] = []
        self.operations: list[Operation] = []
        self.locations: dict[tuple[int, int], Clock] = {}    # what releases at an address of global memory have published
        self.shadows: dict[tuple[int, int], Any] = {}        # who has used global memory
        self.visited: set[tuple[str, int]] = set()
        self.shared = 0     # bytes of shared memory that a program takes
        self.error: BaseException | None = None
        self.done = threading.Semaphore(0)
        self.steps = self.idle = self._agents = 0

    def new_agent(self) -> int:
        self._agents += 1
        return self._agents

    def actor_weight(self) -> float:
        """How likely steps are: far apart, so that some actors are very late."""
        return 10 ** self.random.uniform(-3, 0)

    def operation_weight(self) -> float:
        early, late = 1e6, 1e-6
        if self.mode == "mixed":
            return self.random.choice((early, late, self.actor_weight()))
        return early if self.mode == "early" else late

    def effect(self) -> None:
        """Something has happened that others may wait for."""
        self.idle = 0

    def run(self) -> None:
        first = self.next_actor()
        if first is not None:
            first.baton.release()
            self.done.acquire()
        if self.error is not None:
            for actor in list(self.actors):
                actor.baton.release()
                actor.join()
            raise self.error

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.done.release()

    def next_actor(self) -> Actor | None:
        """Performs operations until it is an actor's turn; None when all is done."""
        while True:
            while self.pending and len(self.programs) < self.resident:
                self.pending.pop(0)()
            ready: list[Actor | Operation] = [x for x in self.actors if x.ready()]
            ready += [x for x in self.operations if x.ready()]
            if not ready:
                if self.actors:
                    raise Fault("deadlock", self._waiting(self.actors))
                return None
            self.steps += 1
            self.idle += 1
            choice = self._choose(ready)
            if isinstance(choice, Actor):
                return choice
            self.operations.remove(choice)
            choice.perform(choice)
            choice.done = True
            self.effect()

    def _choose(self, ready: list[Actor | Operation]) -> Actor | Operation:
        if self.idle > IDLE:
            if self.idle > IDLE + SPIN * len(ready):
                raise Fault("deadlock", "only spinning: " + self._waiting(self.actors))
            return ready[self.idle % len(ready)]
        choice = self.random.choices(ready, [x.weight for x in ready])[0]
        if isinstance(choice, Actor) and self.random.random() < 0.02:
            choice.weight = self.actor_weight()
        return choice

    @staticmethod
    def _waiting(actors: Iterable[Actor]) -> str:
        return "; ".join(f"{actor.name} at {actor.where} waits for {actor.awaited()}" for actor in actors)
