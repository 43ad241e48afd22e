"""Masks as the command line takes them: text, `causal() & window(3, 0) | ~chunked(4)`, or the name of one in a Python file.

The text is read as a syntax tree and walked over the few things a mask is made of. It is never evaluated as Python. A file or
a module that is named with a colon, `file.py:name`, is run: it is the user's own.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
import operator
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewise import masks, patterns
from tilewise.block_sparse import block_mask
from tilewise.masks import Mask
from tilewise.trace.capture import CaptureError


def _of_tensors(make: Callable[..., Mask]) -> Callable[..., Mask]:
    """A mask of tensors, from numbers or lists of numbers."""
    @functools.wraps(make)
    def made(**values: int | list[int] | None) -> Mask:
        return make(**{name: _table(value) for name, value in values.items()})
    return made


def _table(value: int | list[int] | None) -> Tensor:
    if value is None or value == []:
        raise TypeError(f"expected a whole number or a list of at least one, got {value}")
    return torch.tensor(value if isinstance(value, list) else [value])


MASKS: dict[str, Callable[..., Mask]] = {
    "full": masks.full, "causal": masks.causal, "window": masks.window, "chunked": masks.chunked,
    "prefix": _of_tensors(masks.prefix), "key_lengths": _of_tensors(masks.key_lengths),
    "documents": _of_tensors(masks.documents), "tree": _of_tensors(masks.tree),
}
PATTERNS: dict[str, Callable[..., Tensor]] = {
    name: getattr(patterns, name)
    for name in ("butterfly", "local", "strided", "global_blocks", "random_blocks", "bigbird", "axial")
}
OPERATORS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}
LONGEST = 2000
DEEPEST = 150
MOST_BLOCKS = 4096      # on a side of a layout, which has their square
PYTHON = re.compile(r"(?P<place>.+):(?P<name>[^\W\d]\w*)")


def read_mask(text: str) -> Mask:
    """The mask that `text` describes, or names as FILE.py:NAME or MODULE:NAME.

    A ValueError says what is wrong with it; a CaptureError, what in a function cannot be compiled.
    """
    found = PYTHON.fullmatch(text.strip())
    return _from_python(found["place"], found["name"]) if found else parse_mask(text)


# ---- text ---------------------------------------------------------------------------------------------------------------

def parse_mask(text: str) -> Mask:
    """The mask that `text` describes; a ValueError says what in it is not one."""
    if len(text) > LONGEST:
        raise ValueError(f"mask: expected at most {LONGEST} characters, got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if _depth(tree) > DEEPEST:
            raise RecursionError
        return _mask(tree)
    except SyntaxError as error:
        raise ValueError(f"mask: cannot read {text!r}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError("mask: nested too deeply") from None


def _depth(tree: ast.AST) -> int:
    levels, nodes = 0, [tree]
    while nodes:
        levels, nodes = levels + 1, [child for node in nodes for child in ast.iter_child_nodes(node)]
    return levels


def _mask(node: ast.expr) -> Mask:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_mask(node.left), _mask(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "blocks":
            return _blocks(node)
        if node.func.id in MASKS:
            make = MASKS[node.func.id]
            return _made(node, make, {name: _value(value) for name, value in _arguments(node, make).items()})
    raise ValueError(f"mask: expected {', '.join(MASKS)} or blocks joined with & | ~, got {ast.unparse(node)}")


def _blocks(node: ast.Call) -> Mask:
    """blocks(layout, size)."""
    def blocks(layout, size): ...

    arguments = _arguments(node, blocks)
    size = _value(arguments["size"])
    if size is None or (isinstance(size, list) and len(size) != 2):
        raise ValueError(f"mask: blocks: size: expected a whole number or [queries, keys], got {size}")
    mask = block_mask(_layout(arguments["layout"]), block_size=size if isinstance(size, int) else (size[0], size[1]))
    mask.name = ast.unparse(node)
    return mask


def _layout(node: ast.expr) -> Tensor:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _layout(node.left), _layout(node.right)
        if left.shape != right.shape:
            raise ValueError(f"mask: blocks: expected patterns of equally many blocks, got {len(left)} and {len(right)} in "
                             f"{ast.unparse(node)}")
        return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PATTERNS:
        make = PATTERNS[node.func.id]
        values = {name: _count(value) for name, value in _arguments(node, make).items()}
        blocks = math.prod(values[name] for name in ("n", "rows", "cols") if name in values)
        if blocks > MOST_BLOCKS:
            raise ValueError(f"mask: {ast.unparse(node)}: expected at most {MOST_BLOCKS} blocks on a side, got {blocks}")
        return _made(node, make, values)
    raise ValueError(f"mask: blocks: layout: expected {', '.join(PATTERNS)} joined with & |, got {ast.unparse(node)}")


def _arguments(node: ast.Call, make: Callable) -> dict[str, ast.expr]:
    """The arguments of a call by their names, not yet read."""
    signature = inspect.signature(make)
    try:
        return signature.bind(*node.args, **{str(keyword.arg): keyword.value for keyword in node.keywords}).arguments
    except TypeError:
        expected = [name if p.default is p.empty else f"{name}={p.default}" for name, p in signature.parameters.items()]
        raise ValueError(f"mask: expected {ast.unparse(node.func)}({', '.join(expected)}), got {ast.unparse(node)}") from None


def _made(node: ast.Call, make: Callable, values: dict) -> Any:
    try:
        return make(**values)
    except TypeError as error:
        raise ValueError(f"mask: {ast.unparse(node)}: {error}") from None


def _value(node: ast.expr) -> int | list[int] | None:
    """A whole number, None, or a list of whole numbers."""
    if isinstance(node, ast.List):
        return [_number(item) for item in node.elts]
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    return _number(node)


def _count(node: ast.expr) -> int:
    value = _value(node)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"mask: blocks: expected a whole number >= 0 in a pattern, got {ast.unparse(node)}")
    return value


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 2**31:
        return node.value
    raise ValueError(f"mask: expected a whole number below 2^31, None or a list of them, got {ast.unparse(node)}")


# ---- Python files and modules -------------------------------------------------------------------------------------------

def _from_python(place: str, name: str) -> Mask:
    """The mask, or the function that makes one, called `name` in a file or a module."""
    with _running(place):
        names = runpy.run_path(place) if place.endswith(".py") else vars(importlib.import_module(place))
    if name not in names:
        fitting = [other for other, value in names.items() if isinstance(value, Mask) or _takes_indices(value)]
        found = f"it has {', '.join(fitting[:10])}" if fitting else "it has neither a mask nor a mask function"
        raise ValueError(f"mask: {place}: expected {name} in it, {found}")
    value = names[name]
    if isinstance(value, Mask):
        return value
    if not callable(value) or isinstance(value, type):
        raise ValueError(f"mask: {place}: {name}: expected a function mask_mod(b, h, q_idx, kv_idx) or a tw.Mask, got "
                         f"{getattr(value, '__name__', type(value).__name__)}")
    with _running(place):
        return masks.mask_mod(value)


def _takes_indices(value: Any) -> bool:
    return inspect.isfunction(value) and len(inspect.signature(value).parameters) == 4


@contextmanager
def _running(place: str) -> Iterator[None]:
    """While a user's code runs: it finds the modules beside it, and its errors are one line."""
    path = Path(place)
    if place.endswith(".py"):
        if not path.is_file():
            raise ValueError(f"mask: no such file: {place}")
    elif not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"mask: expected FILE.py:NAME or MODULE:NAME, got {place} before the colon")
    folder = str(path.resolve().parent)         # of a module: the current one
    sys.path.insert(0, folder)
    try:
        yield
    except CaptureError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
        line = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"mask: {place}{line}: {type(error).__name__}: {error}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
