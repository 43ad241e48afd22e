"""Which backend computes a problem, and what that will cost: decided here, shown by `tilewise.explain`."""
from __future__ import annotations

from dataclasses import dataclass

from tilewise import backends
from tilewise.problem import Problem
from tilewise.trace.bounds import EMPTY, tile_classes


def choose(problem: Problem, backend: str) -> str:
    """The backend that serves: the first of `backends.AUTO` that supports the problem, or the one named, which must.

    Raises NotImplementedError with the reason when the named backend cannot compute the problem.
    """
    if backend != "auto":
        reason = backends.load(backend).supports(problem)
        if reason is not None:
            raise NotImplementedError(f'backend={backend!r} cannot compute this: {reason}; backend="auto" picks one that can')
        return backend
    return next(name for name in backends.AUTO if passed_over(name, problem) is None)


def passed_over(name: str, problem: Problem) -> str | None:
    """Why backend="auto" does not take this backend; None: it does."""
    module = backends.load(name)
    wants = getattr(module, "volunteers", module.supports)
    return wants(problem)
