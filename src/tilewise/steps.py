"""Decoding steps like one before: new keys and values written and attended to, with nothing settled twice.

A step is known by two keys, kept where `calls.py` keeps its own. The first says how the cache's memory and the new tokens lie:
it leads to the backend's `prepared_append`, which reads what changes from step to step, lengths, padding, slots and pages. The
second adds q, the options, PyTorch's settings and how long the longest sequence is, in multiples of STEPS keys: it leads to
the kernel. What is not known, and any value that is not right, goes the general way (`api.py`), which checks everything and
says what is wrong; nothing has been written then.
"""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise import backends, calls, known
from tilewise.calls import Options
from tilewise.found import Found
from tilewise.known import layout
from tilewise.kv_cache import INTEGERS, KVCache
from tilewise.paged_cache import PagedKVCache
from tilewise.problem import DENSE, Operands, fp32_products
from tilewise.rotary import Rotary

PREPARING = "auto", "cpu"               # as a caller names the backend that has `prepared_append`
STEPS = 64                              # a cache's longest sequence is told in multiples of so many keys


class Step(NamedTuple):
    """A step as it was asked for, where it is one that may be remembered.

    which: the sequences, numbers of a paged cache, a tensor of another; None: all in order.
    """
    q: Tensor
    cache: KVCache | PagedKVCache
    k_new: Tensor | None
    v_new: Tensor | None
    which: Sequence[int] | Tensor | None
    rotary: Rotary | None
    extended: bool
    options: Options
    backend: str

    def places(self) -> tuple:
        """The first key: how memory lies that is read and written."""
        cache, k_new, v_new, which, rotary = self.cache, self.k_new, self.v_new, self.which, self.rotary
        if isinstance(cache, PagedKVCache):
            lists: tuple = cache.book is None, cache.block_table, cache.room
        else:
            lists = "slots", cache.slots, cache.left_padding
        kind, first, second = lists
        turning = None if rotary is None else (layout(rotary.cos), layout(rotary.sin), bool(rotary.interleaved), layout(self.q))
        return (kind, None if first is None else layout(first), None if second is None else layout(second), layout(cache.k),
                layout(cache.v), cache.v_in_k, layout(cache.lengths), None if k_new is None else layout(k_new),
                None if v_new is None else layout(v_new), turning,
                None if which is None else layout(which) if isinstance(which, Tensor) else len(which), cache.k.is_inference(),
                cache.v.is_inference(), cache.lengths.is_inference(), torch.is_inference_mode_enabled())

    def kernel(self, append: Any, longest: int, held: tuple) -> tuple:
        """The second key."""
        o = self.options
        return (append, longest, layout(self.q), None if o.sinks is None else layout(o.sinks), o.causal, type(o.causal),
                o.scale, type(o.scale), o.dropout_p, type(o.dropout_p), o.batch_invariant, type(o.batch_invariant),
                o.return_stats, o.num_splits, type(o.num_splits), self.backend, torch.is_grad_enabled(), fp32_products(),
                torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), *map(id, held))


def asked(q: Any, cache: Any, k_new: Any, v_new: Any, which: Any, rotary: Any, extended: bool, options: Options,
          backend: str) -> Step | None:
    """The step; None if it is none that is remembered: what autograd, autocast or a mode follows, what draws numbers, has a
    column or a statistic for each key, or is stored in fp8."""
    paged = type(cache) is PagedKVCache
    if not (paged or type(cache) is KVCache) or backend not in PREPARING or cache.k.device.type != "cpu":
        return None
    if cache.k_scale is not None or (extended and not paged):
        return None
    if options.bias is not None or options.rng is not None or options.return_stats or torch._C._is_any_autocast_enabled():
        return None
    if paged and type(which) is Tensor:
        if which.device.type != "cpu" or which.dtype not in INTEGERS or which.dim() != 1 or not which.is_contiguous():
            return None
        which = which.tolist()
    if which is None:
        if paged and cache.book is not None:
            return None
    elif type(which) not in ((list, tuple) if paged else (Tensor,)):
        return None
    if rotary is not None and (type(rotary) is not Rotary or k_new is None):
        return None
    cos, sin = (None, None) if rotary is None else (rotary.cos, rotary.sin)
    tensors = q, k_new, v_new, cache.k, cache.v, cache.lengths, options.sinks, cos, sin
    if q is None or not calls.plain(*tensors):
        return None
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return None
    return Step(q, cache, k_new, v_new, which, rotary, bool(extended), options, backend)


def again(step: Step, with_lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """out and lse; None: there was no step like this, or a value is not right, and nothing has been written."""
    q, cache, k_new, v_new, which, rotary, extended, options, _ = step
    append = known.remembered(step.places())
    if append is None:
        return None
    index, of_book = numbers(cache, which)
    looked = append.look(cache, index, of_book, extended, k_new, v_new, rotary)
    if looked is None:
        return None
    mask, mods, sinks = options.mask, options.score_mod, options.sinks
    held = () if mask is None and mods is None else calls.named(mask, mods, DENSE)
    found = captured = None
    if held is not None and looked.shortest >= q.shape[1]:
        found = known.remembered(step.kernel(append, bound(looked.longest, append.capacity), held))
        captured = None if found is None else found.unchanged(held) if found.held else ()
    if found is None or captured is None:
        append.leave(looked)
        return None
    pages, results = append.pages(looked), {"out": torch.empty_like(found.out)}
    if with_lse:
        results["lse"] = torch.empty_like(found.lse)
    turned = None if rotary is None else torch.empty_like(q)
    write(step, append, looked, pages, turned)
    x = Operands(q if turned is None else turned, cache.k, cache.v, None, None if sinks is None else sinks.contiguous(), None,
                 None, looked.rows, pages, None, None, None, captured, found.ints, found.floats)
    found.launch(x, order=looked.order, **results)
    return results["out"], results.get("lse")


def write(step: Step, append: Any, looked: Any, pages: Tensor | None, turned: Tensor | None) -> None:
    """Writes the tokens; a cache with a book makes room for them first, as `PagedKVCache.append` does."""
    cache, which = step.cache, step.which
    if not isinstance(cache, PagedKVCache) or cache.book is None or step.k_new is None or step.extended:
        append.write(cache, looked, pages, step.q, turned)
        return
    assert isinstance(which, (list, tuple))
    counts = [append.count] * len(which)
    cache.extend(which, counts)
    try:
        append.write(cache, looked, pages, step.q, turned)
    except BaseException:
        cache.take_back(which, counts)
        raise


def remember(step: Step, found: Found, turned: Tensor) -> None:
    """Remembers a step that has gone the general way. turned: q as it was attended with."""
    prepare = getattr(backends.load(found.backend), "prepared_append", None)
    held = calls.named(step.options.mask, step.options.score_mod, DENSE)
    if prepare is None or held is None or found.launch is None or found.problem.dropout or step.options.as_long_as_keys():
        return
    key, index, own = step.places(), step.which if isinstance(step.which, Tensor) else None, None
    if step.rotary is not None:
        own = torch.empty_like(step.q)
        if steps_of(own) != steps_of(turned):
            return
    append = known.remembered(key)
    if append is None:
        append = prepare(step.cache, index, step.k_new, step.v_new, step.q, own, step.rotary)
        if append is None:
            return
        known.remember(key, append)
    found.keep_also(step.kernel(append, found.problem.seqlen_k, held))


def numbers(cache: Any, which: Sequence[int] | Tensor | None) -> tuple[Any, Any]:
    """int64 [B] each, as arrays for C: the sequences, and how many keys the cache's book has for them; None: there are none."""
    if which is None or isinstance(which, Tensor):
        return which, None
    array = ctypes.c_long * len(which)
    try:
        return array(*which), None if cache.book is None else array(*[cache.book.lengths[number] for number in which])
    except (TypeError, KeyError):       # no numbers of sequences: one that no cache has, for `look` to refuse
        return array(*[-1] * len(which)), None


def steps_of(x: Tensor) -> list[int]:
    """Strides that are of consequence."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def bound(longest: int, capacity: int) -> int:
    """The longest sequence as a problem is told it, so that many steps have one."""
    return max(longest, min(-(-longest // STEPS) * STEPS, capacity))
