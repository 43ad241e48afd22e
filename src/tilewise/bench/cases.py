"""The table of attention cases: what the contract suite runs on every backend, and what benchmarks time."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from tilewise import backends
from tilewise.packing import cu_seqlens
from tilewise.problem import Layout, Operands, Problem, make, make_unequal
from tilewise.sequences import packed_rows

Options = dict[str, Any]
Lengths = tuple[tuple[int, int], ...]
GAP = 3                                 # rows behind the last packed sequence


@dataclass(frozen=True)
class Case:
    """One call of `tw.attention`, or of `tw.attention_varlen`.

    options: keyword arguments from a `Maker`, which draws tensors from a seeded generator on the right device. With "table",
        a tensor with gradient, "score_mod" is a function of it that returns the score function.
    packed: (queries, keys) of each sequence of a packed batch, whose longest are seqlen_q and seqlen_k (`packed`).
    used: of those, how many are in use.
    """
    name: str
    batch: int = 2
    seqlen_q: int = 70
    seqlen_k: int = 70
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    options: Callable[[Maker], Options] = field(default=lambda make: {})
    layout: str = "bshd"
    packed: Lengths | None = None
    used: Lengths | None = None

    def __str__(self) -> str:
        return self.name


def packed(name: str, lengths: Lengths, used: Lengths | None = None, **fields: Any) -> Case:
    """A case of packed sequences."""
    longest_q, longest_k = (max(n) for n in zip(*(used or lengths), strict=True))
    return Case(name, len(lengths), longest_q, longest_k, packed=lengths, used=used, **fields)


@dataclass(frozen=True)
class Maker:
    """Draws a case's tensors."""
    case: Case
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32, both ends included."""
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int32).to(self.device)

    def values(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.device)

    @property
    def longest(self) -> Options:
        """What a packed call on a GPU must know where a tensor is as long as the longest sequence."""
        return dict(max_seqlen_q=self.case.seqlen_q, max_seqlen_k=self.case.seqlen_k)


@dataclass(frozen=True)
class Call:
    """A case with its tensors: q, k, v in the case's layout or packed, and the other arguments."""
    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    options: Options

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that have gradients, by name."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        return named | {name: self.options[name] for name in ("bias", "sinks", "table") if name in self.options}

    @property
    def scores(self) -> int:
        """How many there are; of packed sequences, as a bias that nothing shares would have."""
        return self.case.batch * self.case.heads * self.case.seqlen_q * self.case.seqlen_k

    def supported(self, backend: str) -> bool:
        """Whether the backend says that it computes this."""
        return backends.load(backend).supports(self.described()[0]) is None

    def described(self) -> tuple[Problem, Operands]:
        """What is to be computed, as backends take it."""
        options = self.arguments({})
        if self.case.packed is None:
            return make(self.q, self.k, self.v, **options, layout=self.case.layout)
        (q_rows, longest_q), (k_rows, longest_k) = (
            packed_rows(name, options.pop(f"cu_seqlens_{name}"), options.pop(f"seqused_{name}", None), len(x),
                        options.pop(f"max_seqlen_{name}", None), x.device, False) for name, x in (("q", self.q), ("k", self.k)))
        where = Layout(q_rows, k_rows, max_seqlen_q=longest_q, max_seqlen_k=longest_k)
        return make_unequal(where, *(x.transpose(0, 1)[None] for x in (self.q, self.k, self.v)), **options)

    def arguments(self, tensors: dict[str, Tensor]) -> Options:
        """The options with the differentiable tensors replaced by `tensors`."""
        options = self.options | {name: tensors[name] for name in ("bias", "sinks", "table") if name in tensors}
        if "table" in options:
            options["score_mod"] = options["score_mod"](options.pop("table"))
        return options

    def run(self, tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
        """(out, lse) with the differentiable tensors replaced by `tensors`."""
        qkv, options = (tensors[name] for name in "qkv"), self.arguments(tensors)
        if self.case.packed is not None:
            return tw.attention_varlen(*qkv, **options, return_lse=True, backend=backend)
        return tw.attention(*qkv, **options, layout=self.case.layout, return_lse=True, backend=backend)


def draw(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Call:
    """Seeded inputs for a case. q, k and v are views into larger buffers of NaN: what is read beyond them, or of packed ones
    outside the rows in use, shows."""
    make = Maker(case, torch.device(device), torch.Generator().manual_seed(seed))
    dim_v = case.head_dim if case.head_dim_v is None else case.head_dim_v

    def inside_nan(seqlen: int, heads: int, dim: int) -> Tensor:
        axes = (seqlen, heads) if case.layout == "bshd" else (heads, seqlen)
        aligned = 8 if dim % 8 == 0 else 1
        buffer = torch.full((case.batch, axes[0] + 1, axes[1] + 1, dim + aligned), torch.nan, dtype=dtype, device=device)
        view = buffer[:, :axes[0], :axes[1], :dim]
        return view.copy_(make.normal(*view.shape))

    def packed_inside_nan(side: int, heads: int, dim: int) -> Tensor:
        inside = rows_in_use(case, side)
        aligned = 8 if dim % 8 == 0 else 1
        buffer = torch.full((len(inside) + 1, heads + 1, dim + aligned), torch.nan, dtype=dtype, device=device)
        view = buffer[:-1, :heads, :dim]
        view[inside.nonzero()[:, 0].to(device)] = make.normal(int(inside.sum()), heads, dim).to(dtype)
        return view

    if case.packed is None:
        q = inside_nan(case.seqlen_q, case.heads, case.head_dim)
        k = inside_nan(case.seqlen_k, case.kv_heads, case.head_dim)
        v = inside_nan(case.seqlen_k, case.kv_heads, dim_v)
    else:
        q = packed_inside_nan(0, case.heads, case.head_dim)
        k = packed_inside_nan(1, case.kv_heads, case.head_dim)
        v = packed_inside_nan(1, case.kv_heads, dim_v)
    options = case.options(make)
    for side, name in enumerate("qk"):
        if case.packed is not None:
            options[f"cu_seqlens_{name}"] = cu_seqlens(make.values([n[side] for n in case.packed]))
        if case.used is not None:
            options[f"seqused_{name}"] = make.values([n[side] for n in case.used])
    if "bias" in options:
        options["bias"] = options["bias"].to(dtype)
    if "table" in options and dtype == torch.float64:
        options["table"] = options["table"].double()
    return Call(case, q, k, v, options)


def rows_in_use(case: Case, side: int) -> Tensor:
    """Which rows of a packed case's queries (side 0) or keys (1) belong to a sequence and are in use; on the CPU."""
    assert case.packed is not None
    inside: list[bool] = []
    for room, used in zip(case.packed, case.used or case.packed, strict=True):
        inside += [i < used[side] for i in range(room[side])]
    return torch.tensor(inside + [False] * GAP)


DOCUMENTS = [[0] * 20 + [1] * 33 + [2] * 17, [3] * 5 + [-1] * 10 + [0] * 55]
SHUFFLED = [[(i * 7) % 5 - 1 for i in range(70)], [(i // 9) % 3 for i in range(70)]]

UNEVEN = ((41, 41), (0, 17), (5, 0), (0, 0), (33, 50), (40, 9))
USED = ((30, 29), (0, 10), (5, 0), (0, 0), (1, 44), (0, 3))
LATER = ((3, 10), (40, 70), (0, 5), (7, 20))


def in_documents(ids: Tensor) -> Callable:
    return lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (q >= k)


def bucketed(ids: Tensor, of_keys: bool) -> Callable:
    """A score function that reads its table by query and bucket of the key, or by the bucket of the query alone."""
    def of(table: Tensor) -> Callable:
        if of_keys:
            return lambda s, b, h, q, k: s + table[q, ids[k]] * torch.sigmoid(s)
        return lambda s, b, h, q, k: s * (1 + table[ids[q]])
    return of


def t5(table: Tensor) -> Callable:
    """Relative position buckets, logarithmic beyond 8 (T5, Raffel et al. 2020)."""
    def score_mod(s, b, h, q, k):
        distance = (q - k).abs()
        far = 8 + (torch.log(distance.clamp(min=8).float() / 8) / math.log(16) * 8).int()
        return s + table[torch.where(distance < 8, distance, far.clamp(max=15)), h]
    return score_mod


def parents(m: Maker, batch: int, nodes: int) -> Tensor:
    """Random trees: an earlier node, or -1, above each."""
    return (m.uniform(batch, nodes) * (torch.arange(nodes, device=m.device) + 1)).int() - 1


def with_neg_inf(bias: Tensor) -> Tensor:
    return torch.where(bias > 1.0, -torch.inf, bias)


CASES = (
    Case("full"),
    Case("full ragged", seqlen_q=33, seqlen_k=97),
    Case("causal", options=lambda m: dict(causal=True)),
    Case("causal more keys", seqlen_q=40, seqlen_k=90, options=lambda m: dict(causal=True)),
    Case("causal more queries", seqlen_q=90, seqlen_k=40, options=lambda m: dict(causal=True)),
    Case("causal bhsd", options=lambda m: dict(causal=True), layout="bhsd"),
    Case("window", options=lambda m: dict(mask=tw.window(9, 4))),
    Case("window left", seqlen_k=50, options=lambda m: dict(mask=tw.window(11, None))),
    Case("window right", seqlen_q=50, options=lambda m: dict(mask=tw.window(None, 3))),
    Case("window longer than keys", seqlen_q=90, seqlen_k=40, options=lambda m: dict(mask=tw.window(60, 60))),
    Case("causal window", options=lambda m: dict(causal=True, mask=tw.window(0, None))),
    Case("prefix lm", options=lambda m: dict(mask=tw.causal() | tw.prefix(m.values([50, 3])))),
    Case("prefix or window", options=lambda m: dict(mask=tw.prefix(m.values([8, 0])) | tw.window(5, 5))),
    Case("key lengths", options=lambda m: dict(mask=tw.key_lengths(m.values([70, 0])), causal=True)),
    Case("documents", options=lambda m: dict(mask=tw.documents(m.values(DOCUMENTS)), causal=True)),
    Case("documents shuffled", options=lambda m: dict(mask=tw.documents(m.values(SHUFFLED)))),
    Case("documents wide ids", seqlen_q=50, seqlen_k=50, options=lambda m: dict(
        mask=tw.documents(m.integers(-1, 2, 50).long() * (2**32 + 1)))),
    Case("documents cross", seqlen_q=30, options=lambda m: dict(
        mask=tw.documents(m.integers(0, 2, 30), m.integers(0, 2, 70)))),
    Case("chunked", seqlen_q=50, options=lambda m: dict(mask=tw.chunked(16), causal=True)),
    Case("not window", options=lambda m: dict(mask=~tw.window(20, 20))),
    Case("three intervals", options=lambda m: dict(mask=tw.chunked(8) | tw.prefix(m.values([5, 9])) | ~tw.window(None, 30))),
    Case("boolean tensor", options=lambda m: dict(mask=m.uniform(2, 1, 70, 70) < 0.5)),
    Case("boolean tensor of keys", options=lambda m: dict(mask=(m.uniform(70) < 0.5) & (m.uniform(2, 1, 1, 70) < 0.9))),
    Case("softcap", options=lambda m: dict(score_mod=tw.softcap(2.0))),
    Case("alibi", options=lambda m: dict(score_mod=tw.alibi(m.uniform(2)), causal=True)),
    Case("alibi per sequence", seqlen_q=40, options=lambda m: dict(score_mod=tw.alibi(m.normal(2, 2)))),
    Case("bias", seqlen_q=40, options=lambda m: dict(bias=m.normal(2, 2, 40, 70))),
    Case("bias over batch", seqlen_q=40, options=lambda m: dict(bias=m.normal(2, 40, 70), causal=True)),
    Case("bias over heads", seqlen_k=40, options=lambda m: dict(bias=m.normal(2, 1, 70, 40))),
    Case("bias of keys", options=lambda m: dict(bias=m.normal(2, 2, 1, 70))),
    Case("bias of queries", options=lambda m: dict(bias=m.normal(2, 70, 1), causal=True)),
    Case("bias transposed", options=lambda m: dict(bias=m.normal(2, 2, 70, 70).mT)),
    Case("bias with -inf", options=lambda m: dict(bias=with_neg_inf(m.normal(70, 70)))),
    Case("sinks", options=lambda m: dict(sinks=m.normal(2), causal=True)),
    Case("sinks strided", heads=4, kv_heads=4, options=lambda m: dict(sinks=m.normal(8)[::2])),
    Case("sinks rows without keys", seqlen_q=90, seqlen_k=40, options=lambda m: dict(sinks=m.normal(2), causal=True)),
    Case("dropout", options=lambda m: dict(dropout_p=0.2, rng=tw.Rng(2**63 + 17, 5, 3))),
    Case("grouped heads", heads=6, kv_heads=2, options=lambda m: dict(causal=True)),
    Case("one key head", heads=4, kv_heads=1, options=lambda m: dict(dropout_p=0.5, rng=tw.Rng(1))),
    Case("scale", options=lambda m: dict(scale=0.5)),
    Case("scale negative", options=lambda m: dict(scale=-0.3, causal=True)),
    Case("scale tiny", options=lambda m: dict(scale=1e-50, causal=True)),
    Case("scale zero", options=lambda m: dict(scale=0.0, causal=True)),
    Case("scores of 100", batch=1, options=lambda m: dict(scale=5.0, causal=True)),
    Case("scores of 400 capped", batch=1, options=lambda m: dict(scale=20.0, score_mod=tw.softcap(300.0), sinks=m.normal(2))),
    Case("values wider", head_dim=16, head_dim_v=48),
    Case("values narrower", head_dim=72, head_dim_v=5, options=lambda m: dict(causal=True)),
    Case("head dim 1", head_dim=1, options=lambda m: dict(causal=True)),
    Case("head dim 40", head_dim=40),
    Case("head dim 192", batch=1, seqlen_q=40, seqlen_k=40, head_dim=192, head_dim_v=128),
    Case("head dim 512", batch=1, seqlen_q=33, seqlen_k=35, heads=1, kv_heads=1, head_dim=512,
         options=lambda m: dict(causal=True)),
    Case("one query", seqlen_q=1, seqlen_k=70, options=lambda m: dict(causal=True)),
    Case("no keys", seqlen_k=0, options=lambda m: dict(sinks=m.normal(2))),
    Case("no keys no sink", seqlen_k=0),
    Case("no queries", seqlen_q=0, options=lambda m: dict(causal=True)),
    Case("empty batch shared bias", batch=0, options=lambda m: dict(bias=m.normal(1, 70, 70))),
    Case("chunked whole", seqlen_q=90, options=lambda m: dict(mask=tw.chunked(2**40))),
    Case("empty batch", batch=0, options=lambda m: dict(causal=True)),
    Case("batch invariant", options=lambda m: dict(causal=True, batch_invariant=True)),
    Case("function", options=lambda m: dict(mask=lambda b, h, q, k: (q >= k) & ((q - k) % 4 == 0))),
    Case("function of documents", seqlen_q=50, seqlen_k=50, options=lambda m: dict(
        mask=in_documents(m.integers(0, 4, 2, 50).sort(-1).values))),
    Case("function of heads", heads=4, kv_heads=2, options=lambda m: dict(
        mask=lambda b, h, q, k: (q - k).abs() <= 9 * (h + 1))),
    Case("function of sequences and heads", seqlen_q=40, options=lambda m: dict(
        mask=lambda b, h, q, k: (q - k).abs() <= 9 * (h + 1) + 8 * b)),
    Case("function and interval", options=lambda m: dict(causal=True, mask=lambda b, h, q, k: (k < 5) | (q - k < 20))),
    Case("function hides rows", options=lambda m: dict(mask=lambda b, h, q, k: (q > 40) & (k > 60))),
    Case("function batch invariant", options=lambda m: dict(
        mask=lambda b, h, q, k: (q - k).abs() <= 9 * (h + 1), batch_invariant=True)),
    Case("blocks", options=lambda m: dict(mask=tw.block_mask(m.uniform(5, 9) < 0.5, block_size=(16, 8)), causal=True)),
    Case("blocks butterfly", seqlen_q=128, seqlen_k=128, batch=1, options=lambda m: dict(
        mask=tw.block_mask(tw.patterns.butterfly(8).to(m.device), block_size=16), dropout_p=0.2, rng=tw.Rng(5))),
    Case("blocks per head", batch=1, heads=4, kv_heads=2, options=lambda m: dict(
        mask=tw.block_mask(m.uniform(4, 5, 5) < 0.5, block_size=16), bias=m.normal(4, 70, 70), sinks=m.normal(4))),
    Case("score function", options=lambda m: dict(
        score_mod=[lambda s, b, h, q, k: torch.where(q >= k, s, 0.5 * s * torch.tanh(s)) * torch.log(k + 2.0),
                   tw.softcap(5.0)])),
    Case("table of distances", options=lambda m: dict(
        table=m.normal(2, 139), score_mod=lambda t: lambda s, b, h, q, k: s + t[h, q - k + 69], causal=True)),
    Case("table of pairs", heads=4, kv_heads=2, options=lambda m: dict(
        table=m.normal(70, 70, 4), score_mod=lambda t: lambda s, b, h, q, k: s * (1 + t[k, q, h]))),
    Case("table of heads", options=lambda m: dict(
        table=m.normal(2), score_mod=lambda t: lambda s, b, h, q, k: torch.tanh(s * t[h]), causal=True)),
    Case("table of keys", seqlen_q=40, options=lambda m: dict(
        table=m.normal(2, 70), score_mod=lambda t: lambda s, b, h, q, k: s + t[b, k])),
    Case("table of query buckets", options=lambda m: dict(table=m.normal(5), score_mod=bucketed(m.integers(0, 4, 70), False))),
    Case("table of any index", options=lambda m: dict(
        table=m.normal(70, 5), score_mod=bucketed(m.integers(0, 4, 70), True), dropout_p=0.1, rng=tw.Rng(2))),
    Case("table of t5", heads=4, kv_heads=2, options=lambda m: dict(
        table=m.normal(16, 4), score_mod=t5, mask=lambda b, h, q, k: (q // 16 == k // 16) | (k < 9))),
    Case("window grouped softcap dropout", heads=4, kv_heads=2, options=lambda m: dict(
        causal=True, mask=tw.window(15, None), score_mod=tw.softcap(3.0), dropout_p=0.1, rng=tw.Rng(7))),
    Case("documents alibi sinks", heads=4, kv_heads=1, options=lambda m: dict(
        causal=True, mask=tw.documents(m.values(DOCUMENTS)), score_mod=tw.alibi(m.uniform(4)), sinks=m.normal(4))),
    Case("prefix lm bias dropout sinks", seqlen_q=50, options=lambda m: dict(
        mask=tw.causal() | tw.prefix(m.values([30, 60])), bias=m.normal(2, 50, 70), dropout_p=0.3, rng=tw.Rng(3),
        sinks=m.normal(2))),
    Case("everything", heads=4, kv_heads=2, head_dim=24, head_dim_v=40, options=lambda m: dict(
        causal=True, mask=(tw.window(30, None) | tw.prefix(m.values([9, 20]))) & tw.key_lengths(m.values([70, 61])),
        score_mod=[tw.alibi(m.uniform(4)), tw.softcap(4.0)], bias=m.normal(2, 1, 70, 70), sinks=m.normal(4), dropout_p=0.1,
        rng=tw.Rng(11), scale=0.3)),
    packed("packed", UNEVEN),
    packed("packed causal", UNEVEN, options=lambda m: dict(causal=True)),
    packed("packed long", ((97, 97), (0, 40), (70, 33)), options=lambda m: dict(causal=True)),
    packed("packed one sequence", ((70, 70),), heads=4, options=lambda m: dict(mask=tw.window(20, 10))),
    packed("packed window", UNEVEN, heads=4, options=lambda m: dict(mask=tw.window(9, 4))),
    packed("packed dropout", LATER, heads=4, options=lambda m: dict(causal=True, dropout_p=0.3, rng=tw.Rng(2**63 + 17, 5, 3))),
    packed("packed sinks", UNEVEN, options=lambda m: dict(causal=True, sinks=m.normal(2))),
    packed("packed bias", UNEVEN, options=lambda m: dict(bias=m.normal(6, 2, 41, 50), **m.longest)),
    packed("packed bias shared", LATER, options=lambda m: dict(bias=m.normal(2, 40, 70), **m.longest)),
    packed("packed bias of keys", UNEVEN, options=lambda m: dict(bias=m.normal(6, 1, 1, 50), causal=True, **m.longest)),
    packed("packed bias of queries", UNEVEN, options=lambda m: dict(bias=m.normal(2, 41, 1), sinks=m.normal(2), **m.longest)),
    packed("packed alibi per sequence", UNEVEN, options=lambda m: dict(score_mod=tw.alibi(m.normal(6, 2)))),
    packed("packed lengths", LATER, options=lambda m: dict(
        mask=tw.key_lengths(m.values([9, 70, 0, 20])) & (tw.causal() | tw.prefix(m.values([4, 60, 0, 0]))), **m.longest)),
    packed("packed documents", UNEVEN, options=lambda m: dict(
        mask=tw.documents(m.integers(-1, 2, 6, 41).sort(-1).values, m.integers(-1, 2, 6, 50)), **m.longest)),
    packed("packed boolean tensor", UNEVEN, options=lambda m: dict(mask=m.uniform(6, 1, 41, 50) < 0.5, **m.longest)),
    packed("packed function", UNEVEN, options=lambda m: dict(mask=lambda b, h, q, k: (q >= k) & ((q - k) % 4 <= b))),
    packed("packed function of heads", LATER, heads=4, options=lambda m: dict(
        mask=lambda b, h, q, k: (q - k).abs() <= 9 * (h + 1), sinks=m.normal(4))),
    packed("packed table of distances", UNEVEN, options=lambda m: dict(
        table=m.normal(2, 99), score_mod=lambda t: lambda s, b, h, q, k: s + t[h, q - k + 49], causal=True, **m.longest)),
    packed("packed table of keys", LATER, heads=4, options=lambda m: dict(
        table=m.normal(4, 70), score_mod=lambda t: lambda s, b, h, q, k: s + t[b, k], **m.longest)),
    packed("packed table of query buckets", UNEVEN, options=lambda m: dict(
        table=m.normal(5), score_mod=bucketed(m.integers(0, 4, 41), False), **m.longest)),
    packed("packed table of any index", UNEVEN, options=lambda m: dict(
        table=m.normal(41, 5), score_mod=bucketed(m.integers(0, 4, 50), True), **m.longest)),
    packed("packed tree", LATER, options=lambda m: dict(mask=tw.tree(parents(m, 4, 40)), **m.longest)),
    packed("packed used", UNEVEN, USED, options=lambda m: dict(causal=True)),
    packed("packed used dropout bias", UNEVEN, USED, options=lambda m: dict(
        dropout_p=0.2, rng=tw.Rng(4), bias=m.normal(6, 2, 30, 44), sinks=m.normal(2), **m.longest)),
    packed("packed batch invariant", UNEVEN, heads=4, options=lambda m: dict(causal=True, batch_invariant=True)),
    packed("packed no sequences in use", ((5, 5), (3, 0)), ((0, 0), (0, 0)), options=lambda m: dict(sinks=m.normal(2))),
    packed("packed everything", UNEVEN, USED, heads=4, head_dim=24, head_dim_v=40, options=lambda m: dict(
        causal=True, mask=(tw.window(20, None) | tw.prefix(m.values([9, 0, 0, 0, 20, 1]))) & tw.key_lengths(
            m.values([17, 17, 0, 0, 44, 2])), score_mod=[tw.alibi(m.uniform(6, 4)), tw.softcap(4.0)],
        bias=m.normal(4, 30, 44), sinks=m.normal(4), dropout_p=0.1, rng=tw.Rng(11, 2, 1), scale=0.3, **m.longest)),
)


def named(name: str) -> Case:
    """The case of the table that is called so. Raises StopIteration if none is."""
    return next(case for case in CASES if case.name == name)
