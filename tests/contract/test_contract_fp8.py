"""fp8 inputs with scales on every backend, against fp64 of the numbers that they stand for (`tilewise/bench/fp8.py`)."""
import pytest
import torch
from support.backends import AVAILABLE, DEVICE

from tilewise.bench import fp8
from tilewise.bench.cases import CASES

NAMED = ("full ragged", "causal bhsd", "grouped heads", "one key head", "values narrower", "bias with -inf", "scale negative",
         "sinks rows without keys", "dropout", "window grouped softcap dropout", "no keys", "function of sequences and heads",
         "packed causal", "packed everything", "packed used", "packed no sequences in use")
COMPILED = ("window grouped softcap dropout", "bias with -inf", "packed causal")        # a program takes `cpu` seconds
TABLE = [case for case in CASES if case.name in NAMED]


@pytest.mark.parametrize("case, backend", [(case, backend) for backend in AVAILABLE for case in TABLE if backend != "cpu" or
                                           case.name in COMPILED], ids=str)
def test_within_tolerance(case, backend, poisoned, small_tiles):
    call = fp8.drawn(case, DEVICE)
    wrong = [verdict for verdict in fp8.check(call, backend) if not verdict.ok]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_the_standard_is_near_the_truth(case):
    """`reference` is what the others are measured against: its own error is that of matrices in bf16."""
    call = fp8.drawn(case, DEVICE)
    for x, truth in zip(fp8.run(call, "reference"), fp8.run(fp8.exact(call), "reference"), strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=0.03, atol=0.06)
