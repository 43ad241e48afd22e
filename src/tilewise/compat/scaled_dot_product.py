"""PyTorch's scaled_dot_product_attention, and code that calls it, computed by Tilewise.

    from tilewise.compat import sdpa

    with sdpa():                 # what this thread computes inside
        out = model(x)
    sdpa.enable()                # all threads, until sdpa.disable()
"""
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tilewise.api import attention, attention_varlen, autocast
from tilewise.backends import MODULES
from tilewise.masks import LAST_QUERY, ZERO, K, Mask, Q, exact

# torch's is_causal: query i sees keys j <= i, whatever the lengths
TOP_LEFT = Mask("causal, aligned top-left", K <= Q, (exact(ZERO, Q),), (exact(K, LAST_QUERY),))


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                                 dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
                                 enable_gqa: bool = False, backend: str = "auto") -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with the same arguments and meanings.

    Args:
        query: [..., H, L, E]; key: [..., H, S, E]; value: [..., H, S, E_v]. Leading dimensions broadcast; there may be none.
            Or jagged nested tensors [B, H, (L), E] or [B, (L), E], each sequence with itself, without attn_mask.
        attn_mask: broadcasts to [..., H, L, S]: boolean, True where a key is seen, or floating (fp32 or query's dtype), added
            to the scores and differentiable; or torch's `causal_upper_left`, `causal_lower_right`.
        dropout_p: on the probabilities, always applied. Other elements than torch's are dropped, as many of them.
        is_causal: query i sees keys j <= i: aligned top-left, unlike `tilewise.attention`. Not together with attn_mask.
        scale: factor of the products, default E ** -0.5.
        enable_gqa: key and value may have fewer heads, which divide query's.
        backend: as in `tilewise.attention`.

    Returns:
        [..., H, L, E_v], in memory in the order of query. A row that sees no key gives 0, as torch does.

    Raises:
        TypeError, ValueError: as `tilewise.attention`; also for what torch takes and Tilewise does not: head dims of 0 or
            beyond 512, dropout_p = 1, dtypes that are not floating.
    """
    given = {"query": query, "key": key, "value": value}
    for name, x in given.items():
        if not isinstance(x, Tensor) or x.dim() < 2:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected a tensor [..., sequence, head_dim], got {got}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: expected True or False, got {is_causal!r}")
    options: dict[str, Any] = dict(dropout_p=dropout_p, scale=scale, backend=backend)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None with is_causal=True, got both")
    if isinstance(attn_mask, CausalBias):
        is_causal, lower_right = True, _lower_right(attn_mask, query, key)
        attn_mask = None
    else:
        lower_right = False
    if any(x.is_nested for x in given.values()):
        return _nested(query, key, value, attn_mask, is_causal, lower_right, options)
    if is_causal:
        options |= _causal(query, key, lower_right)

    q, k, v = _same_heads([x if x.dim() > 2 else x[None] for x in given.values()], enable_gqa)
    batch = _broadcast({name: x.shape[:-3] for name, x in zip(given, (q, k, v), strict=True)})
    if attn_mask is not None:
        weights = [*batch, q.shape[-3], q.shape[-2], k.shape[-2]]
        _check_mask(attn_mask, query.dtype, weights[-max(x.dim() for x in given.values()):], autocast(query)[0].dtype)
        options["mask" if attn_mask.dtype == torch.bool else "bias"] = _four_dimensional(attn_mask, batch)
    q, k, v = (_four_dimensional(x.expand(*batch, *x.shape[-3:]), batch) for x in (q, k, v))
    if q.stride(1) < q.stride(2):
        out = attention(*(x.transpose(1, 2) for x in (q, k, v)), layout="bshd", **options).transpose(1, 2)
    else:
        out = attention(q, k, v, layout="bhsd", **options)
    out = out if len(batch) == 1 else out.view(*batch, *out.shape[1:])
    return out[0] if all(x.dim() == 2 for x in given.values()) else out


def _lower_right(bias: CausalBias, query: Tensor, key: Tensor) -> bool:
    """Whether torch's causal bias is aligned as Tilewise's `causal`."""
    lengths = query.shape[-2], key.shape[-2]
    if (bias.seq_len_q, bias.seq_len_kv) != lengths:
        raise ValueError(f"attn_mask: expected a causal bias for {lengths[0]} queries and {lengths[1]} keys, got one for "
                         f"{bias.seq_len_q} and {bias.seq_len_kv}")
    return bias.variant == CausalVariant.LOWER_RIGHT


def _causal(query: Tensor, key: Tensor, lower_right: bool) -> dict[str, Any]:
    """The options of `tilewise.attention` for a causal mask; where both alignments are one, the usual."""
    return dict(causal=True) if lower_right or query.shape[-2] == key.shape[-2] else dict(mask=TOP_LEFT)


def _check_mask(mask: Tensor, dtype: torch.dtype, weights: list[int], cast: torch.dtype) -> None:
    """dtype: query's; cast: the same under autocast; weights: the shape of the scores."""
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.float32, dtype, cast):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attn_mask: expected a tensor, boolean, fp32 or of query's dtype {dtype}, got {got}")
    if not 2 <= mask.dim() <= len(weights) or any(n not in (1, want) for n, want in
                                                  zip(mask.shape[::-1], weights[::-1], strict=False)):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {weights}, got {list(mask.shape)}")


def _same_heads(given: list[Tensor], enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [..., heads, rows, head_dim] with as many heads in k as in v, and a multiple of them in q."""
    q, k, v = given
    heads = [x.shape[-3] for x in given]
    if enable_gqa:
        for name, n in zip(("key", "value"), heads[1:], strict=True):
            if n < 1 or heads[0] % n:
                raise ValueError(f"{name}: expected a number of heads that divides query's {heads[0]}, got {n}")
        if heads[1] != heads[2]:
            k, v = (x.repeat_interleave(heads[0] // x.shape[-3], -3) for x in (k, v))
        return q, k, v
    if any(n not in (1, max(heads)) for n in heads):
        raise ValueError(f"key, value: expected query's number of heads {heads[0]} unless enable_gqa=True, got {heads[1]} and "
                         f"{heads[2]}")
    q = q.expand(*q.shape[:-3], max(heads), *q.shape[-2:])
    if heads[1] != heads[2]:
        k, v = (x.expand(*x.shape[:-3], max(heads), *x.shape[-2:]) for x in (k, v))
    return q, k, v


def _broadcast(shapes: dict[str, Sequence[int]]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes.values()))
    except RuntimeError:
        got = ", ".join(str(list(shape)) for shape in shapes.values())
        raise ValueError(f"query, key, value: expected leading dimensions that broadcast, got {got}") from None


def _four_dimensional(x: Tensor, batch: Sequence[int]) -> Tensor:
    """x, up to [*batch, heads, .., ..], as [B or 1, heads, .., ..], its last dimension contiguous; copied only if need be."""
    x = x[(None,) * (max(len(batch), 1) + 3 - x.dim())]
    if len(batch) > 1:
        shared = all(n == 1 for n in x.shape[:-3])
        x = (x if shared else x.expand(*batch, *x.shape[-3:])).reshape(1 if shared else math.prod(batch), *x.shape[-3:])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _nested(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, lower_right: bool,
            options: dict) -> Tensor:
    """Of jagged nested tensors [B, H, (L), E] or [B, (L), E], each sequence by its own length."""
    if attn_mask is not None:
        raise ValueError("attn_mask: expected None with nested tensors, got a tensor")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_nested or x.dim() not in (3, 4) or x.dim() != query.dim():
            got = f"{x.dim()} dimensions" if x.is_nested else "a tensor that is not nested"
            raise ValueError(f"{name}: expected a nested tensor [B, H, (sequence), head_dim] or [B, (sequence), head_dim] like "
                             f"query, got {got}")
    if is_causal:
        options |= _causal(query, key, lower_right)
    with_heads = (x.transpose(1, 2) if x.dim() == 4 else x.unsqueeze(2) for x in (query, key, value))
    out = attention_varlen(*with_heads, **options)
    return out.transpose(1, 2) if query.dim() == 4 else out.squeeze(2)


# ---- code that calls torch's ----------------------------------------------------------------------------------------

REPLACED = F.scaled_dot_product_attention, F.multi_head_attention_forward
fastpath_enabled = torch.backends.mha.get_fastpath_enabled


def _fastpath_enabled() -> bool:
    """Whether torch's encoder modules may compute whole layers in one operation, attention in it: not where it is replaced."""
    if not torch.jit.is_scripting():
        replaced = sdpa._undo or any(isinstance(mode, sdpa) for mode in _get_current_function_mode_stack())
        return not replaced and fastpath_enabled()
    return True


# the modules ask this function, in torch.compile too, where they do not see function modes
torch.backends.mha.get_fastpath_enabled = _fastpath_enabled


def _copy(function: Any, **names: Callable) -> Callable:
    """A copy of a function of torch that asks for no overrides, and to which these names mean something else."""
    names |= dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda tensors: False)
    within = {name: value for name, value in (function.__globals__ | names).items()
              if name != "__name__"}  # by which torch.compile would look for them in torch's module
    copy = FunctionType(function.__code__, within, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _replacements(backend: str) -> dict[Callable, Callable]:
    """What stands in for each of REPLACED: for multi_head_attention_forward a copy that calls ours."""
    ours = partial(scaled_dot_product_attention, backend=backend)
    unread: Callable = lambda *shape: None  # noqa: E731  torch.compile cannot read this check; a wrong mask fails in its view
    return {REPLACED[0]: ours,
            REPLACED[1]: _copy(REPLACED[1], scaled_dot_product_attention=ours, _check_key_padding_mask=unread)}


REPLACEMENTS = {backend: _replacements(backend) for backend in ("auto", *MODULES)}
# These may compute again what a checkpoint has not kept, for which the mode must be on.
BACKWARD = {function: _copy(function) for function in (Tensor.backward, torch.autograd.backward, torch.autograd.grad)}


def _known(backend: str) -> dict[Callable, Callable]:
    if backend not in REPLACEMENTS:
        raise ValueError(f"backend: expected one of {', '.join(REPLACEMENTS)}, got {backend!r}")
    return REPLACEMENTS[backend]


class sdpa(TorchFunctionMode):
    """Inside `with sdpa():` torch.nn.functional.scaled_dot_product_attention is computed by Tilewise.

    Like `torch.autocast` it holds in the thread that entered it, may be nested, and reaches all Python code: names imported
    before, `nn.MultiheadAttention`, `nn.Transformer`, and inside torch.compile, with fullgraph=True too, which compiles anew
    where it was compiled outside. `sdpa.enable()` is for all threads.

    What it does not reach: TorchScript and other C++ code; `nn.MultiheadAttention` asked for its weights (need_weights=True,
    the default), which are of size N² and computed by torch; what activation checkpointing computes again where backward runs
    outside: run it inside. Nothing falls back: what `scaled_dot_product_attention` here refuses raises.
    """
    _undo: ClassVar[list[Callable[[], Any]]] = []

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.replacements = _known(backend)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in BACKWARD and not torch.compiler.is_compiling():
            with self:
                return BACKWARD[func](*args, **kwargs)
        return self.replacements.get(func, func)(*args, **kwargs)

    @classmethod
    def enable(cls, backend: str = "auto") -> None:
        """Replaces the function in every module that has it, for all threads.

        Call it before models are built: a reference that an object, a closure or a default argument holds stays torch's.
        """
        replacements = _known(backend)
        cls.disable()
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("torch._C"):
                continue
            for name, value in list(getattr(module, "__dict__", {}).items()):
                for original, ours in replacements.items():
                    if value is original:
                        setattr(module, name, ours)
                        cls._undo.append(partial(setattr, module, name, original))

    @classmethod
    def disable(cls) -> None:
        """Undoes `enable`."""
        while cls._undo:
            cls._undo.pop()()
