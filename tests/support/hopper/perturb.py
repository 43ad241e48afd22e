"""Kernels with one planted synchronisation bug: every wait, arrival, expected byte count, fence, phase, count and slot of a
kernel in turn, changed in its syntax tree.

A mutant is not always wrong: a wait may be implied by others, a slot be 0 anyway.
"""
from __future__ import annotations

import ast
import copy
import linecache
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import JITFunction

from support.hopper import hopper_language as hopper
from support.hopper import language
from support.hopper.translate import Translator, parse, reachable, resolve, simulation

Scope = Mapping[str, Any]
Edit = Callable[[ast.Call, ast.FunctionDef, Scope], bool]       # changes a call in the tree of its function, if it can


@dataclass(frozen=True)
class Mutant:
    """`launch` takes it in place of the kernel."""
    function: str
    what: str
    file: str
    line: int
    kernel: JITFunction
    translator: Translator

    @property
    def source(self) -> str:
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        return f"{self.function}:{self.line} {self.what}: {self.source}"


def mutants(kernel: JITFunction, visited: Collection[tuple[str, int]] | None = None) -> Iterator[Mutant]:
    """The mutants of a kernel and of the jit functions that it names.

    visited: `Report.visited` of a run; lines that have not run are left out.
    """
    for jit in reachable(kernel):
        tree, file, scope = parse(jit), jit.fn.__code__.co_filename, jit.get_capture_scope()
        calls = [(number, node) for number, node in enumerate(ast.walk(tree)) if isinstance(node, ast.Call)]
        for number, node in sorted(calls, key=lambda call: (call[1].lineno, call[1].col_offset)):
            if visited is None or (file, node.lineno) in visited:
                for what, edit in _edits(node, scope):
                    changed = copy.deepcopy(tree)
                    call = list(ast.walk(changed))[number]
                    assert isinstance(call, ast.Call)
                    if edit(call, changed, scope):
                        yield Mutant(jit.fn.__name__, what, file, node.lineno, kernel, Translator({id(jit): changed}, NAMES))


def _edits(call: ast.Call, scope: Scope) -> Iterator[tuple[str, Edit]]:
    """What to change about a call."""
    if isinstance(call.func, ast.Attribute) and call.func.attr == "index" and len(call.args) == 1:
        if not isinstance(call.args[0], ast.Constant):
            yield "always slot 0", _argument(0, "index", lambda _: "0")
        return
    function = simulation(resolve(call.func, scope))
    if any(keyword.arg == "sem" and ast.unparse(keyword.value) != "'relaxed'" for keyword in call.keywords):
        yield "relaxed", _argument(None, "sem", lambda _: "'relaxed'")
    if function in EDITS:
        yield from EDITS[function].items()
        if any(keyword.arg == "pred" for keyword in call.keywords):
            yield "without pred", _argument(None, "pred", lambda _: "True")


def _argument(position: int | None, name: str, change: Callable[[str], str], default: str = "") -> Edit:
    """Changes the source of an argument, given by position or by name."""
    def edit(call: ast.Call, tree: ast.FunctionDef, scope: Scope) -> bool:
        def new(old: ast.expr | None) -> ast.expr:
            source = default if old is None else f"({ast.unparse(old)})"
            return ast.copy_location(ast.parse(change(source), mode="eval").body, call)

        if position is not None and position < len(call.args):
            call.args[position] = new(call.args[position])
            return True
        old = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
        call.keywords = [keyword for keyword in call.keywords if keyword.arg != name] + [ast.keyword(name, new(old))]
        return True
    return edit


def _renamed(name: str) -> Edit:
    def edit(call: ast.Call, tree: ast.FunctionDef, scope: Scope) -> bool:
        call.func = ast.copy_location(ast.Name(name, ast.Load()), call)
        return True
    return edit


def _early(call: ast.Call, tree: ast.FunctionDef, scope: Scope) -> bool:
    """Moves a statement before the last one above it that uses shared memory, or waits for such a use."""
    for node in ast.walk(tree):
        for statements in [found for name in ("body", "orelse") if isinstance(found := getattr(node, name, None), list)]:
            for i, statement in enumerate(statements):
                if isinstance(statement, ast.Expr) and statement.value is call:
                    uses = [j for j in range(i) if any(_uses(x, scope) for x in ast.walk(statements[j]))]
                    if uses:
                        statements.insert(uses[-1], statements.pop(i))
                    return bool(uses)
    return False


def _uses(node: ast.AST, scope: Scope) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "store") and resolve(node.func, scope) is None:
        return True
    return simulation(resolve(node.func, scope)) in (hopper.warpgroup_mma_wait, hopper.store_wait, hopper.init)


def _kept(num_outstanding: Any = 0, deps: Any = ()) -> Any:
    """A wait for wgmma that only hands on what it should wait for."""
    return deps[0] if len(deps) == 1 else tuple(deps)


NAMES = {"__removed__": language.nothing, "__kept__": _kept}
_REMOVED = _renamed("__removed__")
_MORE = _argument(0, "pendings", lambda n: f"{n} + 1", "0")
EDITS: dict[Any, dict[str, Edit]] = {
    hopper.wait: {"no wait": _REMOVED, "other phase": _argument(1, "phase", lambda phase: f"{phase} ^ 1")},
    hopper.arrive: {"no arrival": _REMOVED, "early arrival": _early,
                    "one arrival more": _argument(None, "count", lambda n: f"{n} + 1", "1")},
    hopper.expect: {"no expect": _REMOVED, "half the bytes": _argument(1, "bytes", lambda n: f"{n} // 2"),
                    "twice the bytes": _argument(1, "bytes", lambda n: f"{n} * 2")},
    hopper.init: {"count + 1": _argument(1, "count", lambda n: f"{n} + 1"),
                  "count - 1": _argument(1, "count", lambda n: f"{n} - 1")},
    hopper.fence_async_shared: {"no fence": _REMOVED, "early fence": _early},
    hopper.warpgroup_mma_wait: {"no wait": _renamed("__kept__"),
                                "one more in flight": _argument(0, "num_outstanding", lambda n: f"{n} + 1", "0")},
    hopper.store_wait: {"no wait": _REMOVED, "one more in flight": _MORE},
    language.store_complete: {"no wait": _REMOVED, "one more in flight": _MORE},
    language.thread_barrier: {"no barrier": _REMOVED},
    language.barrier_sync: {"no sync": _REMOVED, "a warp more": _argument(1, "threads", lambda n: f"{n} + 32")},
    language.named_barrier: {"no barrier": _REMOVED, "a warp more": _argument(2, "threads", lambda n: f"{n} + 32")},
    language.barrier_arrive: {"no arrival": _REMOVED, "a warp more": _argument(1, "threads", lambda n: f"{n} + 32")},
}
