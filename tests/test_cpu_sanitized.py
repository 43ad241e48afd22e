"""Kernels of the `cpu` backend, those of derivatives among them, under the sanitizers of addresses and of undefined behaviour.

    python tests/test_cpu_sanitized.py cases 0 6      every 6th contract case from the first, in a process that `run` prepares
"""
import os
import subprocess
import sys

import pytest
import torch
from test_tangent_kernels import NAMES as DERIVED
from test_tangent_kernels import assert_right

import tilewise as tw
from tilewise.backends import cpu
from tilewise.backends.cpu import compiler, launch
from tilewise.bench import tolerance
from tilewise.bench.cases import CASES, Case, bucketed, draw

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")]

# Without optimisation: that compiles in a fifth of the time, and no access is left out because nothing needs it.
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
SHARES = 6
HALVES = "head dim 40", "causal more keys", "values narrower", "everything", "packed everything"
LONG = Case("several jobs for each key head", seqlen_q=70, seqlen_k=600, heads=4, kv_heads=2, options=lambda m: dict(
    bias=m.normal(70, 600), table=m.normal(70, 5), score_mod=bucketed(m.integers(0, 4, 600), True)))


def run(*arguments, cache):
    """This file in a process in which kernels are sanitized."""
    said = subprocess.run([*compiler.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not os.path.isabs(said.stdout):
        pytest.skip(f"{compiler.compiler()} brings no libasan.so")
    settings = dict(LD_PRELOAD=said.stdout.strip(), ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1",
                    XDG_CACHE_HOME=str(cache))
    return subprocess.run([sys.executable, __file__, *map(str, arguments)], env=os.environ | settings, capture_output=True,
                          text=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of sanitized kernels."""
    if not cpu.compiler.compiler():
        pytest.skip("needs a C++ compiler")
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("share", range(SHARES))
def test_contract_cases(share, cache):
    done = run("cases", share, SHARES, cache=cache)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[:6000]


def test_caches(cache):
    done = run("caches", cache=cache)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[:6000]


def test_decoding(cache):
    done = run("decoding", cache=cache)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[:6000]


@pytest.mark.parametrize("planted, found", [
    ("keys beyond the last", "AddressSanitizer: heap-buffer-overflow"),
    ("addresses between numbers", "runtime error: load of misaligned address")])
def test_what_is_planted_is_found(planted, found, cache):
    done = run(planted, cache=cache)
    assert done.returncode != 0
    assert found in done.stderr


# ---- in the process ----------------------------------------------------------------------------------------------------

def check(case, dtype):
    print(case, dtype, flush=True)
    wrong = [verdict for verdict in tolerance.check(draw(case, dtype), "cpu") if not verdict.ok]
    assert not wrong, wrong
    if case is LONG or case.name in DERIVED:
        assert_right(case, dtype, "cpu")


def cases(share, shares):
    table = [(case, torch.float32) for case in (LONG, *CASES)]
    table += [(case, dtype) for case in CASES if case.name in HALVES for dtype in (torch.bfloat16, torch.float16)]
    for case, dtype in table[share::shares]:
        check(case, dtype)


def caches():
    """Sequences in the pages of a cache that has no page to spare, and in slots that end with the last key."""
    lengths = torch.tensor([32, 1, 130], dtype=torch.int32)
    for dtype, stored in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
                          (torch.float32, torch.float8_e4m3fn)):
        pages = tw.PagedKVCache(2 + 1 + 9, 16, 2, 40, max_sequences=3, dtype=stored)
        slots = tw.KVCache(3, 130, 2, 40, dtype=stored)
        which = [pages.new() for _ in lengths]
        k, v = torch.randn(2, int(lengths.sum()), 2, 40).to(dtype)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        pages.append(k, v, cu_seqlens=ends, sequences=which)
        slots.append(k, v, cu_seqlens=ends)
        for queries, splits in ((1, 1), (2, 3), (20, 3)):
            print(stored, queries, splits, flush=True)
            q = torch.randn(3, queries, 4, 40).to(dtype)
            expected = tw.attention_with_kv_cache(q, slots, backend="reference", causal=True)
            for cache, index in ((pages, which), (slots, None)):
                found = tw.attention_with_kv_cache(q, cache, cache_batch_idx=index, num_splits=splits, causal=True,
                                                   backend="cpu")
                torch.testing.assert_close(found, expected, rtol=0, atol=max(1e-5, 4 * torch.finfo(dtype).eps))


def decoding():
    """Steps until memory ends, all but the first of them remembered, in caches of every kind."""
    table = torch.arange(12, dtype=torch.int32).flip(0).view(3, 4)
    padding = torch.tensor([5, 0, 1], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        k, v = torch.randn(2, 12, 8, 2, 40).to(dtype).unbind(0)
        pages = tw.PagedKVCache(12, 8, 2, 40, max_sequences=3, max_pages_per_sequence=4, dtype=dtype)
        for cache, which in ((tw.KVCache(3, 32, 2, 40, dtype=dtype, left_padding=padding), None),
                             (tw.KVCache.wrap(*(x.view(3, 32, 2, 40) for x in (k, v)), padding * 0,
                                              slots=torch.tensor([2, 0, 1])), None),
                             (pages, [pages.new() for _ in range(3)]),
                             (tw.PagedKVCache.wrap(k.clone(), v.clone(), table, padding * 0), None)):
            print(dtype, cache, flush=True)
            name = "sequences" if isinstance(cache, tw.PagedKVCache) else "cache_batch_idx"
            cache.append(*torch.randn(2, 3, 20, 2, 40).to(dtype), **{name: which})
            rotary = tw.Rotary.of(30, 32)
            for _ in range(12 if getattr(cache, "left_padding", None) is None else 7):
                q, k_new, v_new = (torch.randn(3, 1, heads, 40).to(dtype) for heads in (4, 2, 2))
                out = tw.attention_with_kv_cache(q, cache, k_new, v_new, cache_batch_idx=which, rotary=rotary)
                q = rotary.rotate(q.transpose(1, 2), cache.lengths[:3, None, None] - 1).transpose(1, 2)
                again = tw.attention_with_kv_cache(q, cache, cache_batch_idx=which, backend="reference")
                torch.testing.assert_close(out, again, rtol=0, atol=max(1e-5, 4 * torch.finfo(dtype).eps))


def plant(field, more):
    """Kernels are told something wrong."""
    described = launch.described

    def lying(*arguments):
        told, alive = described(*arguments)
        setattr(told, field, getattr(told, field) + more)
        return told, alive

    launch.described = lying
    q, k, v = torch.randn(3, 1, 70, 2, 32)
    tw.attention(q.clone(), k.clone(), v.clone(), backend="cpu")


if __name__ == "__main__":
    del os.environ["LD_PRELOAD"]  # the compiler needs none of it
    compiler.FLAGS = (*(flag for flag in compiler.FLAGS if flag != "-O3"), *SANITIZERS)
    torch.set_num_threads(3)
    if sys.argv[1] == "cases":
        cases(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "caches":
        caches()
    elif sys.argv[1] == "decoding":
        decoding()
    else:
        plant(*{"keys beyond the last": ("nk", 100), "addresses between numbers": ("q", 1)}[sys.argv[1]])
