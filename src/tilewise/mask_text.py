"""Masks written as text, as the command line takes them: `causal() & window(3, 0) | ~chunked(4)`.

The text is read as a syntax tree and walked over the few things a mask is made of. It is never evaluated as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch

from tilewise import masks
from tilewise.masks import Mask


def _table(make: Callable[[torch.Tensor], Mask]) -> Callable[[Any], Mask]:
    """A mask of a tensor, from a number or a list of numbers."""
    return lambda values: make(torch.tensor(values if isinstance(values, list) else [values]))


CONSTRUCTORS: dict[str, Callable[..., Mask]] = {
    "full": masks.full, "causal": masks.causal, "window": masks.window, "chunked": masks.chunked,
    "prefix": _table(masks.prefix), "key_lengths": _table(masks.key_lengths), "documents": _table(masks.documents),
}
OPERATORS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}
LONGEST = 2000


def parse_mask(text: str) -> Mask:
    """The mask that `text` describes; a ValueError says what in it is not one."""
    if len(text) > LONGEST:
        raise ValueError(f"mask: expected at most {LONGEST} characters, got {len(text)}")
    try:
        return _mask(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"mask: cannot read {text!r}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError("mask: nested too deeply") from None


def _mask(node: ast.expr) -> Mask:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_mask(node.left), _mask(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CONSTRUCTORS:
        arguments = [_value(argument) for argument in node.args]
        named = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg}
        try:
            return CONSTRUCTORS[node.func.id](*arguments, **named)
        except TypeError as error:
            raise ValueError(f"mask: {ast.unparse(node)}: {error}") from None
    raise ValueError(f"mask: expected {', '.join(CONSTRUCTORS)} joined with & | ~, got {ast.unparse(node)}")


def _value(node: ast.expr) -> int | list[int] | None:
    """A whole number, None, or a list of whole numbers."""
    if isinstance(node, ast.List):
        return [_number(item) for item in node.elts]
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    return _number(node)


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 2**31:
        return node.value
    raise ValueError(f"mask: expected a whole number below 2^31, None or a list of them, got {ast.unparse(node)}")
