"""Every wait, arrival, fence and slot of the Hopper kernels is needed: where one is changed, the simulator finds it."""
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support.backends import INTERPRETING

pytest.importorskip("triton", reason="needs triton", exc_type=ImportError)
if INTERPRETING:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)

from support.hopper import Fault, mutants
from support.hopper import launch as simulate
from support.hopper.product import simulated
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import tilewise as tw
from tilewise import api
from tilewise.backends import Needs, tiled
from tilewise.backends.hopper import decoding, launch
from tilewise.bench import fp8
from tilewise.bench.cases import Case, draw, packed
from tilewise.bench.hopper import cached
from tilewise.bench.hopper.cached import CachedCase

SEEDS = 6
WRITTEN = "o_desc", "OUT", "dq_desc", "DQ", "dk_desc", "dv_desc", "DK", "DV_"       # the outputs, and LSE of the forward pass
SMALL = dict(batch=1, heads=1, kv_heads=1, head_dim=64)
class OfFp8(NamedTuple):
    """A case whose inputs are fp8."""
    case: Case


CASES = {                               # each further one for what those before it leave
    "forward": [                        # two programs share the items
        Case("several items", seqlen_q=128, seqlen_k=400, **SMALL | dict(heads=4), options=lambda m: dict(
            mask=tw.key_lengths(m.values([390])), causal=True)),
        Case("full", seqlen_q=128, seqlen_k=768, **SMALL),
        Case("one tile", seqlen_q=128, seqlen_k=60, **SMALL | dict(heads=5)),
        Case("output in the place of queries", seqlen_q=128, seqlen_k=64, **SMALL | dict(heads=5, head_dim=256)),
        Case("without keys", seqlen_q=640, seqlen_k=100, **SMALL, options=lambda m: dict(causal=True)),
        OfFp8(Case("fp8", seqlen_q=128, seqlen_k=400, **SMALL | dict(heads=4), options=lambda m: dict(
            mask=tw.key_lengths(m.values([390])), causal=True)))],
    "query_gradients": [
        packed("packed grouped", ((150, 330), (70, 40)), heads=2, kv_heads=1, head_dim=64, options=lambda m: dict(
            causal=True, deterministic=True, **m.longest)),
        Case("padded keys", seqlen_q=128, seqlen_k=500, **SMALL, options=lambda m: dict(
            mask=tw.key_lengths(m.values([480])), deterministic=True)),
        Case("full", seqlen_q=100, seqlen_k=448, **SMALL, options=lambda m: dict(deterministic=True))],
    "backward": [
        packed("packed grouped", ((150, 130), (70, 40)), heads=2, kv_heads=1, head_dim=64, options=lambda m: dict(
            causal=True, **m.longest)),
        Case("padded keys", seqlen_q=300, seqlen_k=300, **SMALL, options=lambda m: dict(mask=tw.key_lengths(m.values([100])))),
        Case("score function", seqlen_q=200, seqlen_k=100, **SMALL, options=lambda m: dict(
            score_mod=lambda s, b, h, q, k: s * torch.exp(-0.01 * (q - k).abs()))),
        Case("without dq", seqlen_q=200, seqlen_k=100, **SMALL, options=lambda m: dict(deterministic=True)),
        Case("apart", seqlen_q=200, seqlen_k=100, **SMALL | dict(head_dim=256))],
    "decode": [
        CachedCase("pages", (700,), 1, 2, 1, page_size=64),
        CachedCase("fp8", (440,), 2, 2, 1, head_dim=128, fp8=True, options=lambda m: dict(causal=True))],
}


class Launched(NamedTuple):
    """A recorded launch, as the simulator takes it."""
    kernel: object
    programs: int
    warps: int
    values: dict
    visited: frozenset

    def run(self, kernel, seed):
        """What a version of the kernel writes into fresh memory."""
        fresh, written = dict(self.values), {}
        if fresh.get("COUNTER") is not None:
            fresh["COUNTER"] = torch.zeros_like(fresh["COUNTER"])
        for name in (*WRITTEN, *(["LSE"] if "o_desc" in fresh or "PAGES" in fresh else [])):
            if name not in fresh:
                continue
            given = fresh[name]
            memory = given.base if isinstance(given, TensorDescriptor) else given
            new = written.setdefault(memory.data_ptr(), torch.zeros_like(memory))     # a tensor may come twice
            fresh[name] = replace(given, base=new) if isinstance(given, TensorDescriptor) else new
        simulate(kernel, (self.programs,), num_warps=self.warps, seed=seed, **fresh)
        return list(written.values())


def launched(case, name):
    """The launches of a kernel in a forward and a backward pass."""
    found = []

    def start(kernel, problem, programs, values, warps):
        point, flat, report = simulated(kernel, problem, programs, values, warps)
        if kernel.fn.__name__ == name:
            found.append(Launched(point, programs, warps, flat, report.visited))

    if isinstance(case, CachedCase):
        call = cached.draw(case, torch.bfloat16)
        decoding.forward(*api._of_cache(call.q, call.cache, None, **call.options), start=start)
        return found
    call = fp8.drawn(case.case) if isinstance(case, OfFp8) else draw(case, torch.bfloat16)
    problem, x = call.described()
    if name == "forward":
        launch.forward(problem, x, start=start)
    else:
        out, lse = (t.contiguous() for t in tiled.forward(problem, x))
        launch.backward(problem, x, out, lse, torch.ones_like(out), None, Needs(False, False), start=start)
    return found


def fate(one, mutant, right):
    """How a changed kernel is found, "" if it is not."""
    for seed in range(SEEDS):
        try:
            found = one.run(mutant, seed)
        except Fault as fault:
            return fault.kind
        if not all(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2) for a, b in zip(found, right, strict=True)):
            return "another result"
    return ""


HARMLESS = {
    "no barrier: thread_barrier()": "the simulator takes all threads of a partition as one",
}


@pytest.mark.parametrize("kernel", CASES)
def test_every_change_is_found(kernel):
    seen, found = set(), {}
    for case in CASES[kernel]:
        for one in launched(case, kernel):
            right = one.run(one.kernel, 0)
            for mutant in mutants(one.kernel, one.visited):
                if any(words in str(mutant) for words in HARMLESS):
                    continue
                seen.add(str(mutant))
                if str(mutant) not in found and (kind := fate(one, mutant, right)):
                    found[str(mutant)] = kind
    assert not seen - found.keys(), "\n".join(seen - found.keys())
    assert len(seen) > 50
