"""Jit functions as Python functions: the names of Triton and Gluon in their globals give way to simulated ones.

Two rules of the language are kept by rewriting: numbers that are assigned without a constexpr annotation, and numbers that are
returned, become scalars of the language.
"""
from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Callable, Mapping
from typing import Any

import triton.language as tl
from triton.runtime.jit import ConstexprFunction, JITFunction

from support.hopper.clocks import Fault
from support.hopper.machine import MARK, site
from support.hopper.tensor import Number, to_tensor

_SIMULATED: dict[int, tuple[Any, Callable[..., Any]]] = {}      # by id, with the object to keep it alive


def simulate(builtin: Any, function: Callable[..., Any]) -> None:
    """Lets `function` stand for an object of the device's language: a builtin, a jit function or a class."""
    _SIMULATED[id(builtin)] = builtin, function


def simulation(value: Any) -> Callable[..., Any] | None:
    """What stands for a value in simulated functions, if anything."""
    found = _SIMULATED.get(id(value))
    return found[1] if found else None


def parse(jit: JITFunction) -> ast.FunctionDef:
    """A jit function's syntax tree, with the line numbers of its file."""
    tree = jit.parse().body[0]
    above = next(i for i, line in enumerate(jit.raw_src) if line.lstrip().startswith("def "))
    return ast.increment_lineno(tree, jit.starting_line_number + above - 1)


def resolve(node: ast.AST, scope: Mapping[str, Any]) -> Any:
    """What a name, or a name within modules, means where `scope` holds the globals; None if it is not one."""
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, scope)
        return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
    return scope.get(node.id) if isinstance(node, ast.Name) else None


def named(jit: JITFunction) -> list[Any]:
    """The global values that a jit function names."""
    scope = jit.get_capture_scope()
    return [value for node in ast.walk(parse(jit)) if (value := resolve(node, scope)) is not None]


def reachable(jit: JITFunction) -> list[JITFunction]:
    """A jit function and those that it names, directly or not; Triton's own left out."""
    found = {id(jit): jit}
    waiting = [jit]
    while waiting:
        for value in named(waiting.pop()):
            if isinstance(value, JITFunction) and not value.__module__.startswith("triton.") and id(value) not in found:
                found[id(value)] = value
                waiting.append(value)
    return list(found.values())


def synchronises(jit: JITFunction) -> bool:
    """Whether programs of a kernel can wait for each other, or learn of each other: whether it has atomic operations."""
    return any(getattr(value, "__name__", "").startswith("atomic_") for function in reachable(jit) for value in named(function))


class Module:
    """A module whose contents are translated."""

    def __init__(self, module: types.ModuleType, translator: Translator):
        self._module, self._translator = module, translator

    def __getattr__(self, name: str) -> Any:
        return self._translator.translate(getattr(self._module, name))


class Function:
    """A jit function that can be called in the simulator."""

    def __init__(self, jit: JITFunction, translator: Translator):
        self.jit, self.translator, self.__name__ = jit, translator, jit.fn.__name__
        self._python: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._python is None:
            self._python = self.translator.compile(self.jit)
        return self._python(*args, **kwargs)


class Translator:
    """`changed`: trees to run instead of the written ones, by the id of the jit function; `names`: what they may use."""

    def __init__(self, changed: Mapping[int, ast.FunctionDef] | None = None, names: Mapping[str, Any] | None = None):
        self.changed, self.names = changed or {}, names or {}
        self._functions: dict[int, Function] = {}
        self._synchronises: dict[int, bool] = {}

    def translate(self, value: Any) -> Any:
        """A value in a kernel's globals or arguments, as the simulator knows it."""
        if isinstance(value, tl.constexpr):
            return self.translate(value.value)
        found = simulation(value)
        if found is not None:
            return found
        if isinstance(value, types.ModuleType):
            return Module(value, self)
        if isinstance(value, ConstexprFunction):
            return value.fn
        if isinstance(value, JITFunction):
            return self._functions.setdefault(id(value), Function(value, self))
        if getattr(value, "__triton_builtin__", False) is True:
            return lambda *_, **__: _unknown(value.__name__)
        if type(value) in (tuple, list):
            return type(value)(map(self.translate, value))
        return value

    def synchronises(self, jit: JITFunction) -> bool:
        if id(jit) not in self._synchronises:
            self._synchronises[id(jit)] = synchronises(jit)
        return self._synchronises[id(jit)]

    def compile(self, jit: JITFunction) -> Callable[..., Any]:
        tree = self.changed.get(id(jit)) or parse(jit)
        tree = ast.fix_missing_locations(_Rewrite().visit(tree))
        code = compile(ast.Module([tree], []), jit.fn.__code__.co_filename, "exec", dont_inherit=True)
        scope = {**vars(builtins), **jit.get_capture_scope()}
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        namespace = {name: self.translate(scope[name]) for name in names if name in scope}
        namespace |= {MARK: True, "__value__": as_value, **self.names}
        exec(code, namespace)
        function = namespace[jit.fn.__name__]
        function.__defaults__ = self.translate(jit.fn.__defaults__)
        function.__kwdefaults__ = {name: self.translate(value) for name, value in (jit.fn.__kwdefaults__ or {}).items()}
        return function


class _Rewrite(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list, node.returns = [], None
        for argument in [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]:
            argument.annotation = None
        node.args.defaults = [ast.Constant(None) for _ in node.args.defaults]
        node.args.kw_defaults = [ast.Constant(None) for _ in node.args.kw_defaults]
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        node.value = _as_value(node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.target, ast.Name):
            raise Fault("unknown", f"assignment to {ast.unparse(node.target)}")
        name = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        value = ast.copy_location(ast.BinOp(name, node.op, self.visit(node.value)), node)
        return ast.copy_location(ast.Assign([node.target], _as_value(value)), node)

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is not None:
            node.value = _as_value(node.value)
        return node


def _as_value(node: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Call(ast.copy_location(ast.Name("__value__", ast.Load()), node), [node], []), node)


def as_value(x: Any) -> Any:
    """What a variable of the language holds when `x` is assigned to it."""
    if type(x) is tuple:
        return tuple(map(as_value, x))
    return to_tensor(x) if isinstance(x, Number) else x


def _unknown(name: str) -> Any:
    raise Fault("unknown", f"{name} at {site()} is not simulated")


PLAIN = Translator()
