"""Calls like one made before: what was found out about that one serves again.

Checking a call, describing its problem, choosing a backend and settling what its kernel is told takes ten times as long as
launching it. All of that follows from how tensors lie in memory, from options and from PyTorch's settings, never from what
q, k, v, bias and sinks hold. `find` remembers it by all that decides: shapes, strides, dtypes, devices, alignment of tensors;
options with their types; deterministic algorithms, the precision of fp32 products, the number of threads; masks and score
functions by identity, together with the layout and `_version` of what they captured.

The memory is bounded and keeps nothing alive: entries refer weakly to masks and captured tensors and go with them. A result
never depends on it. What is not plain is described anew: subclasses of Tensor, tensors that a compiler, a mode or a transform
follows, and functions given as they are, whose closures may change.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise import backends, known
from tilewise.derivatives import transformed
from tilewise.found import Found, heads_first, through_ops
from tilewise.known import ALIGNED, layout
from tilewise.masks import Mask
from tilewise.problem import DENSE, Layout, Operands, Problem, fp32_products, make, make_unequal, rng_tensor
from tilewise.score_mods import ScoreMod
from tilewise.statistics import Statistics

deterministic_algorithms, threads = torch.are_deterministic_algorithms_enabled, torch.get_num_threads
PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Options(NamedTuple):
    """The arguments of `tilewise.attention` that say what is computed, as given."""
    causal: Any = False
    mask: Any = None
    score_mod: Any = None
    bias: Any = None
    sinks: Any = None
    scale: Any = None
    dropout_p: Any = 0.0
    rng: Any = None
    deterministic: Any = None
    batch_invariant: Any = False
    return_stats: Any = ()
    layout: Any = "bshd"
    num_splits: Any = None
    q_scale: Any = None
    k_scale: Any = None
    v_scale: Any = None

    def as_long_as_keys(self) -> bool:
        """Whether something goes with each key: columns of a bias, entries of a table, statistics."""
        mask, mods = self.mask, self.score_mod
        return (self.bias is not None or bool(self.return_stats)
                or not (mask is None or (isinstance(mask, Mask) and not mask.element.reads))
                or not (mods is None or (isinstance(mods, ScoreMod) and not mods.expr.reads)))


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str, with_lse: bool,
              where: Layout = DENSE) -> tuple[Tensor, Tensor | None, Statistics | None]:
    """out, lse and the statistics asked for, in the shapes of the caller's q; without with_lse, lse may be None.

    q, k, v: as `options.layout` says, or [total, heads, head_dim] where `where` tells their rows.
    """
    if plain(q, k, v, options.bias, options.sinks):
        found, x = find(q, k, v, options, backend, where)
        return found.compute(x, with_lse)
    problem, x = described(q, k, v, options, where)
    return through_ops(problem, x, backend)


def find_any(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str, where: Layout) -> tuple[Found, Operands]:
    """`find`, also for tensors that are not plain."""
    if plain(q, k, v, options.bias, options.sinks):
        return find(q, k, v, options, backend, where)
    problem, x = described(q, k, v, options, where)
    return Found(problem, x, backend, settled=False), x._replace(q=q, k=k, v=v)


def plain(*tensors: Any) -> bool:
    """Whether these are tensors of no subclass, or None, and nothing but autograd follows what is done with them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or transformed():
        return False
    for x in tensors:  # noqa: SIM110  every call comes here; a generator takes three times as long
        if x is not None and type(x) not in PLAIN:
            return False
    return True


def described(q: Tensor, k: Tensor, v: Tensor, options: Options, where: Layout) -> tuple[Problem, Operands]:
    """The problem, checked, and its operands."""
    if where is DENSE:
        return make(q, k, v, **options._asdict())
    k, v = (x if where.cached else heads_first(x, options.layout) for x in (k, v))
    return make_unequal(where, heads_first(q, options.layout), k, v, **options._asdict())


def find(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str, where: Layout = DENSE) -> tuple[Found, Operands]:
    """What was found out about the last call like this one, or is now; and the operands, q, k and v as given.

    Raises what `problem.make` and `plan.choose` raise.
    """
    (causal, mask, score_mod, bias, sinks, scale, dropout, rng, deterministic, invariant, statistics, order, splits,
     q_scale, k_scale, v_scale) = options
    dense = where is DENSE
    held = () if dense and mask is None and score_mod is None else named(mask, score_mod, where)
    if not (q_scale is None and k_scale is None and v_scale is None):
        held = None                     # fp8 inputs are copied, which takes longest
    found = captured = None
    if held is not None:
        try:
            # types: 1 is True to a dictionary
            key = (layouts(q, k, v), bias if bias is None else layout(bias), sinks if sinks is None else layout(sinks),
                   causal, type(causal), scale, type(scale), dropout, type(dropout), splits, type(splits), deterministic,
                   type(deterministic), invariant, type(invariant), statistics, order, backend, fp32_products(),
                   deterministic_algorithms(), threads(), dense or placed(where), held and tuple(map(id, held)))
            found = known.calls.get(key)
        except (TypeError, BufferError, RuntimeError):      # what is no option, or no tensor with strides: `make` will say so
            held = None
        else:
            captured = None if found is None else found.unchanged(held) if held else ()
    if found is None or captured is None:
        problem, x = described(q, k, v, options, where)
        found = Found(problem, x, backend)
        if found.launch is not None:
            read_natively()
        if held is not None and not problem.quantized:
            found.keep((layouts(q, k, v), *key[1:]), held, x.captured)      # `layouts` may be another one by now
        return found, x._replace(q=q, k=k, v=v)
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    if sinks is not None:
        sinks = sinks.contiguous()
    if rng is not None or found.problem.dropout:
        rng = rng_tensor(rng, found.problem.dropout, q.device)
    return found, Operands(q, k, v, bias, sinks, rng, where.q_rows, where.k_rows, where.pages, where.k_scale, where.v_scale,
                           None, captured, found.ints, found.floats)


def in_python(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    return layout(q), layout(k), layout(v)


@functools.cache
def read_natively() -> None:
    """From now on, if that is possible: what a machine can do that has compiled kernels."""
    global layouts
    layouts = backends.load("cpu").layout_reader(ALIGNED) or layouts


def placed(where: Layout) -> tuple:
    """All that decides of where sequences lie. Of packed ones the rows themselves are among what is `named`."""
    return (*(None if x is None else layout(x) for x in where[:5]), *where[5:])


def named(mask: Any, mods: Any, where: Layout) -> tuple | None:
    """What a call is known by as an object: mask, score functions, packed rows. None: it is not to be remembered."""
    if type(mods) in (tuple, list):
        if not all(isinstance(mod, ScoreMod) for mod in mods):
            return None
    elif mods is None or isinstance(mods, ScoreMod):
        mods = (mods,)
    else:
        return None
    if not (mask is None or isinstance(mask, Mask) or type(mask) in PLAIN):
        return None
    rows = () if where is DENSE or where.cached else (where.q_rows, where.k_rows)
    return tuple([x for x in (mask, *mods, *rows) if x is not None])


layouts: Callable[[Tensor, Tensor, Tensor], Hashable] = in_python
