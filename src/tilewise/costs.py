"""What attention costs, in closed form: FLOPs, and bytes between slow and fast memory.

The model is that of FlashAttention's section 2.1: fast memory of M elements (on a GPU the registers and shared memory of a
multiprocessor) before slow memory (HBM), and what counts is how often which tensor crosses. N rows of d channels per head:

    standard attention          Θ(N d + N²)             Theorem 2, and 5 for the backward pass
    FlashAttention              Θ(N² d² / M)            the same theorems, for d <= M <= N d
    FlashAttention-2            Θ(N² d² / M)            queries outside: the same count with the roles of Q and K, V exchanged
    block-sparse, share s       Θ(N d + s N² d² / M)    Proposition 4
    any exact algorithm         not o(N² d² / M) for all M in [d, N d]      Proposition 3

The functions below give the constants too. They know sizes alone, no device and no tensor; `tilewise.explain` and
`tilewise traffic` both take their numbers from here, and `tests/test_traffic_*.py` hold them to counts, byte for byte.
Papers: Dao et al. 2022 (FlashAttention), Dao 2023 (FlashAttention-2), Dao et al. 2023 (Flash-Decoding).
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

STATISTIC = 4                           # bytes of a row's maximum, sum, lse or delta: fp32


@dataclass(frozen=True)
class Sizes:
    """One attention problem without a mask. seqlen_q, seqlen_k: of every sequence; itemsize: bytes of an element of q, k, v
    and out, `stored` of k and v where they have another, `stored_q` of q; all byte counts are over batch and heads."""
    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    itemsize: int = 2
    stored: int = 0
    stored_q: int = 0

    @classmethod
    def square(cls, batch: int, heads: int, seqlen: int, head_dim: int, itemsize: int = 2) -> Sizes:
        """Self-attention with one key head per query head."""
        return cls(batch, heads, heads, seqlen, seqlen, head_dim, head_dim, itemsize)

    @property
    def rows(self) -> int:
        return self.batch * self.heads * self.seqlen_q

    @property
    def key_rows(self) -> int:
        return self.batch * self.kv_heads * self.seqlen_k

    @property
    def scores(self) -> int:
        return self.rows * self.seqlen_k

    @property
    def of_keys(self) -> int:
        """Bytes of an element of k and v."""
        return self.stored or self.itemsize

    @property
    def q(self) -> int:
        return self.rows * self.head_dim * (self.stored_q or self.itemsize)

    @property
    def k(self) -> int:
        return self.key_rows * self.head_dim * self.of_keys

    @property
    def v(self) -> int:
        return self.key_rows * self.head_dim_v * self.of_keys

    @property
    def out(self) -> int:
        return self.rows * self.head_dim_v * self.itemsize


@dataclass(frozen=True)
class Moved:
    """Bytes read from slow memory and written to it, by tensor."""
    read: Mapping[str, int] = field(default_factory=dict)
    written: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())

    def __add__(self, other: Moved) -> Moved:
        return Moved(added(self.read, other.read), added(self.written, other.written))


def added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in (*a, *(n for n in b if n not in a))}


def least_forward(s: Sizes) -> int:
    """Bytes of every tensor once: q, k, v, out and lse. No kernel moves fewer."""
    return s.q + s.k + s.v + s.out + s.rows * STATISTIC


def least_backward(s: Sizes) -> int:
    """The same of q, k, v, out, its gradient and lse, and of three gradients."""
    return 2 * (s.q + s.k + s.v) + 2 * s.out + s.rows * STATISTIC


# ---- standard attention ------------------------------------------------------------------------------------------------

class Extras(NamedTuple):
    """What is done to scores between the two products, each by a kernel of its own that reads and writes all of them.

    mask      "fill": masked_fill, forward and backward; "add": a bias of 0 and -inf, whose gradient is that of its result
    mask_bytes   of the mask tensor, read once by each of these kernels
    dropout   on probabilities, its choice kept as one byte per score
    scale     a multiplication of its own; otherwise in the product
    """
    mask: str | None = None
    mask_bytes: int = 0
    dropout: bool = False
    scale: bool = False


PLAIN = Extras()


def standard_forward(s: Sizes, extras: Extras = PLAIN) -> Moved:
    """Algorithm 0: S = Q K^T to slow memory, P = softmax(S) from and to it, O = P V: Θ(N d + N²) (Theorem 2).

    Four passes over the N² scores: 4 A + 4 X, with A = bytes of S and X = bytes of Q.
    """
    a = s.scores * s.itemsize
    between = (2 if extras.mask else 0) + (2 if extras.scale else 0)
    read = {"q": s.q, "k": s.k, "v": s.v, "scores": 2 * a + between // 2 * a + (a if extras.dropout else 0)}
    written = {"scores": 2 * a + between // 2 * a + (a if extras.dropout else 0), "out": s.out}
    if extras.mask:
        read["mask"] = extras.mask_bytes
    if extras.dropout:
        written["kept"] = s.scores
    return Moved(read, written)


def standard_backward(s: Sizes, extras: Extras = PLAIN) -> Moved:
    """Algorithm 3, P stored: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q (Theorem 5).

    7 A + 8 X.
    """
    a = s.scores * s.itemsize
    passes = (1 if extras.mask == "fill" else 0) + (1 if extras.dropout else 0) + (1 if extras.scale else 0)
    read = {"scores": 5 * a + passes * a, "do": 2 * s.out, "v": s.v, "k": s.k, "q": s.q}
    written = {"scores": 2 * a + passes * a, "dv": s.v, "dq": s.q, "dk": s.k}
    if extras.mask == "fill":
        read["mask"] = extras.mask_bytes
    if extras.dropout:
        read["kept"] = s.scores
    return Moved(read, written)


# ---- FlashAttention (Dao et al. 2022) ----------------------------------------------------------------------------------

class Blocks(NamedTuple):
    """Rows of Q and of K, V in a tile: B_r and B_c."""
    q: int
    k: int


def paper_blocks(fast: int, head_dim: int) -> Blocks:
    """B_c = ceil(M / 4 d), B_r = min(ceil(M / 4 d), d), for M = `fast` elements (Algorithm 1, line 1)."""
    columns = -(-fast // (4 * head_dim))
    return Blocks(min(columns, head_dim), columns)


def cut(n: int, block: int) -> int:
    return -(-n // block)


def flash1_forward(s: Sizes, blocks: Blocks, share: float = 1.0, *, kept: int = 0, zeroed: bool = False) -> Moved:
    """Algorithm 2: keys outside, once; for each of the T_c blocks of them all of Q, O, l and m pass: Θ(N² d² / M).

    Theorem 2's count, 2 X + 3 T_c X, with l and m. share: of the tiles, where the rest is skipped (Algorithm 5). kept: bytes
    of an element of O meanwhile, where it is not q's. zeroed: with the pass that sets O, l and m first (line 3).
    """
    passes = cut(s.seqlen_k, blocks.k) * share
    whole, row = s.out // s.itemsize * (kept or s.itemsize), s.rows * STATISTIC
    passing = {"out": round(passes * whole), "l": round(passes * row), "m": round(passes * row)}
    moved = Moved({"q": round(passes * s.q), "k": s.k * s.heads // s.kv_heads, "v": s.v * s.heads // s.kv_heads, **passing},
                  passing)
    return moved + Moved(written={"out": whole, "l": row, "m": row}) if zeroed else moved


def flash1_backward(s: Sizes, blocks: Blocks, share: float = 1.0, *, kept: int = 0, zeroed: bool = False) -> Moved:
    """Algorithm 4: for each block of keys all of Q, O, dO, l and m pass, and dQ both ways: Θ(N² d² / M) (Theorem 5).

    4 X + 5 T_c X, with l and m. kept: bytes of an element of dQ meanwhile. zeroed: with the pass that sets dQ first (line 5).
    """
    passes = cut(s.seqlen_k, blocks.k) * share
    whole, out, row = s.q // s.itemsize * (kept or s.itemsize), round(passes * s.out), round(passes * s.rows * STATISTIC)
    k, v = s.k * s.heads // s.kv_heads, s.v * s.heads // s.kv_heads
    moved = Moved({"k": k, "v": v, "q": round(passes * s.q), "out": out, "do": out, "dq": round(passes * whole), "l": row,
                   "m": row}, {"dq": round(passes * whole), "dk": k, "dv": v})
    return moved + Moved(written={"dq": whole}) if zeroed else moved


# ---- FlashAttention-2 (Dao 2023), and Flash-Decoding -------------------------------------------------------------------

class Walk(NamedTuple):
    """What the programs of one kernel visit, in all sequences and heads.

    programs   blocks of rows, each with a program
    rows       of them together: loaded once
    visits     tiles visited
    others     rows of the other side, loaded tile by tile: those between the first and the last that a block may see
    whole      the same, cut by the end of the sequence alone
    parts      (row, share) pairs of Flash-Decoding in which a row sees a key
    masked     of the visits, those in lists whose elements are looked at one by one
    """
    programs: int
    rows: int
    visits: int
    others: int
    whole: int
    parts: int = 0
    masked: int = 0

    def __add__(self, other: object) -> Walk:
        assert isinstance(other, Walk)
        return Walk(*(a + b for a, b in zip(self, other, strict=True)))


def dense_walk(s: Sizes, blocks: Blocks, of_keys: bool = False) -> Walk:
    """All tiles: of queries in parallel with keys inside (forward, dQ), or `of_keys` the other way (dK, dV)."""
    programs_q, programs_k = (s.batch * s.heads * cut(s.seqlen_q, blocks.q), s.batch * s.kv_heads * cut(s.seqlen_k, blocks.k))
    if of_keys:
        visits = s.heads // s.kv_heads * programs_k * cut(s.seqlen_q, blocks.q)
        others = s.heads // s.kv_heads * programs_k * s.seqlen_q
        return Walk(programs_k, s.key_rows, visits, others, others)
    others = programs_q * s.seqlen_k
    return Walk(programs_q, s.rows, programs_q * cut(s.seqlen_k, blocks.k), others, others, s.rows)


def flash2_forward(s: Sizes, walk: Walk, splits: int = 1) -> Moved:
    """Algorithm 1 of FlashAttention-2: Q and O once, K and V for each block of queries: Θ(N² d² / M), M ~ B_r d.

    splits > 1: Flash-Decoding's first step, whose O is in fp32 and of which each share reads Q.
    """
    width = s.itemsize if splits == 1 else 4
    return Moved({"q": splits * walk.rows * s.head_dim * s.itemsize, "k": walk.others * s.head_dim * s.of_keys,
                  "v": walk.others * s.head_dim_v * s.of_keys},
                 {"out": splits * walk.rows * s.head_dim_v * width, "lse": splits * walk.rows * STATISTIC})


def merge(s: Sizes, splits: int, parts: int) -> Moved:
    """Flash-Decoding's second step: every share's lse, and O of the `parts` (row, share) pairs that saw a key."""
    return Moved({"parts": parts * s.head_dim_v * 4, "part_lse": splits * s.rows * STATISTIC},
                 {"out": s.out, "lse": s.rows * STATISTIC})


def delta(s: Sizes, rows: int, of_lse: bool = False) -> Moved:
    """Algorithm 2 of FlashAttention-2, line 4: rowsum(dO * O), with dlse where lse has a gradient."""
    of_out = rows * s.head_dim_v * s.itemsize
    read = {"out": of_out, "do": of_out} | ({"dlse": rows * STATISTIC} if of_lse else {})
    return Moved(read, {"delta": rows * STATISTIC})


def flash2_keys(s: Sizes, walk: Walk, part: str = "") -> Moved:
    """dK and dV, keys in parallel (Algorithm 2); part: " dk" or " dv" in a pass of its own."""
    row = walk.whole * STATISTIC
    own = {"dk": walk.rows * s.head_dim * s.itemsize, "dv": walk.rows * s.head_dim_v * s.itemsize}
    return Moved({"k": own["dk"], "v": own["dv"], "q": walk.others * s.head_dim * s.itemsize,
                  "do": walk.others * s.head_dim_v * s.itemsize, "lse": row, "delta": row},
                 {name: n for name, n in own.items() if part in ("", f" {name}")})


def flash2_queries(s: Sizes, walk: Walk) -> Moved:
    """dQ by a kernel of its own, queries in parallel: two more products than atomic adds, and the same bits each time."""
    row, own = walk.rows * STATISTIC, walk.rows * s.head_dim * s.itemsize
    return Moved({"q": own, "do": walk.rows * s.head_dim_v * s.itemsize, "lse": row, "delta": row,
                  "k": walk.others * s.head_dim * s.itemsize, "v": walk.others * s.head_dim_v * s.itemsize}, {"dq": own})


def flash2_backward(s: Sizes, blocks: Blocks) -> Moved:
    """The three kernels of a dense backward pass together."""
    return delta(s, s.rows) + flash2_keys(s, dense_walk(s, blocks, True)) + flash2_queries(s, dense_walk(s, blocks))


def lower_bound(s: Sizes, fast: int) -> float:
    """Elements, N² d² / M over all heads: what no exact algorithm can stay below by more than a constant for all M between d
    and N d (Proposition 3). M = `fast` elements."""
    return s.batch * s.heads * s.seqlen_q * s.seqlen_k * s.head_dim * s.head_dim_v / fast


# ---- FLOPs -------------------------------------------------------------------------------------------------------------

class Work(NamedTuple):
    """FLOPs of matrix products; exponentials; other arithmetic of single elements: + - * / max, a fused multiply-add is two."""
    products: int
    exponentials: int
    arithmetic: int

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def products(scores: int, dims: int) -> int:
    """FLOPs of products that take `scores` entries of the score matrix over `dims` channels in all."""
    return 2 * scores * dims


def backward_products(forward: int) -> int:
    """The field's count of a backward pass: five products where the forward has two. Ours has seven: S and dP twice."""
    return int(2.5 * forward)


def standard_work(s: Sizes) -> Work:
    """Forward: per score a scale, max, difference, exponential, sum, division."""
    return Work(products(s.scores, s.head_dim + s.head_dim_v), s.scores, 5 * s.scores)


def flash1_work(s: Sizes, blocks: Blocks) -> Work:
    """Forward, Algorithm 2. Per score a scale, max, difference, exponential and sum; for every block of keys O is rescaled,
    added to and divided: 4 per element; per row l and m are merged: 2 exponentials and 6 more."""
    passes = cut(s.seqlen_k, blocks.k)
    return Work(products(s.scores, s.head_dim + s.head_dim_v), s.scores + 2 * passes * s.rows,
                4 * s.scores + passes * s.rows * (4 * s.head_dim_v + 6))


def flash2_work(s: Sizes, blocks: Blocks) -> Work:
    """Forward, Algorithm 1 of FlashAttention-2. As before, but O is only rescaled per block of keys, and divided once."""
    passes = cut(s.seqlen_k, blocks.k)
    return Work(products(s.scores, s.head_dim + s.head_dim_v), s.scores + passes * s.rows + s.rows,
                4 * s.scores + passes * s.rows * (s.head_dim_v + 4) + s.rows * (s.head_dim_v + 2))
