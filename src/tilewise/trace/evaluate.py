"""The value of a graph in torch, on any block of indices: what `tiled` and `reference` compute, and the oracle of the rest."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewise.trace.graph import ARITHMETIC, BITWISE, COMPARISONS, OF_FLOATS, Graph

Values = Mapping[str, Any]


def evaluate(graph: Graph, values: Values, memo: dict | None = None) -> Any:
    """The value of a parsed graph.

    values: leaf name -> number or tensor; index tensors broadcast against each other, as in b [B, 1, 1, 1] and
    k [1, 1, 1, N]; "float" -> the dtype to compute in. Returns a number or a tensor of the broadcast shape of the leaves used.
    """
    if isinstance(graph, str):
        return values[graph]
    memo = {} if memo is None else memo
    if graph not in memo:
        if graph.op == "load":
            loaded = values[str(graph.args[0])][tuple([evaluate(i, values, memo) for i in graph.args[1::2]])]
            memo[graph] = _widened(loaded, values["float"])
        elif graph.op == "where":
            condition, a, b = (evaluate(arg, values, memo) for arg in graph.args)
            memo[graph] = _where(condition, a, b, values["float"])
        elif graph.op == "to_float":
            memo[graph] = _cast(evaluate(graph.args[0], values, memo), values["float"])
        else:
            memo[graph] = OPERATIONS[graph.op](*[evaluate(a, values, memo) for a in graph.args])
    return memo[graph]


def _widened(loaded: Tensor, floating: torch.dtype) -> Tensor:
    """As kernels load: integers of 8 and 16 bits would wrap around, and index as masks do."""
    if loaded.is_floating_point():
        return loaded.to(floating)
    return loaded.int() if loaded.dtype in (torch.uint8, torch.int8, torch.int16) else loaded


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype)
    return float(x) if dtype.is_floating_point else bool(x) if dtype == torch.bool else int(x)


def _rounded(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype).to(x.dtype) if isinstance(x, Tensor) else torch.tensor(x).to(dtype).item()


def _choose(a: Any, b: Any, of_tensors: Callable, of_numbers: Callable) -> Any:
    tensor = a if isinstance(a, Tensor) else b
    if not isinstance(tensor, Tensor):
        return of_numbers(a, b)
    return of_tensors(*(x if isinstance(x, Tensor) else torch.full_like(tensor, x) for x in (a, b)))


def _where(condition: Any, a: Any, b: Any, floating: torch.dtype) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    if isinstance(a, float) and isinstance(b, float):  # torch would take its default dtype
        a = torch.tensor(a, dtype=floating, device=condition.device)
    return torch.where(condition, a, b)


def _of_numbers(op: Callable) -> Callable:
    """A torch function that also takes a Python number."""
    return lambda x: op(x) if isinstance(x, Tensor) else op(torch.tensor(x, dtype=torch.float64)).item()


OPERATIONS: dict[str, Callable] = {
    **ARITHMETIC, **COMPARISONS, **BITWISE,
    **{name: _of_numbers(getattr(torch, name)) for name in OF_FLOATS},
    "div": lambda a, b: a / b, "neg": lambda a: -a, "abs": abs, "pow": lambda a, b: a ** b,
    "not": lambda a: torch.bitwise_not(a) if isinstance(a, Tensor) else (not a) if isinstance(a, bool) else ~a,
    "min": lambda a, b: _choose(a, b, torch.minimum, min), "max": lambda a, b: _choose(a, b, torch.maximum, max),
    "where": lambda c, a, b: _where(c, a, b, torch.float64),
    "to_bool": lambda a: _cast(a, torch.bool), "to_int": lambda a: _cast(a, torch.int64),
    "to_fp16": lambda a: _rounded(a, torch.float16), "to_bf16": lambda a: _rounded(a, torch.bfloat16),
}


def slot_values(captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
                dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The values of a program's slots, by name, for `evaluate` in fp32, or fp64 for fp64 scores."""
    values: dict[str, Any] = {"float": torch.promote_types(dtype, torch.float32)}
    values |= {f"f{i}": x for i, x in enumerate(floats)}
    for i, x in enumerate(ints):
        values[f"i{i}"] = values[f"n{i}"] = x
    for i, t in enumerate(captured):
        for kind in "ilfb":
            values[f"t{kind}{i}"] = t
    return values


def leaf_values(slots: Values, batch: int, heads: int, nq: int | Tensor, nk: int | Tensor,
                device: torch.device | str = "cpu", first: int = 0) -> dict[str, Any]:
    """Slots, and the leaves b [B, 1, 1, 1], from `first`, h [1, H, 1, 1], nq, nk: all but q, k and s."""
    return {**slots, "b": torch.arange(first, first + batch, device=device)[:, None, None, None],
            "h": torch.arange(heads, device=device)[:, None, None], "nq": nq, "nk": nk}
