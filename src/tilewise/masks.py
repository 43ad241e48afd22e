"""Masks: which keys each query sees, as small values that combine with & | ~.

A `Mask` is a graph over the indices of one score (`trace/graph.py`), the same for every backend, and beside it what
makes it cheap: for each query the interval of keys it may see (`keys`), for each key the interval of queries that may
see it (`queries`). Tiles outside the intervals are skipped, tiles inside run without the mask; nothing of size N² is
ever built.

p = i + n - S_q is the position of query i among the n keys of its own sequence: masks are aligned bottom-right.

    causal()                 j <= p
    window(left, right)      p - left <= j <= p + right
    prefix(lengths)          j < lengths[b]
    key_lengths(lengths)     j < lengths[b]: padding at the end, which does not move p
    chunked(size)            j // size == p // size
    documents(ids)           same document id, ids >= 0
    tree(parents)            keys before the tree, oneself and one's ancestors
    full()                   every key
    mask_mod(function)       any function of the indices
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.mask_tables import ancestors, check_parents, dense_ids, document_intervals, youngest
from tilewise.trace.bounds import tile_classes
from tilewise.trace.capture import mask_graph
from tilewise.trace.evaluate import evaluate, leaf_values, slot_values
from tilewise.trace.graph import (
    Captured,
    Expr,
    Graph,
    equal,
    load,
    lower,
    maximum,
    minimum,
    parse,
    rewritten,
    var,
    where,
    wrap,
)

B, H, Q, K, NQ, NK = (var(name) for name in ("b", "h", "q", "k", "nq", "nk"))
ZERO, ONE = wrap(0), wrap(1)
SHIFT = NK - NQ
P = Q + SHIFT
LONGEST = 2**30  # no sequence is longer; sums of two stay inside 32 bits
LAST_KEY, LAST_QUERY = NK - ONE, NQ - ONE
ON_BOTH_SIDES = "a mask or a mask function on both sides"


class Band(NamedTuple):
    """An interval of keys for each query, or of queries for each key; lo > hi when empty.

    Outside [lo, hi] nothing is visible. Inside [inner_lo, inner_hi] everything is.
    """
    lo: Expr
    hi: Expr
    inner_lo: Expr
    inner_hi: Expr

    @property
    def exact(self) -> bool:
        return self.inner_lo is self.lo and self.inner_hi is self.hi


def exact(lo: Expr, hi: Expr) -> Band:
    return Band(lo, hi, lo, hi)


def undecided(last: Expr) -> Band:
    """Anything may be visible, nothing certainly is."""
    return Band(ZERO, last, last, ZERO - ONE)


class Mask:
    """A boolean for every (sequence, head, query, key); True: the query sees the key.

    element   the graph of one element
    keys      one or two bands over q: the keys visible to a query lie in their union
    queries   likewise over k: the queries that see a key

    A mask made from a function has no bands: which tiles it shows follows from its graph (`trace/bounds.py`).
    Combine masks, and functions with masks, by `&`, `|` and `~`.
    """

    __slots__ = ("__weakref__", "element", "keys", "name", "queries")

    def __init__(self, name: str, element: Expr, keys: tuple[Band, ...], queries: tuple[Band, ...]):
        self.name, self.element, self.keys, self.queries = name, element, keys, queries

    def __and__(self, other: Mask | Callable) -> Mask:
        other = as_mask(other, "&", ON_BOTH_SIDES)
        return Mask(f"{self.name} & {other.name}", self.element & other.element,
                    _intersect(self.keys, other.keys, LAST_KEY), _intersect(self.queries, other.queries, LAST_QUERY))

    def __or__(self, other: Mask | Callable) -> Mask:
        other = as_mask(other, "|", ON_BOTH_SIDES)
        return Mask(f"({self.name} | {other.name})", self.element | other.element,
                    _unite(self.keys, other.keys, LAST_KEY), _unite(self.queries, other.queries, LAST_QUERY))

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Mask:
        return Mask(f"~({self.name})", ~self.element, _complement(self.keys, LAST_KEY),
                    _complement(self.queries, LAST_QUERY))

    def __bool__(self):
        raise TypeError("a mask has no truth value: combine masks with & | ~ instead of and, or, not")

    def __repr__(self) -> str:
        return self.name

    def rewritten(self, leaf: Callable[[Expr], Expr]) -> Mask:
        """The mask with leaf(x) in the place of each leaf x of its graphs."""
        count = len(self.keys)
        element, *bounds = rewritten([self.element, *(x for band in self.keys + self.queries for x in band)], leaf)
        bands = tuple(Band(*bounds[i:i + 4]) for i in range(0, len(bounds), 4))
        return Mask(self.name, element, bands[:count], bands[count:])

    def to(self, device: torch.device | str) -> Mask:
        """The mask with its tensors on a device."""
        there: dict[int, Tensor] = {}       # of each tensor one copy

        def leaf(x: Expr) -> Expr:
            if x.op != "captured":
                return x
            tensor = x.value.tensor
            return Expr(x.op, x.kind, value=x.value._replace(tensor=there.setdefault(id(tensor), tensor.to(device))))

        return self.rewritten(leaf)

    def dense(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int, device="cpu") -> Tensor:
        """The mask as a boolean tensor [batch, heads, seqlen_q, seqlen_k]: the definition, of size N²."""
        (node,), values = _lowered([self.element], batch, heads, seqlen_q, seqlen_k, device)
        values |= dict(q=torch.arange(seqlen_q, device=device)[:, None], k=torch.arange(seqlen_k, device=device))
        value = torch.as_tensor(evaluate(node, values), device=device)
        return value.expand(batch, heads, seqlen_q, seqlen_k)

    def classify(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int, tile_q: int, tile_k: int,
                 device="cpu") -> Tensor:
        """EMPTY (0), PARTIAL (1) or FULL (2) for every tile: uint8 [batch, heads, tiles_q, tiles_k].

        A tile said EMPTY shows no score, one said FULL shows all of its scores; PARTIAL promises nothing. Takes O(N + tiles)
        and never looks at single scores (`trace/bounds.py`).
        """
        exprs = [self.element, *(x for band in self.keys for x in band)]
        (element, *bands), values = _lowered(exprs, batch, heads, seqlen_q, seqlen_k, device)
        classes = tile_classes(element, bands, values, batch, heads, (seqlen_q, seqlen_k), (tile_q, tile_k), device)
        return classes.expand(batch, heads, *classes.shape[2:])

    def draw(self, seqlen_q: int = 16, seqlen_k: int | None = None, *, batch: int = 1, head: int = 0) -> str:
        """The mask of one sequence and head as text, a row per query: `■` visible, `·` hidden."""
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        rows = self.dense(batch, head + 1, seqlen_q, seqlen_k)[batch - 1, head].tolist()
        return "\n".join(" ".join("■" if visible else "·" for visible in row) for row in rows)

    def save_png(self, path, seqlen_q: int = 64, seqlen_k: int | None = None, *, tile: int = 16, batch: int = 1,
                 head: int = 0) -> None:
        """Draws the mask and the classes of its tiles as a PNG file. Needs matplotlib."""
        from tilewise.draw import save_mask_png
        save_mask_png(self, path, seqlen_q, seqlen_q if seqlen_k is None else seqlen_k, tile, batch, head)


def _lowered(exprs: list[Expr], batch: int, heads: int, nq: int, nk: int, device) -> tuple[tuple[Graph, ...], dict]:
    """The graphs parsed, and the values of all their leaves but q and k."""
    program = lower([exprs])
    (nodes,) = parse(program.text)
    slots = slot_values(program.captured, program.ints, program.floats)
    return nodes, leaf_values(slots, batch, heads, nq, nk, device)


def as_mask(mask: Any, name: str, expected: str = "a mask or a mask function") -> Mask:
    """A mask, or a function as one. Raises TypeError, which names the argument, for anything else."""
    if isinstance(mask, Mask):
        return mask
    if callable(mask):
        return mask_mod(mask)
    raise TypeError(f"{name}: expected {expected}, got {type(mask).__name__}")


def _intersect(a: tuple[Band, ...], b: tuple[Band, ...], last: Expr) -> tuple[Band, ...]:
    bands = []
    for x in a:
        for y in b:
            lo, hi = maximum(x.lo, y.lo), minimum(x.hi, y.hi)
            if x.exact and y.exact:
                bands.append(exact(lo, hi))
            else:
                bands.append(Band(lo, hi, maximum(x.inner_lo, y.inner_lo), minimum(x.inner_hi, y.inner_hi)))
    return _at_most_two(tuple(bands), last)


def _unite(a: tuple[Band, ...], b: tuple[Band, ...], last: Expr) -> tuple[Band, ...]:
    return _at_most_two(a + b, last) if a and b else ()


def _at_most_two(bands: tuple[Band, ...], last: Expr) -> tuple[Band, ...]:
    """Kernels walk at most two intervals: further ones are joined to the last, which then decides nothing."""
    while len(bands) > 2:
        *others, x, y = bands
        joined = undecided(last)._replace(lo=minimum(x.lo, y.lo), hi=maximum(x.hi, y.hi))
        bands = (*others, joined)
    return bands


def _complement(bands: tuple[Band, ...], last: Expr) -> tuple[Band, ...]:
    if not bands:
        return ()
    if len(bands) == 1 and bands[0].exact:
        return exact(ZERO, bands[0].lo - ONE), exact(bands[0].hi + ONE, last)
    return (undecided(last),)


# ---- constructors ---------------------------------------------------------------------------------------------------

def once(build: Callable[..., Mask]) -> Callable[..., Mask]:
    """A constructor from numbers that makes each mask once: a call with the same mask is known by it (`tilewise/calls.py`)."""
    made = functools.lru_cache(maxsize=256)(build)

    @functools.wraps(build)
    def constructor(*numbers: int | None) -> Mask:
        return build(*numbers) if torch.compiler.is_compiling() else made(*numbers)

    return constructor


@once
def full() -> Mask:
    """Every query sees every key."""
    return Mask("full()", equal(ZERO, ZERO), (exact(ZERO, LAST_KEY),), (exact(ZERO, LAST_QUERY),))


@once
def causal() -> Mask:
    """j <= p: a query sees itself and what came before, aligned bottom-right when S_q != S_k."""
    return Mask("causal()", K <= P, (exact(ZERO, P),), (exact(K - SHIFT, LAST_QUERY),))


def window(left: int | None, right: int | None) -> Mask:
    """p - left <= j <= p + right: neighbours on each side; the query's own position is always included.

    left, right: number of neighbours, at least 0; None: unbounded.
    """
    for name, bound in (("left", left), ("right", right)):
        if bound is not None and (isinstance(bound, bool) or not hasattr(bound, "__index__") or bound < 0):
            raise ValueError(f"window: {name}: expected a number of neighbours >= 0 or None, got {bound!r}")
    return _window(*(None if bound is None else min(bound, LONGEST) for bound in (left, right)))


@once
def _window(left: int | None, right: int | None) -> Mask:
    if left is None and right is None:
        every = full()
        return Mask("window(None, None)", every.element, every.keys, every.queries)
    l, r = wrap(left), wrap(right)
    lo = ZERO if left is None else P - l
    hi = LAST_KEY if right is None else P + r
    first = ZERO if right is None else K - r - SHIFT
    last = LAST_QUERY if left is None else K + l - SHIFT
    element = hi >= K if left is None else lo <= K if right is None else (lo <= K) & (hi >= K)
    return Mask(f"window({left}, {right})", element, (exact(lo, hi),), (exact(first, last),))


def key_lengths(lengths: Tensor) -> Mask:
    """j < lengths[b]: sequence b has lengths[b] keys, the rest is padding. Does not move p.

    lengths: integer tensor [B], each in 0..S_k (checked where they are on the CPU). It is a mask: what k and v hold behind it
    must be finite.
    """
    return _first_keys("key_lengths", lengths)


def prefix(lengths: Tensor) -> Mask:
    """j < lengths[b]: every query sees the first lengths[b] keys. Prefix-LM is `causal() | prefix(lengths)`.

    lengths: integer tensor [B].
    """
    return _first_keys("prefix", lengths)


def _first_keys(name: str, lengths: Tensor) -> Mask:
    _check_index_tensor(f"{name}: lengths", lengths, (1,))
    n = load(Captured(lengths, f"{name}: lengths", limit="nk"), B)
    return Mask(f"{name}(...)", n > K, (exact(ZERO, n - ONE),), (exact(where(n > K, ZERO, NQ), LAST_QUERY),))


def chunked(size: int) -> Mask:
    """j // size == p // size: attention inside consecutive chunks of `size` positions."""
    if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
        raise ValueError(f"chunked: size: expected an integer >= 1, got {size!r}")
    return _chunked(min(size, LONGEST))


@once
def _chunked(size: int) -> Mask:
    c = wrap(size)
    first_key = P // c * c
    first_query = K // c * c - SHIFT
    return Mask(f"chunked({size})", equal(K // c, P // c), (exact(first_key, first_key + (c - ONE)),),
                (exact(first_query, first_query + (c - ONE)),))


def documents(ids_q: Tensor, ids_k: Tensor | None = None) -> Mask:
    """Tokens see each other inside the same document: equal ids, and ids >= 0 (negative: padding, sees nothing).

    ids_q: integer tensor [S_q] or [B, S_q]; ids_k: likewise for the keys, required when S_q != S_k.
    Costs O(S) memory. Ids need not be sorted; documents in one piece each make the cheapest tiles.
    """
    _check_index_tensor("documents: ids_q", ids_q, (1, 2))
    if ids_k is None:
        ids_k = ids_q
    _check_index_tensor("documents: ids_k", ids_k, (1, 2))
    if ids_k.dim() != ids_q.dim():
        raise ValueError(f"documents: ids_k: expected as many dimensions as ids_q ({ids_q.dim()}), got {ids_k.dim()}")
    ids_q, ids_k = dense_ids(ids_q, ids_k)  # copies: a mask is a value, and its tables hold for these ids

    def row(name: str, tensor: Tensor, index: Expr) -> Expr:
        captured = Captured(tensor, f"documents: {name}")
        return load(captured, index) if tensor.dim() == 1 else load(captured, B, index)

    id_q, id_k = row("ids_q", ids_q, Q), row("ids_k", ids_k, K)
    keys = Band(*(row("ids_q", t, Q) for t in document_intervals(ids_q, ids_k)))
    queries = Band(*(row("ids_k", t, K) for t in document_intervals(ids_k, ids_q)))
    return Mask("documents(...)", equal(id_q, id_k) & (id_q >= ZERO), (keys,), (queries,))


def tree(parents: Tensor) -> Mask:
    """Speculative decoding: the last T keys are the T queries, the nodes of a tree of drafts. Each sees every earlier key
    (j < S_k - T), itself and its ancestors.

    parents: integer tensor [T] or [B, T]: the node above each, which comes before it, or -1 for a root (checked where they are
    on the CPU, elsewhere any other value makes a root). T = S_q; of packed sequences, one with fewer queries has the first S_q
    nodes. Costs O(T²) memory, once.
    """
    _check_index_tensor("tree: parents", parents, (1, 2))
    check_parents(parents)
    above = ancestors(parents)

    before = K < SHIFT
    node = minimum(maximum(K - SHIFT, ZERO), wrap(parents.shape[-1] - 1))
    batch = (B,) * (parents.dim() - 1)
    visible = before | load(Captured(above, "tree: parents"), *batch, Q, node)
    last = where(before, LAST_QUERY, load(Captured(youngest(above), "tree: parents"), *batch, node))
    keys = Band(ZERO, P, ZERO, SHIFT - ONE)
    queries = Band(K - SHIFT, last, where(before, ZERO, NQ), LAST_QUERY)
    return Mask("tree(...)", visible, (keys,), (queries,))


def mask_mod(function: Callable) -> Mask:
    """A mask from mask_mod(b, h, q_idx, kv_idx) -> boolean, written with torch functions as for FlexAttention.

        @tw.mask_mod
        def dilated(b, h, q_idx, kv_idx):
            return (q_idx >= kv_idx) & ((q_idx - kv_idx) % 4 == 0)

    Arguments behave like zero-dimensional integer tensors; indices count from 0 inside the sequence. The function runs once;
    it may index tensors of its scope by any index expression, and is compiled into the kernels. Which tiles it shows follows
    by interval arithmetic: nothing of size N² is evaluated. `tw.attention(mask=function)` calls this.

    Raises CaptureError, naming the operation and the line, for what cannot be compiled: branches on indices,
    writing into tensors, random numbers, functions not known, a result that is not boolean.
    """
    return Mask(getattr(function, "__name__", "mask_mod"), mask_graph(function), (), ())


def from_tensor(visible: Tensor) -> Mask:
    """A boolean tensor of up to four dimensions, broadcastable to [B, H, S_q, S_k]; True: visible."""
    if visible.dtype != torch.bool or visible.dim() > 4:
        raise TypeError(f"mask: expected a boolean tensor broadcastable to [B, H, S_q, S_k], got {visible.dtype} "
                        f"{list(visible.shape)}")
    kept = [(axis, index) for axis, index in zip(range(-visible.dim(), 0), (B, H, Q, K)[4 - visible.dim():], strict=True)
            if visible.shape[axis] != 1]
    squeezed = visible[tuple(slice(None) if size != 1 else 0 for size in visible.shape)]
    element = load(Captured(squeezed, "mask"), *(index for _, index in kept))
    return Mask("tensor(...)", element, (undecided(LAST_KEY),), (undecided(LAST_QUERY),))


def _check_index_tensor(name: str, tensor, dims: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() not in dims:
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected an int32 or int64 tensor of {' or '.join(map(str, dims))} dimensions, got {got}")
