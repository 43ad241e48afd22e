"""max_score, entropy and key_mass on every backend, against their dense definition in fp64 by the tolerance rule."""
import pytest
import torch
from support.backends import AVAILABLE, DEVICE, INTERPRETING

import tilewise as tw
from tilewise import backends
from tilewise.bench import tolerance
from tilewise.bench.cases import CASES, draw, rows_in_use

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned", "small_tiles")

NAMES = ("max_score", "entropy", "key_mass")
# one for each path through a kernel, since each compiles kernels of its own
PATHS = ("causal more queries", "window", "documents shuffled", "three intervals", "sinks rows without keys", "dropout",
         "grouped heads", "scale negative", "scores of 100", "head dim 40", "one query", "no keys", "no queries",
         "batch invariant", "function of heads", "everything", "packed everything", "packed batch invariant", "packed function")
HALVES = ("causal more keys", "grouped heads", "everything", "packed everything", "one query", "scores of 100")
TABLE = [(case, torch.float32) for case in CASES if case.name in PATHS]
TABLE += [(case, dtype) for case in CASES if case.name in HALVES for dtype in (torch.bfloat16, torch.float16)]

every_backend = pytest.mark.parametrize("backend", AVAILABLE)


def of_name(name):
    return next(case for case in CASES if case.name == name)


def computed(call, backend, names=NAMES, dtype=None):
    """(out, lse, statistics) of a call, on copies of its floating inputs in `dtype`."""
    copies = {name: x.to(dtype or x.dtype) for name, x in call.differentiable.items()}
    qkv, options = [copies[name] for name in "qkv"], call.arguments(copies) | dict(return_lse=True, return_stats=names)
    if call.case.packed is not None:
        return tw.attention_varlen(*qkv, **options, backend=backend)
    return tw.attention(*qkv, **options, layout=call.case.layout, backend=backend)


def results(call, backend, dtype=None):
    return tolerance.Results(computed(call, backend, dtype=dtype)[2]._asdict())


@every_backend
@pytest.mark.parametrize("case, dtype", TABLE, ids=lambda x: str(x).removeprefix("torch."))
def test_within_tolerance(case, dtype, backend):
    call = draw(case, dtype, DEVICE)
    if not call.supported(backend):
        with pytest.raises(NotImplementedError, match="cannot compute this"):
            computed(call, backend)
        return
    found = tolerance.judge(call, results(call, backend), results(call, "reference", torch.float64), results(call, "reference"))
    assert [verdict.name for verdict in found] == list(NAMES)
    assert all(verdict.ok for verdict in found), "\n".join(map(str, found))
