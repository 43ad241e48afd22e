"""The front door: these docstrings are the manual."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame as frames

from tilewise import backends, calls, ops, steps
from tilewise.calls import Options
from tilewise.found import Found
from tilewise.kv_cache import KVCache, Stored, check_tensor
from tilewise.masks import Mask
from tilewise.packing import from_nested, to_nested
from tilewise.paged_cache import PagedKVCache
from tilewise.plan import Plan, plan
from tilewise.problem import DTYPES, Layout, Operands, Problem, make, make_unequal
from tilewise.rng import Rng
from tilewise.rotary import Rotary
from tilewise.score_mods import Mods
from tilewise.sequences import packed_rows
from tilewise.state import AttentionState, merge_states
from tilewise.statistics import Statistics
from tilewise.trace.graph import leaves


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Mask | Callable | Tensor | None = None,
              score_mod: Mods = None, bias: Tensor | None = None,
              sinks: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0, return_lse: bool = False,
              rng: Rng | None = None, deterministic: bool | None = None, batch_invariant: bool = False,
              return_stats: Sequence[str] = (), q_scale: Tensor | None = None, k_scale: Tensor | None = None,
              v_scale: Tensor | None = None, layout: str = "bshd", backend: str = "auto") -> Any:
    """Exact attention, softmax(scale * q k^T + ...) v, in memory linear in the sequence lengths.

    FlashAttention (Dao et al. 2022) with the schedule of FlashAttention-2 (Dao 2023). For query i and key j:

        s = scale * q_i . k_j -> score_mod -> + bias -> mask -> softmax, a sink in its denominator -> dropout -> @ v

    Args:
        q: [B, S_q, H, D] (layout="bshd") or [B, H, S_q, D] (layout="bhsd"); fp16, bf16, fp32, fp64 or fp8 (float8_e4m3fn).
            Any strides with a contiguous last dimension; nothing is copied.
        k: like q with S_k keys and H_kv heads; H_kv divides H and query head h reads key head h // (H // H_kv)
            (grouped-query attention; H_kv = 1 is multi-query).
        v: like k; its head dim D_v may differ. D and D_v are 1 to 512.
        causal: query i sees keys j <= i + S_k - S_q (aligned bottom-right). Combines with `mask` by &.
        mask: which keys a query sees: `tw.causal()`, `tw.window(left, right)`, `tw.prefix(n)`, `tw.documents(ids)`,
            `tw.key_lengths(n)`, `tw.chunked(size)`, `tw.block_mask(layout)`, any function mask_mod(b, h, q_idx, kv_idx)
            (`tw.mask_mod`), their combinations with & | ~, or a boolean tensor that broadcasts to [B, H, S_q, S_k] (True:
            visible).
        score_mod: `tw.softcap(c)`, `tw.alibi(slopes)`, any function score_mod(score, b, h, q_idx, kv_idx)
            (`tw.score_mod`), or a sequence of them, applied in order.
        bias: added to the scores; floating, broadcasts to [B, H, S_q, S_k]; differentiable. -inf hides a key.
        sinks: [H], one logit per query head in the softmax denominator only; differentiable.
        scale: factor of the products, default D ** -0.5.
        dropout_p: in [0, 1), on the probabilities, after lse is taken.
        return_lse: also return the log-sum-exp of each row's scores.
        rng: where dropout's bits come from; default: drawn from the device's default generator. The same `tw.Rng` drops the
            same elements on every backend.
        deterministic: whether gradients must be bitwise repeatable (the forward always is). Default:
            `torch.are_deterministic_algorithms_enabled()`.
        batch_invariant: a row's bits do not depend on which other queries and sequences share the call.
        return_stats: names of statistics to return as well, among "max_score", "entropy" and "key_mass" (`tw.Statistics`).
            The first two are computed in the same pass, key_mass takes one more product of q and k.
        q_scale, k_scale, v_scale: of fp8 inputs, positive fp32 [H_kv] or [B, H_kv]: a number is what is stored times its scale;
            a query head has that of its key head. Default 1. `out` is bf16 then, and there is a forward pass alone. `hopper`
            multiplies in fp8, and rounds probabilities to it (`docs/numerics.md`); others copy q, k and v in bf16, which holds
            each number exactly: `tw.explain` says how many bytes.
        layout: "bshd" or "bhsd".
        backend: "auto", "hopper", "triton", "cpu", "tiled" or "reference"; a backend named runs or raises.

    Returns:
        out [B, S_q, H, D_v] (or [B, H, S_q, D_v]) in q's dtype, bf16 for fp8; with return_lse, (out, lse), lse [B, H, S_q] in
        fp32 (fp64 for fp64), natural logarithm, differentiable. A row that sees no key gives out 0, lse -inf (with a sink: the
        sink) and gradients 0. With return_stats, a `tw.Statistics` comes last; it has no gradient. Other results stay as they
        are, to the bit unless `triton` has a configuration of its own for the entropy.

    Under autocast, fp32 inputs are cast to the autocast dtype.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what was expected and what came.
        NotImplementedError: the named backend cannot compute this.
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q, k, v)
    options = Options(causal, mask, score_mod, bias, sinks, scale, dropout_p, rng, deterministic, batch_invariant, return_stats,
                      layout, None, q_scale, k_scale, v_scale)
    out, lse, found = calls.attention(q, k, v, options, backend, return_lse)
    return _results(out, lse, found, return_lse)


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, *,
                     max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, seqused_q: Tensor | None = None,
                     seqused_k: Tensor | None = None, causal: bool = False, mask: Mask | Callable | Tensor | None = None,
                     score_mod: Mods = None, bias: Tensor | None = None, sinks: Tensor | None = None,
                     scale: float | None = None, dropout_p: float = 0.0, return_lse: bool = False, rng: Rng | None = None,
                     deterministic: bool | None = None, batch_invariant: bool = False, return_stats: Sequence[str] = (),
                     q_scale: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
                     backend: str = "auto", check: bool = False) -> Any:
    """Attention over packed sequences of unequal length, each with itself: no padding is computed or stored.

    Args:
        q: [total_q, H, D]: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k, v: [total_k, H_kv, D], [total_k, H_kv, D_v], likewise by cu_seqlens_k. Or q, k and v are jagged nested tensors
            [B, (S), H, D], without cu_seqlens.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1] on q's device, rising from 0; cu_seqlens_k defaults to cu_seqlens_q. Any
            sequence may be empty.
        max_seqlen_q, max_seqlen_k: length of the longest sequence. On the CPU found by itself; on a GPU, where not given, the
            total stands for it, which is right but plans for more than there is.
        seqused_q, seqused_k: integer [B]: how many of each sequence's rows are in use. Others are neither read nor written:
            out 0, lse -inf, gradients 0.
        check: on a GPU, look at the values of cu_seqlens and seqused, which waits for the device; on the CPU always.

    Everything else is as in `attention`, by each sequence's own length: alignment bottom-right, indices in functions from 0
    inside the sequence, b its number. bias and boolean masks broadcast to [B, H, max_seqlen_q, max_seqlen_k]. Dropout's bits
    are those of sequence b of a batch.

    Returns:
        out [total_q, H, D_v] (or nested); with return_lse (out, lse), lse [H, total_q]; with return_stats a `tw.Statistics`
        last, of [H, total_q] and [H, total_k].

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`.
    """
    where, in_q, in_k, in_v = _packed_rows(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqused_q=seqused_q,
        seqused_k=seqused_k, check=check)
    options = Options(causal, mask, score_mod, bias, sinks, scale, dropout_p, rng, deterministic, batch_invariant, return_stats,
                      q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    out, lse, found = calls.attention(in_q, in_k, in_v, options, backend, return_lse, where)
    if q.is_nested:
        out = to_nested(out, q)
    return _results(out, lse, found, return_lse)


def attention_with_kv_cache(q: Tensor, cache: KVCache | PagedKVCache, k_new: Tensor | None = None,
                            v_new: Tensor | None = None, *, cache_batch_idx: Tensor | Sequence[int] | None = None,
                            cu_seqlens_q: Tensor | None = None,
                            max_seqlen_q: int | None = None, rotary: Rotary | None = None, extended: bool = False,
                            causal: bool = False, mask: Mask | Callable | Tensor | None = None, score_mod: Mods = None,
                            bias: Tensor | None = None, sinks: Tensor | None = None, scale: float | None = None,
                            dropout_p: float = 0.0, return_lse: bool = False, rng: Rng | None = None,
                            batch_invariant: bool = False, num_splits: int | None = None, return_stats: Sequence[str] = (),
                            backend: str = "auto", check: bool = False) -> Any:
    """Appends new keys and values to a cache, then attends to all it holds: decoding, speculative decoding, chunked prefill.

    Few queries are computed by Flash-Decoding (Dao et al. 2023): the keys are split among programs and the parts merged, and
    all query heads that share a key head read its keys once. Many are computed as in `attention`. For inference: no gradient.

    Args:
        q: [B, S_q, H, D], or packed [total, H, D] with cu_seqlens_q, such as one query of some sequences and a whole prompt
            of others. The last query stands at the sequence's last key.
        cache: a `KVCache` or a `PagedKVCache`, in q's dtype or in fp8. It is written to, its lengths grow.
        k_new, v_new: [B, S_new, H_kv, D], [B, S_new, H_kv, D_v], or packed by cu_seqlens_q: the new tokens' keys and values;
            v_new None where the cache holds values as a part of keys. None: attend to what is there.
        cache_batch_idx: the sequences of a `KVCache` (integer tensor [B]) or of a `PagedKVCache` (numbers or an integer
            tensor). Default: all in order.
        cu_seqlens_q: int32 [B + 1]; max_seqlen_q: as in `attention_varlen`.
        rotary: turns k_new and q to their positions before anything else; needs k_new.
        extended: of a `PagedKVCache`, whose `extend` was called before.
        num_splits: shares of the keys; default: as many as fill the device, from bounds that the host knows.
        check: on a GPU, check what depends on the device's values, which waits for it; on the CPU always.

    Everything else is as in `attention`, S_k being the sequence's own number of keys, new ones included. Functions are given
    q_idx = the query's position i + S_k - S_q, and kv_idx from the sequence's first key. Rows of bias and of boolean masks are
    i, their columns kv_idx, up to the longest sequence (on a GPU: the capacity). Dropout's rows are positions.

    Returns:
        out like q with D_v; with return_lse (out, lse), lse [B, H, S_q] or [H, total]; with return_stats a `tw.Statistics`
        last, whose key_mass [B, H, longest] counts each sequence's keys from its first and is 0 behind its last.

    Raises:
        TypeError, ValueError, IndexError: an argument is not as described; then nothing has been written.
        CacheFull: too few free pages; nothing has been written.
        NotImplementedError: the named backend cannot compute this.
    """
    options = Options(causal, mask, score_mod, bias, sinks, scale, dropout_p, rng, None, batch_invariant, return_stats, "bshd",
                      num_splits)
    step = None
    if cu_seqlens_q is None and max_seqlen_q is None:
        step = steps.asked(q, cache, k_new, v_new, cache_batch_idx, rotary, extended, options, backend)
    done = None if step is None else steps.again(step, return_lse)
    if done is not None:
        return done if return_lse else done[0]
    found, operands = _appended(q, cache, k_new, v_new, options, backend, rotary, extended, cache_batch_idx, cu_seqlens_q,
                                max_seqlen_q, check)
    if step is not None:
        steps.remember(step, found, operands.q)
    return _results(*found.compute(operands, return_lse), return_lse)


def cascade_attention(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, cache: KVCache | PagedKVCache, k_new: Tensor | None = None,
                      v_new: Tensor | None = None, *, cache_batch_idx: Tensor | Sequence[int] | None = None,
                      cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None, rotary: Rotary | None = None,
                      extended: bool = False, causal: bool = False, mask: Mask | Callable | Tensor | None = None,
                      score_mod: Mods = None, sinks: Tensor | None = None, scale: float | None = None, return_lse: bool = False,
                      num_splits: int | None = None, backend: str = "auto", check: bool = False) -> Any:
    """Attention of many sequences to one prefix that all share, read once for all of them, and of each to its own cache.

    The two parts are `AttentionState`s over disjoint keys, merged by their lse.

    Args:
        prefix_k, prefix_v: [S_p, H_kv, D], [S_p, H_kv, D_v], in q's dtype: keys that every query sees, at positions 0 to
            S_p - 1. The cache holds what follows.
        rotary: turns k_new and q to positions from S_p on; the prefix's keys are turned already.
        causal, mask: which keys of the cache a query sees; indices count from the cache's first key.
        score_mod: may depend on the score and the head, not on indices.

    Other arguments, results and errors: `attention_with_kv_cache`.
    """
    q, prefix_k, prefix_v = autocast(q, prefix_k, prefix_v)
    _check_prefix(prefix_k, prefix_v, q, cache, sinks, rotary)
    if rotary is not None:
        rotary = Rotary(rotary.cos[len(prefix_k):], rotary.sin[len(prefix_k):], rotary.interleaved)
    options = Options(causal, mask, score_mod, scale=scale, num_splits=num_splits)
    found, given = _appended(q, cache, k_new, v_new, options, backend, rotary, extended, cache_batch_idx, cu_seqlens_q,
                             max_seqlen_q, check, prefix=True)
    problem, operands = found.problem, found.heads_first(given)
    own = AttentionState(*ops.attention(problem, operands, found.backend))
    together = operands.q.transpose(1, 2).flatten(0, 1)[None]           # all queries as those of one sequence
    of_all = ops.attention(*make(together, prefix_k[None], prefix_v[None], score_mod=score_mod, scale=problem.scale), backend)
    shared = AttentionState(*(x.unflatten(2, problem.rows_q)[0].transpose(0, 1) for x in of_all))
    state = merge_states([shared, own])
    return _as_given(state if sinks is None else state.with_sink(sinks), cu_seqlens_q is not None, return_lse)


def explain(q: Tensor, k: Any, v: Tensor | None = None, *, backend: str = "auto", layout: str = "bshd", **options) -> Plan:
    """What `attention` with the same arguments would do: a `Plan`, to print or to read.

    With cu_seqlens_q or nested tensors: what `attention_varlen` would do; with a cache in the place of k, without v: what
    `attention_with_kv_cache` would, without new keys.

    It names the backend and why not the ones before it, tile sizes and how many tiles the mask leaves, FLOPs, bytes from and
    to memory, and memory beside inputs and outputs. Nothing is computed. Options and errors are those of `attention`.
    """
    options.pop("return_lse", None)
    if options.get("rng") is None:
        options["rng"] = Rng(0)  # nothing is drawn: the generator stays where it is
    if isinstance(k, (KVCache, PagedKVCache)):
        problem, operands = _of_cache(q, k, None, **options)
    elif v is None:
        raise TypeError("v: expected a tensor, got None")
    elif "cu_seqlens_q" in options or (isinstance(q, Tensor) and q.is_nested):
        problem, operands = _of_packed(q, k, v, options.pop("cu_seqlens_q", None), options.pop("cu_seqlens_k", None), **options)
    else:
        problem, operands = make(*autocast(q, k, v), layout=layout, **options)
    return plan(problem, operands, backend)


def _of_packed(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *, max_seqlen_q: int | None = None,
               max_seqlen_k: int | None = None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
               check: bool = False, **options) -> tuple[Problem, Operands]:
    """The problem of packed or nested sequences."""
    where, *packed = _packed_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
                                  seqused_q=seqused_q, seqused_k=seqused_k, check=check)
    return make_unequal(where, *map(_heads_first, packed), **options)


def _packed_rows(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *, max_seqlen_q: int | None,
                 max_seqlen_k: int | None, seqused_q: Tensor | None, seqused_k: Tensor | None,
                 check: bool) -> tuple[Layout, Tensor, Tensor, Tensor]:
    """Where packed or nested sequences lie; q, k and v packed."""
    if isinstance(q, Tensor) and q.is_nested:
        for name, given in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if given is not None:
                raise ValueError(f"{name}: expected None with nested tensors, which know their lengths")
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor) or not x.is_nested:
                raise TypeError(f"{name}: expected a nested tensor like q, got {type(x).__name__}")
        given_k, given_v = k, v
        (q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k), (v, cu_seqlens_v, _) = map(
            from_nested, (q, k, v), "qkv")
        if given_k.offsets() is not given_v.offsets() and not torch.equal(cu_seqlens_k, cu_seqlens_v):
            raise ValueError("v: expected a nested tensor with k's lengths")
    elif cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    q, k, v = (_packed(name, x) for name, x in zip("qkv", autocast(q, k, v), strict=True))
    q_rows, longest_q = packed_rows("q", cu_seqlens_q, seqused_q, q.shape[0], max_seqlen_q, q.device, check)
    k_rows, longest_k = packed_rows("k", cu_seqlens_k, seqused_k, k.shape[0], max_seqlen_k, q.device, check)
    if len(q_rows) != len(k_rows):
        raise ValueError(f"cu_seqlens_k: expected as many sequences as cu_seqlens_q ({len(q_rows)}), got {len(k_rows)}")
    return Layout(q_rows, k_rows, max_seqlen_q=longest_q, max_seqlen_k=longest_k), q, k, v


def _of_cache(q: Any, cache: Any, k_new: Tensor | None, *, cache_batch_idx: Any = None, cu_seqlens_q: Tensor | None = None,
              max_seqlen_q: int | None = None, check: bool = False, extended: bool = False,
              **options) -> tuple[Problem, Operands]:
    """The problem of queries and a cache, as it will be once k_new is appended."""
    _check_cache(cache)
    given = Options(**options)
    stored = cache.stored(cache_batch_idx, check=check)
    where = _in_cache(q, cache, stored, k_new, given, cu_seqlens_q, max_seqlen_q, check, extended)
    return calls.described(q, stored.k, stored.v, given, where)


def _in_cache(q: Any, cache: Any, stored: Stored, k_new: Tensor | None, options: Options, cu_seqlens_q: Tensor | None,
              max_seqlen_q: int | None, check: bool, extended: bool) -> Layout:
    """Where the sequences of a cache lie, as they will once k_new is appended; nothing is written yet."""
    q_rows, longest_q = None, 0
    if cu_seqlens_q is None:
        if not isinstance(q, Tensor) or q.dim() != 4 or q.shape[0] != len(stored.rows):
            got = list(q.shape) if isinstance(q, Tensor) else type(q).__name__
            raise ValueError(f"q: expected [B, S_q, heads, head_dim] with B = {len(stored.rows)} sequences, or packed "
                             f"sequences with cu_seqlens_q, got {got}")
    else:
        q = _packed("q", q)
        q_rows, longest_q = packed_rows("q", cu_seqlens_q, None, q.shape[0], max_seqlen_q, q.device, check)
        if len(q_rows) != len(stored.rows):
            raise ValueError(f"cu_seqlens_q: expected {len(stored.rows)} sequences, got {len(q_rows)}")
    longest, lowest = stored.longest, 0
    new: Any = 0
    if k_new is not None and isinstance(k_new, Tensor) and k_new.dim() == (4 if q_rows is None else 3):
        new = k_new.shape[1] if q_rows is None else q_rows[:, 2]
    capacity = cache.capacity if isinstance(cache, KVCache) else cache.block_table.shape[1] * cache.page_size
    if stored.lengths and q_rows is None:
        longest, lowest = max(stored.lengths) + new, min(0, min(stored.lengths) + new - q.shape[1])
    elif cache.device.type == "cpu" and len(stored.rows):
        keys = stored.rows[:, 2] + new
        longest = int(keys.max())
        lowest = min(0, int((keys - (q.shape[1] if q_rows is None else q_rows[:, 2])).min()))
    elif not extended:
        longest = min(longest + (new if isinstance(new, int) else longest_q), capacity)
    if cache.device.type == "cpu" and not options.as_long_as_keys():    # any bound will do: one problem for many steps
        longest = steps.bound(longest, capacity)
    if q.dtype != cache.dtype and stored.k_scale is None:
        raise TypeError(f"q: expected the cache's dtype {cache.dtype}, got {q.dtype}")
    return Layout(q_rows, stored.rows, stored.pages, stored.k_scale, stored.v_scale, longest_q, longest, cached=True,
                  shared=cache.v_in_k, lowest=lowest)


def _appended(q: Any, cache: Any, k_new: Any, v_new: Any, options: Options, backend: str, rotary: Rotary | None, extended: bool,
              cache_batch_idx: Any, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None, check: bool,
              prefix: bool = False) -> tuple[Found, Operands]:
    """What is known of the call after the new keys are written, and its operands. Everything is checked before."""
    _check_cache(cache)
    if torch._C._is_any_autocast_enabled():
        q, k_new, v_new = (x if x is None else autocast(x)[0] for x in (q, k_new, v_new))
    _check_inference(q=q, k_new=k_new, v_new=v_new)
    stored = cache.stored(cache_batch_idx, check=check)
    where = _in_cache(q, cache, stored, k_new, options, cu_seqlens_q, max_seqlen_q, check, extended)
    found, x = calls.find_any(q, stored.k, stored.v, options, backend, where)
    if torch.is_grad_enabled():
        _check_inference(bias=x.bias, sinks=x.sinks, **{f"captured tensor {list(t.shape)}": t for t in x.captured})
    score = found.problem.graphs.score if prefix else None
    if score is not None and leaves(score) & {"b", "q", "k", "nq", "nk"}:
        raise ValueError("score_mod: expected a function of the score and the head alone with a shared prefix")
    if k_new is None:
        for name, given in (("v_new", v_new), ("rotary", rotary)):
            if given is not None:
                raise ValueError(f"{name}: expected None without k_new")
        return found, x
    how: dict[str, Any] = dict(cu_seqlens=cu_seqlens_q, q=q, rotary=rotary, check=check,
                               writer=backends.load(found.backend).write)
    if isinstance(cache, PagedKVCache):
        turned: Any = cache.append(k_new, v_new, sequences=cache_batch_idx, extended=extended, **how)
    else:
        turned = cache.append_to(stored, k_new, v_new, cache_batch_idx=cache_batch_idx, **how)
    if turned is not q:                 # turned to its positions, it may lie in another way
        found, again = calls.find_any(turned, stored.k, stored.v, options, found.backend, where)
        x = again._replace(rng=x.rng)
    stored = cache.stored(cache_batch_idx)
    return found, x._replace(k_rows=stored.rows, pages=stored.pages)


def _as_given(state: AttentionState, packed: bool, return_lse: bool, found: Statistics | None = None) -> Any:
    """out, and lse, in the shapes of the caller's q."""
    out, lse = (state.out[0], state.lse[0]) if packed else (state.out, state.lse)
    if found is not None and packed:
        max_score, entropy = (None if x is None else x[0] for x in found[:2])
        found = Statistics(max_score, entropy, found.key_mass)
    return _results(out.transpose(-3, -2), lse, found, return_lse)


def _results(out: Tensor, lse: Tensor | None, found: Statistics | None, return_lse: bool) -> Any:
    """What a call returns: out alone, or a tuple."""
    if found is None:
        return (out, lse) if return_lse else out
    return (out, lse, found) if return_lse else (out, found)


def _check_cache(cache: Any) -> None:
    if not isinstance(cache, (KVCache, PagedKVCache)):
        raise TypeError(f"cache: expected a KVCache or a PagedKVCache, got {type(cache).__name__}")


def _check_prefix(k: Any, v: Any, q: Any, cache: Any, sinks: Any, rotary: Any) -> None:
    _check_cache(cache)
    check_tensor("q", q, (*["B"] * (q.dim() - 2), "H", cache.head_dim), DTYPES, cache.device)
    check_tensor("prefix_k", k, ("S_p", cache.kv_heads, cache.head_dim), (q.dtype,), cache.device)
    check_tensor("prefix_v", v, (len(k), cache.kv_heads, cache.head_dim_v), (q.dtype,), cache.device)
    if sinks is not None:
        check_tensor("sinks", sinks, (q.shape[-2],), DTYPES, cache.device)
    if rotary is not None and (not isinstance(rotary, Rotary) or rotary.max_position <= len(k)):
        got = f"{rotary.max_position}" if isinstance(rotary, Rotary) else type(rotary).__name__
        raise ValueError(f"rotary: expected a Rotary of more positions than the prefix has keys ({len(k)}), got {got}")



def _packed(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() != 3:
        got = f"{x.dim()} dimensions {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected packed sequences [total, heads, head_dim], got {got}")
    return x


def _heads_first(x: Tensor) -> Tensor:
    """[slots, heads, rows, head_dim] of [B, S, heads, head_dim] or of packed sequences."""
    return x.transpose(1, 2) if x.dim() == 4 else x.transpose(0, 1)[None]


def _check_inference(**tensors: Tensor | None) -> None:
    for name, x in tensors.items() if torch.is_grad_enabled() else ():
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(f"{name}: expected no gradient, since a cache is for inference: call it under torch.no_grad() or "
                             "torch.inference_mode(), or use tw.attention")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """fp32 tensors in the autocast dtype, where autocast is on for their device."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in tensors)


# What torch.compiler.disable does, without importing the compiler: torch.compile calls these as they are, with all they call,
# and goes on behind them. A cache is written to, and what is written where is decided on the host.
for opaque in (attention_with_kv_cache, cascade_attention):
    vars(opaque)["_torchdynamo_disable"] = True
    vars(opaque)["_torchdynamo_disable_msg"] = "it writes to a cache; torch.compile without fullgraph=True calls it as it is"
    if hasattr(frames, "_FrameExecStrategy"):  # without it, compiling takes longer
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(opaque.__code__, skip)
