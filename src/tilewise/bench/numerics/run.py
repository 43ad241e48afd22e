"""All settings, one after another, written as each is done."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tilewise.bench import record
from tilewise.bench.numerics import table
from tilewise.bench.numerics.errors import Found, distances, truth
from tilewise.bench.numerics.inputs import FULL, QUICK, Inputs, Setting, draw, settings
from tilewise.bench.numerics.methods import STANDARD, Attend, Method, methods
from tilewise.bench.timing import alive

Row = dict[str, Any]
Progress = Callable[[str, int, int, str], None]         # part, settings done, of how many, what is measured now


def benchmark(device: torch.device, *, quick: bool = False, out: Path | None = None,
              progress: Progress = lambda part, done, total, words: None) -> Row:
    """Errors do not depend on what else the machine does; one setting's failure does not cost the others.

    A contender that passes the tolerance rule is "right"; one that is "wrong" keeps its errors.
    """
    head: Row = {"benchmark": "numerics", "device": device.type, "quick": quick, "complete": False}
    result = record.stamp() | head | {"rows": [], "lines": []}
    every = [(part, s) for part, of_part in settings(device, QUICK if quick else FULL).items() for s in of_part]
    for i, (part, setting) in enumerate(every):
        progress(part, i, len(every), str(setting))
        result["rows"].append({"part": part, "case": str(setting), "setting": asdict(setting) | {"mode": "forward+backward"},
                               **attempt(setting, device)})
        result["complete"] = i + 1 == len(every)
        result["lines"] = table.lines(result["rows"])
        record.write(out, result)
    return result


def attempt(setting: Setting, device: torch.device) -> Row:
    """What `measure` finds, or its failure."""
    try:
        with products(setting.precision):
            return measure(setting, methods(setting, device), device)
    except Exception as error:  # such as memory
        if not alive(device):
            raise SystemExit(f"{setting}: {record.words(error)}; the device no longer answers") from None
        return {"contenders": {}, "times_faster": {}, "error": record.words(error)}


def measure(setting: Setting, field: list[Method], device: torch.device) -> Row:
    """Each contender's state and distances from the truth; the rule is that of standard attention in the same dtype."""
    x = draw(setting, device)
    right = truth(x, setting.causal)
    standard = results(next(method.attend for method in field if method.name == STANDARD and method.attend), x)
    return {"contenders": {method.name: judged(method, x, right, standard) for method in field}, "times_faster": {}}


def results(attend: Attend, x: Inputs) -> Found:
    q, k, v = (t.detach().requires_grad_() for t in x[:3])
    out, lse = attend(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), x.dout)
    found = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    return found if lse is None else found | {"lse": lse.detach()}


def judged(method: Method, x: Inputs, right: Found, standard: Found) -> Row:
    if method.attend is None:
        return {"state": "absent", "reason": method.reason}
    try:
        found = distances(results(method.attend, x), right, standard, x)
    except Exception as error:  # whatever a library raises on what it does not take
        if not alive(x.q.device):
            raise
        return {"state": "refused", "reason": record.words(error)}
    wrong = [f"{name}: error {of['max']:.1e}, allowed {of['allowed']:.1e}" for name, of in found.items()
             if not of["max"] <= of["allowed"]]
    return {"state": "wrong" if wrong else "right", "reason": "; ".join(wrong),
            "errors": {name: [of["max"], of["allowed"]] for name, of in found.items()},
            "rms": {name: of["rms"] for name, of in found.items()}, "rms_of_truth": {name: of["truth"] for name, of in found.items()}}


@contextmanager
def products(precision: str) -> Iterator[None]:
    """How fp32 is multiplied meanwhile."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
