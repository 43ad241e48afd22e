"""The study as `bench.suite` runs it: a trial for each setting. Errors do not depend on what else the machine does."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch

from tilewise.bench import record
from tilewise.bench.contest import BOTH, Outcome
from tilewise.bench.gate import Expected, Found, faults
from tilewise.bench.numerics import causes, table
from tilewise.bench.numerics.errors import rms, truth
from tilewise.bench.numerics.inputs import FULL, QUICK, Inputs, Setting, draw, settings
from tilewise.bench.numerics.methods import STANDARD, Attend, Method, methods, on_backend
from tilewise.bench.record import Entry, Row
from tilewise.bench.suite import Trial, Wanted
from tilewise.bench.timing import alive


def trials(wanted: Wanted) -> list[Trial]:
    of_parts = settings(wanted.device, QUICK if wanted.quick else FULL)
    found = [Trial(part, str(setting), asdict(setting), (BOTH,), partial(measure, setting, wanted.device))
             for part, of_part in of_parts.items() for setting in of_part]
    return found + [Trial(table.CAUSES, f"one rounding, {setting}", asdict(setting), (BOTH,),
                          partial(of_causes, setting, wanted.device))
                    for setting in of_parts["inputs"] if setting.dtype == "bfloat16"]


def lines(rows: Sequence[Row], wanted: Wanted) -> list[str]:
    return table.lines(rows)


def measure(setting: Setting, device: torch.device) -> dict[str, Outcome]:
    with products(setting.precision):
        return {BOTH: Outcome(contenders=judged(setting, methods(setting, device), device), times_faster={})}


def of_causes(setting: Setting, device: torch.device) -> dict[str, Outcome]:
    """What one rounding costs."""
    x = draw(setting, device)
    expected = Expected(truth(x, False), results(partial(on_backend, "reference", False), x), (x.q, x.k, x.v))
    entries = {cause: entry(causes.computed(cause, x), expected) for cause in causes.CAUSES}
    return {BOTH: Outcome(contenders=entries, times_faster={})}


def judged(setting: Setting, field: Sequence[Method], device: torch.device) -> dict[str, Entry]:
    """Everyone's errors. Who passes the tolerance rule is "right", who does not is "wrong" and keeps his errors."""
    x = draw(setting, device)
    right = truth(x, setting.causal)
    standard = results(next(method.attend for method in field if method.name == STANDARD and method.attend), x)
    expected = Expected(right, standard, (x.q, x.k, x.v))
    return {method.name: of_method(method, x, expected) for method in field}


def of_method(method: Method, x: Inputs, expected: Expected) -> Entry:
    if method.attend is None:
        return {"state": "absent", "reason": method.reason}
    try:
        found = results(method.attend, x)
    except Exception as error:  # whatever a library raises on what it does not take
        if not alive(x.q.device):
            raise
        return {"state": "refused", "reason": record.words(error)}
    return entry(found, expected)


def entry(found: Found, expected: Expected) -> Entry:
    """The verdict on what a contender found, and its errors."""
    verdicts = expected.verdicts(found)
    wrong, distances = faults(verdicts), {name: t.double() - expected.truth[name] for name, t in found.items()}
    return {"state": "wrong" if wrong else "right", "reason": wrong,
            "errors": {v.name: [distances[v.name].abs().max().item(), v.allowed] for v in verdicts},
            "rms": {name: [rms(distance), rms(expected.truth[name])] for name, distance in distances.items()}}


def results(attend: Attend, x: Inputs) -> Found:
    """out, lse where there is one, and gradients."""
    q, k, v = (t.detach().requires_grad_() for t in x[:3])
    out, lse = attend(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), x.dout)
    found = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    return found if lse is None else found | {"lse": lse.detach()}


@contextmanager
def products(precision: str) -> Iterator[None]:
    """How fp32 is multiplied meanwhile."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
