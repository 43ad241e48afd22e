"""What is to be computed: the one description that every backend takes, and the one place where input is checked.

A `Problem` holds sizes, numbers and the lowered mask and score functions; `Operands` hold the tensors. Both speak of
[batch, heads, seqlen, head_dim] whatever the caller's layout: strides make the difference, nothing is copied. Sequences of
unequal length, packed or in a cache, are rows of such tensors (`sequences.py`).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise import masks, rng, statistics
from tilewise.fp8 import FP8, WIDE, checked_scale
from tilewise.masks import Mask
from tilewise.score_mods import Mods, ScoreMod, compose
from tilewise.statistics import Statistics
from tilewise.trace.checks import check_indices
from tilewise.trace.derive import curved, derivative, lookups
from tilewise.trace.graph import GROUPS, Graph, Node, Program, lower, parse, wrap
from tilewise.trace.learned import Learned
from tilewise.trace.memo import abstract, readable

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 512
MAX_LATENT_DIM = 576                    # with one key head: multi-head latent attention's 512 and 64 for positions
MAX_SPLITS = 256
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


class Graphs(NamedTuple):
    """The graphs of a program text; None where there is none."""
    score: Graph | None
    score_gradient: Graph | None         # d score / d s
    mask: Graph | None
    keys: tuple[Graph, ...]              # per band lo, hi, inner_lo, inner_hi over q; none: decided by the mask's graph
    queries: tuple[Graph, ...]           # per band the same over k
    score_curvature: Graph | None        # d² score / d s², in the programs of `Problem.curved` where it is not 0
    learned: tuple[Learned, ...]         # lookups of floating tensors on which the score depends

    @property
    def listed(self) -> bool:
        """Whether the mask has no bands: its tiles come as lists, decided by its graph."""
        return self.mask is not None and not self.keys

    @staticmethod
    def of(text: str) -> Graphs:
        score, gradient, mask, keys, queries, curvature, *lookups = _groups(text)
        learned = tuple(Learned(load, factor) for load, factor in lookups if isinstance(load, Node))
        return Graphs(score[0] if score else None, gradient[0] if gradient else None, mask[0] if mask else None, keys, queries,
                      curvature[0] if curvature else None, learned)


def _groups(text: str) -> tuple[tuple[Graph, ...], ...]:
    return parse(text)


class Operands(NamedTuple):
    """The tensors of a problem, and the values of its program's slots.

    q [B, H, S_q, D], k [B, H_kv, S_k, D], v [B, H_kv, S_k, D_v], bias 4-D with dimensions of size 1 where it broadcasts,
    sinks [H], rng int64 [3] (`rng.py`).

    Of sequences of unequal length: q_rows, k_rows int32 [B, 3], slot, first row and number of rows of each in q, and in k and
    v; slots are what q [slots, H, rows, D] counts first. With pages int32 [B, n], k and v are [pages, H_kv, page size, D] and
    row j of sequence b is in pages[b, j // page size]. k_scale, v_scale fp32 [H_kv]: of keys and values stored in fp8. Where q
    is fp8 too, all three scales are [B, H_kv], or None for 1 (`widening.py`).
    """
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None
    rng: Tensor | None = None
    q_rows: Tensor | None = None
    k_rows: Tensor | None = None
    pages: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    q_scale: Tensor | None = None
    captured: Sequence[Tensor] = ()
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()


TENSORS = Operands._fields.index("captured")   # of them come before the lists


class Settings(NamedTuple):
    """What is asked for, beside the tensors."""
    scale: float
    dropout: int                        # threshold t in 1/65536; 0: no dropout
    program: str
    layout: str                         # order in memory of new tensors: "bshd" or "bhsd"
    precision: str                      # of fp32 products: "ieee", "tf32x3" or "tf32"
    deterministic: bool
    batch_invariant: bool
    max_seqlen_q: int = 0               # of sequences of unequal length: the host's upper bounds
    max_seqlen_k: int = 0
    cached: bool = False                # keys are in a cache: rows of dropout's bits are positions
    shared: bool = False                # v is the first columns of k in memory (multi-head latent attention)
    splits: int = 0                     # of the keys (Flash-Decoding); 0: the backend chooses
    statistics: str = ""                # names of those wanted beside out and lse (`statistics.Statistics`)


@dataclass(frozen=True)
class Problem:
    """seqlen_q, seqlen_k: of the longest sequence, or an upper bound, where they differ."""
    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    bias_shape: tuple[int, ...] | None
    has_sinks: bool
    settings: Settings
    packed_q: int | None = None         # rows of all sequences in q, if it is packed: q [1, H, rows, D]
    packed_k: int | None = None
    page_size: int | None = None
    stored: torch.dtype | None = None   # of keys and values in a cache, where it is not q's
    quantized: bool = False             # q, k and v are fp8; `dtype` is that of results
    unequal: bool = False               # sequences have lengths of their own, in k_rows and, if q is packed, q_rows
    first: int = 0                      # index b of the first sequence
    row: int = 0                        # of dropout's bits, of the first query
    learning: bool = False              # captured tensors need gradients
    aligned: bool = True                # rows of q, k and v begin at multiples of 16 bytes of their memory, and lie apart

    @property
    def group(self) -> int:
        """Query heads per key head: query head h reads key head h // group."""
        return self.heads // self.kv_heads

    scale = property(lambda self: self.settings.scale)
    dropout = property(lambda self: self.settings.dropout)
    program = property(lambda self: self.settings.program)
    layout = property(lambda self: self.settings.layout)
    precision = property(lambda self: self.settings.precision)
    deterministic = property(lambda self: self.settings.deterministic)
    batch_invariant = property(lambda self: self.settings.batch_invariant)
    cached = property(lambda self: self.settings.cached)
    shared = property(lambda self: self.settings.shared)
    splits = property(lambda self: self.settings.splits)
    statistics = property(lambda self: self.settings.statistics)

    @property
    def graphs(self) -> Graphs:
        return Graphs.of(self.program)

    def curved(self, x: Operands) -> tuple[Problem, Operands]:
        """The same problem with a program that has the score function's second derivative."""
        text, floats = curved(self.program, len(x.floats))
        return replace(self, settings=self.settings._replace(program=text)), x._replace(floats=[*x.floats, *floats])

    @property
    def rows_q(self) -> tuple[int, int]:
        """(slots, rows in each) of q."""
        return (self.batch, self.seqlen_q) if self.packed_q is None else (1, self.packed_q)

    @property
    def rows_k(self) -> tuple[int, int]:
        return (self.batch, self.seqlen_k) if self.packed_k is None else (1, self.packed_k)

    @property
    def queries(self) -> int:
        """Rows of q of all sequences together."""
        return self.rows_q[0] * self.rows_q[1]

    @property
    def keys(self) -> int:
        return self.rows_k[0] * self.rows_k[1]

    def new_q(self, dim: int) -> Tensor:
        """A tensor like q [.., heads, .., dim], in the memory order of the caller's layout; what no sequence holds is 0."""
        return self._new(self.heads, *self.rows_q, dim, self.packed_q)

    def new_k(self, dim: int) -> Tensor:
        """Likewise like k."""
        return self._new(self.kv_heads, *self.rows_k, dim, self.packed_k)

    def _new(self, heads: int, slots: int, rows: int, dim: int, packed: int | None) -> Tensor:
        order = (0, 2, 1, 3) if self.layout == "bshd" else (0, 1, 2, 3)
        new = torch.empty_permuted((slots, heads, rows, dim), order, device=self.device, dtype=self.dtype)
        return new if packed is None else new.zero_()

    def new_lse(self) -> Tensor:
        """[.., heads, ..], fp32 (fp64 for fp64); -inf for what no sequence holds."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        slots, rows = self.rows_q
        new = torch.empty((slots, self.heads, rows), dtype=dtype, device=self.device)
        return new if self.packed_q is None else new.fill_(-torch.inf)

    def new_statistics(self) -> Statistics:
        """Those that are wanted, of no keys: max_score and entropy [.., heads, ..] like lse, key_mass [.., heads, keys]."""
        wanted, dtype = self.statistics.split(), torch.promote_types(self.dtype, torch.float32)
        of_rows, of_keys = ((slots, self.heads, rows) for slots, rows in (self.rows_q, self.rows_k))
        shapes_and_fills = dict(max_score=(of_rows, -torch.inf), entropy=(of_rows, 0.0), key_mass=(of_keys, 0.0))
        return Statistics(**{name: torch.full(*shapes_and_fills[name], dtype=dtype, device=self.device) for name in wanted})


class Layout(NamedTuple):
    """Where the sequences of a call lie, and how long they are at most. The default: q, k and v hold one per entry."""
    q_rows: Tensor | None = None
    k_rows: Tensor | None = None
    pages: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    cached: bool = False
    shared: bool = False
    lowest: int = 0                     # position of any query in a cache, as far as the host knows


DENSE = Layout()


def make(q: Tensor, k: Tensor, v: Tensor, *, layout: str = "bshd", **options) -> tuple[Problem, Operands]:
    """Checks the arguments of `tilewise.attention` and describes them. Raises TypeError or ValueError naming the argument."""
    return make_unequal(DENSE, *_to_bhsd(q, k, v, layout), layout=layout, **options)


def make_unequal(where: Layout, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
                 mask: Mask | Callable | Tensor | None = None, score_mod: Mods = None, bias: Tensor | None = None,
                 sinks: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0, rng: Any = None,
                 deterministic: bool | None = None, batch_invariant: bool = False, num_splits: int | None = None,
                 layout: str = "bshd", return_stats: Sequence[str] = (), q_scale: Tensor | None = None,
                 k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> tuple[Problem, Operands]:
    """The same for sequences that lie where a checked `Layout` says; q, k, v [slots, heads, rows, head_dim]."""
    _check_tensors(q, k, v, where)
    batch = q.shape[0] if where.q_rows is None else len(where.q_rows)
    nq = q.shape[2] if where.q_rows is None else where.max_seqlen_q
    nk = k.shape[2] if where.k_rows is None else where.max_seqlen_k
    if bias is not None:
        bias = _check_bias(bias, q, (batch, q.shape[1], nq, nk))
    if sinks is not None:
        _check_sinks(sinks, q)
        sinks = sinks.contiguous()
    program = _program(_whole_mask(causal, mask), compose(score_mod), where.cached)
    sizes = dict(b=batch, h=q.shape[1], q=nq, p=nk if where.cached else nq, k=nk, nq=nq, nk=nk)
    _check_captured(program, sizes, q.device, where)
    settings = Settings(
        scale=_check_scale(scale, q.shape[3]), dropout=_check_dropout(dropout_p), program=program.text, layout=layout,
        precision=fp32_products(),
        deterministic=(torch.are_deterministic_algorithms_enabled() if deterministic is None
                       else _check_flag("deterministic", deterministic)),
        batch_invariant=_check_flag("batch_invariant", batch_invariant),
        max_seqlen_q=where.max_seqlen_q, max_seqlen_k=where.max_seqlen_k,
        cached=where.cached, shared=where.shared, splits=_check_splits(num_splits, batch_invariant),
        statistics=statistics.checked(return_stats))
    operands = Operands(q, k, v, bias, sinks, rng_tensor(rng, settings.dropout, q.device), *where[:5], None, program.captured,
                        program.ints, program.floats)
    if not where.cached:
        of_q, of_k, of_v = (checked_scale(name, scale, q.dtype, batch, k.shape[1], q.device) for name, scale in (
            ("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)))
        operands = operands._replace(q_scale=of_q, k_scale=of_k, v_scale=of_v)
    if q.dtype == FP8:
        _check_forward_only(operands)
    return describe(operands, settings), operands


def describe(x: Operands, settings: Settings) -> Problem:
    """The problem that operands and settings make up."""
    unequal = x.k_rows is not None
    packed_q = None if x.q_rows is None else x.q.shape[2]
    packed_k = x.k.shape[2] if unequal and not settings.cached else None
    return Problem(
        batch=x.q.shape[0] if x.q_rows is None else x.q_rows.shape[0], heads=x.q.shape[1], kv_heads=x.k.shape[1],
        seqlen_q=x.q.shape[2] if x.q_rows is None else settings.max_seqlen_q,
        seqlen_k=settings.max_seqlen_k if unequal else x.k.shape[2], head_dim=x.q.shape[3], head_dim_v=x.v.shape[3],
        dtype=WIDE if x.q.dtype == FP8 else x.q.dtype, device=x.q.device,
        bias_shape=None if x.bias is None else tuple(x.bias.shape), has_sinks=x.sinks is not None, settings=settings,
        packed_q=packed_q, packed_k=packed_k,
        page_size=None if x.pages is None else x.k.shape[2], unequal=unequal, quantized=x.q.dtype == FP8,
        stored=None if x.k_scale is None or x.q.dtype == FP8 else x.k.dtype,
        learning=any(t.requires_grad for t in x.captured), aligned=all(aligned(t) for t in (x.q, x.k, x.v)))


def aligned(x: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes from the start of the tensor's memory, and no two are the same.

    Of abstract tensors, which cannot tell, True: it is asked again when the operation runs.
    """
    if abstract(x):
        return True
    of_16_bytes = 16 // x.itemsize
    *steps, last = x.stride()
    return last == 1 and x.storage_offset() % of_16_bytes == 0 and all(
        (step and step % of_16_bytes == 0) or size == 1 for size, step in zip(x.shape, steps, strict=False))


def fp32_products() -> str:
    """How PyTorch is told to multiply fp32: a value of PRECISIONS."""
    try:
        return PRECISIONS[torch._C._get_float32_matmul_precision()]
    except RuntimeError:  # set through torch.backends, which this getter then refuses to tell
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _program(mask: Mask | None, score: ScoreMod | None, cached: bool) -> Program:
    sections: list[list] = [[] for _ in GROUPS]
    if score is not None:
        gradient = derivative(score.expr)
        sections[0], sections[1] = [score.expr], [wrap(0.0) if gradient is None else gradient]
    if mask is not None:
        sections[2] = [mask.element]
        sections[3] = [x for band in mask.keys for x in band]
        sections[4] = [x for band in mask.queries for x in band]
    if score is not None:
        sections += [list(pair) for pair in lookups(score.expr)]
    return lower(sections, masks.P if cached else None)


def _whole_mask(causal: bool, mask: Mask | Callable | Tensor | None) -> Mask | None:
    if isinstance(mask, Tensor):
        mask = masks.from_tensor(mask)
    elif mask is not None:
        mask = masks.as_mask(mask, "mask", "None, a mask such as tw.causal(), a function mask_mod(b, h, q_idx, kv_idx) or a "
                                           "boolean tensor")
    if _check_flag("causal", causal):
        return masks.causal() if mask is None else masks.causal() & mask
    return mask


def _to_bhsd(q: Tensor, k: Tensor, v: Tensor, layout: str) -> list[Tensor]:
    if layout not in ("bshd", "bhsd"):
        raise ValueError(f'layout: expected "bshd" or "bhsd", got {layout!r}')
    names = "[batch, seqlen, heads, head_dim]" if layout == "bshd" else "[batch, heads, seqlen, head_dim]"
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.is_nested:
            raise ValueError(f"{name}: expected {names}, got a nested tensor: call tw.attention_varlen, which takes those of "
                             "torch.jagged layout")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected {names}, got {x.dim()} dimensions {list(x.shape)}")
    return [x.transpose(1, 2) if layout == "bshd" else x for x in (q, k, v)]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, where: Layout) -> None:
    batch, heads, _, head_dim = q.shape
    if q.dtype not in DTYPES and (where.cached or q.dtype != FP8):
        others = "float32 or float64" if where.cached else "float32, float64 or float8_e4m3fn"
        raise TypeError(f"q: expected float16, bfloat16, {others}, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype and where.k_scale is None:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
        if x.shape[0] != batch and not where.cached:
            raise ValueError(f"{name}: expected q's batch size {batch}, got {x.shape[0]}")
    if k.shape[3] != head_dim:
        raise ValueError(f"k: expected q's head_dim {head_dim}, got {k.shape[3]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v: expected as many heads as k ({k.shape[1]}), got {v.shape[1]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: expected as many keys as k ({k.shape[2]}), got {v.shape[2]}")
    if heads < 1 or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[1]}")
    for name, x, most in (("q", q, MAX_LATENT_DIM if k.shape[1] == 1 else MAX_HEAD_DIM), ("v", v, MAX_HEAD_DIM)):
        if not 1 <= x.shape[3] <= most:
            raise ValueError(f"{name}: expected a head_dim from 1 to {most}, got {x.shape[3]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"{name}: expected a contiguous last dimension (stride 1), got stride {x.stride(3)}: "
                             f"call {name}.contiguous()")


def _check_forward_only(x: Operands) -> None:
    scales = dict(q_scale=x.q_scale, k_scale=x.k_scale, v_scale=x.v_scale)
    of_captured = {f"captured tensor {list(t.shape)}": t for t in x.captured}
    for name, t in dict(q=x.q, k=x.k, v=x.v, bias=x.bias, sinks=x.sinks, **scales, **of_captured).items():
        if torch.is_grad_enabled() and t is not None and t.requires_grad:
            raise ValueError(f"{name}: expected no gradient: attention of float8_e4m3fn inputs has a forward pass only: call "
                             "it under torch.no_grad(), or pass bfloat16")


def _check_bias(bias: Tensor, q: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    if not isinstance(bias, Tensor) or bias.dtype not in DTYPES:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias: expected a floating tensor (a boolean one is a mask: pass it as mask), got {got}")
    if bias.device != q.device:
        raise ValueError(f"bias: expected q's device {q.device}, got {bias.device}")
    if bias.dim() > 4 or any(size not in (1, want) for size, want in zip(bias.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"bias: expected a shape that broadcasts to [B, H, S_q, S_k] = {list(full)}, got {list(bias.shape)}")
    return bias[(None,) * (4 - bias.dim())]


def _check_sinks(sinks: Tensor, q: Tensor) -> None:
    if not isinstance(sinks, Tensor) or not sinks.dtype.is_floating_point or sinks.shape != (q.shape[1],):
        got = f"{sinks.dtype} {list(sinks.shape)}" if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"sinks: expected a floating tensor [H] = [{q.shape[1]}], got {got}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected q's device {q.device}, got {sinks.device}")


def _check_flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale: expected None or a finite number, got {scale!r}")
    return float(scale)


def _check_splits(splits: int | None, batch_invariant: bool) -> int:
    if splits is None:
        return 0
    if batch_invariant:
        raise ValueError(f"num_splits: expected None with batch_invariant, which cuts keys by their position, got {splits!r}")
    if isinstance(splits, bool) or not isinstance(splits, int) or not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"num_splits: expected None or an integer from 1 to {MAX_SPLITS}, got {splits!r}")
    return splits


def _check_dropout(p: float) -> int:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {p!r}")
    return rng.threshold(p)


def rng_tensor(source: Any, t: int, device: torch.device) -> Tensor | None:
    """The tensor that dropout's bits come from; None without dropout, threshold t = 0."""
    if source is not None and not isinstance(source, rng.Rng):
        raise TypeError(f"rng: expected None or tw.Rng(seed), got {type(source).__name__}")
    if t == 0:
        return None
    if source is None:
        return rng.draw(device)
    return source.tensor(device)


def _check_captured(program: Program, sizes: dict[str, int], device: torch.device, where: Layout) -> None:
    """Captured tensors are on the device and as long as what indexes them, or longer where sequences are unequal."""
    names, unequal = [""] * len(program.captured), where.k_rows is not None
    for expr in program.loads:
        captured, *indices = expr.args
        tensor, name, limit, whole = captured.value
        for slot in range(len(names)):
            if program.captured[slot] is tensor:
                names[slot] = name
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on q's device {device}, got {tensor.device}")
        for axis, index in enumerate(indices):
            size, wanted = tensor.shape[axis], sizes[index.value] if index.op == "var" else 0
            longer = unequal and index.op == "var" and index.value in "qpk"
            if whole and index.op == "var" and (size < wanted or (size > wanted and not longer)):
                raise ValueError(f"{name}: expected size {sizes[index.value]} in dimension {axis} "
                                 f"({LEAF_NAMES[index.value]}), got {list(tensor.shape)}")
        if limit is not None and readable(tensor) and tensor.numel():
            low, high = (int(x) for x in tensor.aminmax())
            if low < 0 or high > sizes[limit]:
                raise ValueError(f"{name}: expected values from 0 to {sizes[limit]} ({LEAF_NAMES[limit]}), "
                                 f"got values from {low} to {high}")

    if not abstract(*program.captured):
        check_indices(program.text, program.captured, program.ints, program.floats, names, sizes, unequal,
                      where.lowest if where.cached else None)


LEAF_NAMES = {"b": "the batch size", "h": "the number of query heads", "q": "S_q", "p": "S_q", "k": "S_k",
              "nq": "S_q", "nk": "S_k"}

# What torch.compiler.assume_constant_result does, without importing the compiler: constants while torch.compile traces.
for constant in (_groups, fp32_products):
    vars(constant)["_dynamo_marked_constant"] = True
