"""What is to be computed: the one description that every backend takes, and the one place where input is checked.

A `Problem` holds sizes, numbers and the lowered mask and score functions; `Operands` hold the tensors. Both speak of
[batch, heads, seqlen, head_dim] whatever the caller's layout: strides make the difference, nothing is copied.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise import masks, rng
from tilewise.masks import Mask
from tilewise.score_mods import Mods, ScoreMod, compose
from tilewise.trace.checks import check_indices
from tilewise.trace.derive import derivative, lookups
from tilewise.trace.graph import Graph, Node, Program, lower, parse, wrap
from tilewise.trace.learned import Learned

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 512
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


class Graphs(NamedTuple):
    """The graphs of a program text; None where there is none."""
    score: Graph | None
    score_gradient: Graph | None         # d score / d s
    mask: Graph | None
    keys: tuple[Graph, ...]              # per band lo, hi, inner_lo, inner_hi over q; none: decided by the mask's graph
    queries: tuple[Graph, ...]           # per band the same over k
    learned: tuple[Learned, ...]         # lookups of floating tensors on which the score depends

    @property
    def listed(self) -> bool:
        """Whether the mask has no bands: its tiles come as lists, decided by its graph."""
        return self.mask is not None and not self.keys

    @staticmethod
    def of(text: str) -> Graphs:
        score, gradient, mask, keys, queries, *lookups = _groups(text)
        learned = tuple(Learned(load, factor) for load, factor in lookups if isinstance(load, Node))
        return Graphs(score[0] if score else None, gradient[0] if gradient else None, mask[0] if mask else None, keys, queries,
                      learned)


def _groups(text: str) -> tuple[tuple[Graph, ...], ...]:
    return parse(text)


class Operands(NamedTuple):
    """The tensors of a problem, and the values of its program's slots.

    q [B, H, S_q, D], k [B, H_kv, S_k, D], v [B, H_kv, S_k, D_v], bias 4-D with dimensions of size 1 where it broadcasts,
    sinks [H], rng int64 [3] (`rng.py`).
    """
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None
    rng: Tensor | None
    captured: Sequence[Tensor]
    ints: Sequence[int]
    floats: Sequence[float]


class Settings(NamedTuple):
    """What is asked for, beside the tensors."""
    scale: float
    dropout: int                        # threshold t in 1/65536; 0: no dropout
    program: str
    layout: str                         # order in memory of new tensors: "bshd" or "bhsd"
    precision: str                      # of fp32 products: "ieee", "tf32x3" or "tf32"
    deterministic: bool
    batch_invariant: bool


@dataclass(frozen=True)
class Problem:
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

    @property
    def graphs(self) -> Graphs:
        return Graphs.of(self.program)

    def empty(self, heads: int, seqlen: int, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised [B, heads, seqlen, dim] tensor whose memory follows the caller's layout."""
        order = (0, 2, 1, 3) if self.layout == "bshd" else (0, 1, 2, 3)
        return torch.empty_permuted((self.batch, heads, seqlen, dim), order, device=self.device,
                                    dtype=self.dtype if dtype is None else dtype)

    def empty_lse(self) -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.empty((self.batch, self.heads, self.seqlen_q), dtype=dtype, device=self.device)


def make(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Mask | Callable | Tensor | None = None,
         score_mod: Mods = None, bias: Tensor | None = None, sinks: Tensor | None = None,
         scale: float | None = None, dropout_p: float = 0.0, rng: Any = None, deterministic: bool | None = None,
         batch_invariant: bool = False, layout: str = "bshd") -> tuple[Problem, Operands]:
    """Checks the arguments of `tilewise.attention` and describes them. Raises TypeError or ValueError naming the argument."""
    q, k, v = _to_bhsd(q, k, v, layout)
    _check_tensors(q, k, v)
    if bias is not None:
        bias = _check_bias(bias, q, k)
    if sinks is not None:
        _check_sinks(sinks, q)
        sinks = sinks.contiguous()
    program = _program(_whole_mask(causal, mask), compose(score_mod))
    _check_captured(program, dict(b=q.shape[0], h=q.shape[1], q=q.shape[2], k=k.shape[2], nq=q.shape[2], nk=k.shape[2]),
                    q.device)
    settings = Settings(
        scale=_check_scale(scale, q.shape[3]), dropout=_check_dropout(dropout_p), program=program.text, layout=layout,
        precision=_precision(),
        deterministic=torch.are_deterministic_algorithms_enabled() if deterministic is None else bool(deterministic),
        batch_invariant=bool(batch_invariant))
    operands = Operands(q, k, v, bias, sinks, _rng_tensor(rng, settings.dropout, q.device), program.captured,
                        program.ints, program.floats)
    return describe(operands, settings), operands


def describe(x: Operands, settings: Settings) -> Problem:
    """The problem that operands and settings make up."""
    batch, heads, seqlen_q, head_dim = x.q.shape
    return Problem(batch, heads, x.k.shape[1], seqlen_q, x.k.shape[2], head_dim, x.v.shape[3], x.q.dtype, x.q.device,
                   bias_shape=None if x.bias is None else tuple(x.bias.shape), has_sinks=x.sinks is not None, settings=settings)


def _precision() -> str:
    try:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # set through torch.backends, which this getter then refuses to tell
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _program(mask: Mask | None, score: ScoreMod | None) -> Program:
    sections: list[list] = [[], [], [], [], []]
    if score is not None:
        gradient = derivative(score.expr)
        sections[0], sections[1] = [score.expr], [wrap(0.0) if gradient is None else gradient]
    if mask is not None:
        sections[2] = [mask.element]
        sections[3] = [x for band in mask.keys for x in band]
        sections[4] = [x for band in mask.queries for x in band]
    if score is not None:
        sections += [list(pair) for pair in lookups(score.expr)]
    return lower(sections)


def _whole_mask(causal: bool, mask: Mask | Callable | Tensor | None) -> Mask | None:
    if isinstance(mask, Tensor):
        mask = masks.from_tensor(mask)
    elif callable(mask):
        mask = masks.mask_mod(mask)
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError("mask: expected None, a mask such as tw.causal(), a function mask_mod(b, h, q_idx, kv_idx) or a "
                        f"boolean tensor, got {type(mask).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected True or False, got {causal!r}")
    if causal:
        return masks.causal() if mask is None else masks.causal() & mask
    return mask


def _to_bhsd(q: Tensor, k: Tensor, v: Tensor, layout: str) -> list[Tensor]:
    if layout not in ("bshd", "bhsd"):
        raise ValueError(f'layout: expected "bshd" or "bhsd", got {layout!r}')
    names = "[batch, seqlen, heads, head_dim]" if layout == "bshd" else "[batch, heads, seqlen, head_dim]"
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected {names}, got {x.dim()} dimensions {list(x.shape)}")
    return [x.transpose(1, 2) if layout == "bshd" else x for x in (q, k, v)]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    batch, heads, _, head_dim = q.shape
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected float16, bfloat16, float32 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
        if x.shape[0] != batch:
            raise ValueError(f"{name}: expected q's batch size {batch}, got {x.shape[0]}")
    if k.shape[3] != head_dim:
        raise ValueError(f"k: expected q's head_dim {head_dim}, got {k.shape[3]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v: expected as many heads as k ({k.shape[1]}), got {v.shape[1]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: expected as many keys as k ({k.shape[2]}), got {v.shape[2]}")
    if heads < 1 or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[1]}")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a head_dim from 1 to {MAX_HEAD_DIM}, got {x.shape[3]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"{name}: expected a contiguous last dimension (stride 1), got stride {x.stride(3)}: "
                             f"call {name}.contiguous()")


def _check_bias(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
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


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale: expected None or a finite number, got {scale!r}")
    return float(scale)


def _check_dropout(p: float) -> int:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {p!r}")
    return rng.threshold(p)


def _rng_tensor(source: Any, t: int, device: torch.device) -> Tensor | None:
    if source is not None and not isinstance(source, rng.Rng):
        raise TypeError(f"rng: expected None or tw.Rng(seed), got {type(source).__name__}")
    if t == 0:
        return None
    if source is None:
        return rng.draw(device)
    return source.tensor(device)


def _check_captured(program: Program, sizes: dict[str, int], device: torch.device) -> None:
    """Captured tensors are on the device and as long as what indexes them."""
    names = [""] * len(program.captured)
    for expr in program.loads:
        captured, *indices = expr.args
        tensor, name, limit, whole = captured.value
        for slot in range(len(names)):
            if program.captured[slot] is tensor:
                names[slot] = name
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on q's device {device}, got {tensor.device}")
        for axis, index in enumerate(indices):
            if whole and index.op == "var" and tensor.shape[axis] != sizes[index.value]:
                raise ValueError(f"{name}: expected size {sizes[index.value]} in dimension {axis} "
                                 f"({LEAF_NAMES[index.value]}), got {list(tensor.shape)}")
        if limit is not None and tensor.device.type == "cpu" and not torch.compiler.is_compiling() and tensor.numel():
            low, high = (int(x) for x in tensor.aminmax())
            if low < 0 or high > sizes[limit]:
                raise ValueError(f"{name}: expected values from 0 to {sizes[limit]} ({LEAF_NAMES[limit]}), "
                                 f"got values from {low} to {high}")


    if not torch.compiler.is_compiling():
        check_indices(program.text, program.captured, program.ints, program.floats, names, sizes)


LEAF_NAMES = {"b": "the batch size", "h": "the number of query heads", "q": "S_q", "k": "S_k", "nq": "S_q", "nk": "S_k"}

# What torch.compiler.assume_constant_result does, without importing the compiler: constants while torch.compile traces.
for constant in (_groups, _precision):
    vars(constant)["_dynamo_marked_constant"] = True
