"""Keys and values of sequences that grow: where they lie, and how new ones get there. No attention arithmetic.

    cache = KVCache(batch=2, capacity=4096, kv_heads=8, head_dim=128)
    q = cache.append(k_new, v_new, q=q, rotary=rotary)    # k_new, v_new: [B, S_new, H_kv, D]

Backends read a cache through `Stored` and may replace `write` by a kernel; both speak of [slots, heads, rows, head_dim]
whatever the order in memory. A sequence of n keys lies in rows first to first + n - 1 of its slot, or in its pages
(`paged_cache.py`).

Lengths live on the device, and no call waits for it: what depends on their values is checked on the CPU always, elsewhere with
check=True. Without that check, tokens that do not fit are not written and the length stops at the capacity. What memory holds
beyond the lengths has no meaning. No gradient flows into a cache.
"""
from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.fp8 import FP8, LARGEST
from tilewise.rotary import Rotary

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


class Stored(NamedTuple):
    """Where the keys and values of the sequences of one call lie."""
    k: Tensor               # [slots, H_kv, rows, D], or [pages, H_kv, page_size, D]; a strided view, last dim contiguous
    v: Tensor               # the same with D_v; where v is a prefix of k (MLA), a view of k
    rows: Tensor            # int32 [B, 3] on the device: slot, first row, number of keys stored
    pages: Tensor | None    # int32 [B, n]: the sequence's pages in order (slot and first row are then 0); None: contiguous
    k_scale: Tensor | None  # fp32 [H_kv]: stored value * scale = key (fp8 storage only)
    v_scale: Tensor | None
    longest: int            # an upper bound, known to the host, of the keys of any sequence
    room: Tensor | None = None  # int64 [B]: keys that each has memory for, where fewer than its pages hold
    lengths: list[int] | None = None    # of rows, where the host knows them

    def limits(self) -> Tensor:
        """int64 [B]: how many keys each sequence has memory for."""
        if self.room is not None:
            return self.room
        if self.pages is None:
            return self.k.shape[2] - self.rows[:, 1].long()
        return self.rows.new_full((len(self.rows),), self.pages.shape[1] * self.k.shape[2], dtype=torch.int64)


Writer = Callable[[Stored, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Rotary | None], Tensor | None]


def write(stored: Stored, new: Tensor, k_new: Tensor, v_new: Tensor | None, q: Tensor | None, q_rows: Tensor | None,
          rotary: Rotary | None) -> Tensor | None:
    """Writes new tokens behind those stored and returns q, rotated if there is a rotary: the definition, in torch operations.

    stored: `rows[:, 2]` are the lengths before; k_new, v_new, q: [slots, H, rows, D], v_new None where v is a prefix of k;
    new, q_rows: int32 [B, 3]: slot, first row and count of each sequence in k_new and in q.
    Token t of a sequence of n keys becomes key n + t. With rotary, it turns to position n + t before it is rounded to the
    cache's dtype, and query i of S_q turns to position n' - S_q + i, n' counting the new keys; rows of q that belong to no
    sequence are copied. Tokens that find no memory are not written.
    """
    if not len(new):
        return q
    limits = stored.limits()
    sequence, token, owned = _owners(new, k_new)
    position = stored.rows[:, 2].long()[sequence] + token
    fits = owned & (position < limits[sequence])
    k_new = k_new.detach().float() if stored.k.dtype == FP8 else k_new.detach()
    if rotary is not None:
        k_new = rotary.rotate(k_new, torch.where(fits, position, 0)[:, None])
    if position.numel():
        slot, row, fits = _places(stored, sequence, position, fits)
        _put(stored.k, stored.k_scale, k_new, slot, row, fits)
        if v_new is not None:
            _put(stored.v, stored.v_scale, v_new.detach(), slot, row, fits)
    if q is None or q_rows is None or rotary is None:
        return q
    keys = torch.minimum(stored.rows[:, 2] + new[:, 2], limits)
    sequence, query, owned = _owners(q_rows, q)
    position = (keys - q_rows[:, 2])[sequence] + query
    return torch.where(owned[:, None, :, None], rotary.rotate(q, torch.where(owned, position, 0)[:, None]), q)


def _owners(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of x [slots, H, length, D]: its sequence, its number inside it, and whether there is one; [slots, length].

    rows: [B, 3], B >= 1: slot, first row, count; they do not overlap.
    """
    slots, length = x.shape[0], x.shape[2]
    starts = rows[:, 0].long() * length + rows[:, 1]
    starts, order = torch.where(rows[:, 2] > 0, starts, slots * length).sort()
    flat = torch.arange(slots * length, device=x.device).view(slots, length)
    before = torch.searchsorted(starts, flat, right=True) - 1
    at = before.clamp(min=0)
    sequence, index = order[at], flat - starts[at]
    return sequence, index, (before >= 0) & (index < rows[:, 2].long()[sequence])


def _places(stored: Stored, sequence: Tensor, position: Tensor, fits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slot and row in memory of keys at these positions, and which of them may be written: those that fit in a valid slot."""
    if stored.pages is None:
        slot, row = stored.rows[:, 0].long()[sequence], stored.rows[:, 1].long()[sequence] + position
    else:
        page_size = stored.k.shape[2]
        column = torch.where(fits, position, 0) // page_size
        slot, row = stored.pages[sequence, column].long(), position % page_size
    return slot, row, fits & (slot >= 0) & (slot < stored.k.shape[0])


def _put(memory: Tensor, scale: Tensor | None, x: Tensor, slot: Tensor, row: Tensor, wanted: Tensor) -> None:
    """memory[slot, :, row] = x, [slots, H, length, D], for the rows wanted [slots, length]."""
    x = x.transpose(1, 2).flatten(0, 1)
    if scale is not None:
        x = x.float() / scale[:, None]
        x = torch.where(x.isinf(), torch.nan, x.clamp(-LARGEST, LARGEST))    # fp8 has no infinities
    x, slot, row, wanted = x.to(memory.dtype), slot.flatten(), row.flatten(), wanted.flatten()
    # To drop rows one has to know how many, and wait. Instead those not wanted repeat one that is; if none is, what lies
    # at one place is written back there.
    some, one = wanted.any(), wanted.int().argmax(0, keepdim=True)
    spare_slot, spare_row = torch.where(some, slot[one], 0), torch.where(some, row[one], 0)
    spare = torch.where(some, x[one], memory[spare_slot, :, spare_row])
    slot, row = torch.where(wanted, slot, spare_slot), torch.where(wanted, row, spare_row)
    memory[slot, :, row] = torch.where(wanted[:, None, None], x, spare)


class NewTokens(NamedTuple):
    """The tokens of one append, checked, as `write` takes them; [slots, H, rows, D], packed tokens in one slot."""
    rows: Tensor               # int32 [B, 3]: slot, first row, count
    k: Tensor
    v: Tensor | None
    q: Tensor | None
    q_rows: Tensor | None
    counts: list[int] | None   # of each sequence, where the host knows them
    packed: bool


class Storage:
    """Memory for keys and values, k [slots, rows, H_kv, D] and v [slots, rows, H_kv, D_v], and the lengths of the sequences.

    lengths: int32, one per sequence, on the device. v_in_k: v is a prefix of k's last dimension and not written by itself.
    """
    k: Tensor
    v: Tensor
    lengths: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    v_in_k: bool

    def _take(self, k: Tensor, v: Tensor, v_in_k: bool, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
        self.k, self.v, self.v_in_k = k, v, v_in_k
        if v_in_k and v_scale is not None:
            raise ValueError("v_scale: expected None where v is a prefix of k, whose scale is v's too, got a tensor")
        self.k_scale = self._scale("k_scale", k_scale)
        self.v_scale = self.k_scale if self.v_in_k else self._scale("v_scale", v_scale)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.v_in_k:  # pickle makes two of tensors that share memory
            self.v = self.k[..., :self.head_dim_v]

    def _scale(self, name: str, scale: Tensor | None) -> Tensor | None:
        if self.dtype != FP8:
            if scale is not None:
                raise ValueError(f"{name}: expected None: only float8_e4m3fn is stored with a scale, not {self.dtype}")
            return None
        if scale is None:
            return torch.ones(self.kv_heads, device=self.device)
        check_tensor(name, scale, (self.kv_heads,), (torch.float32,), self.device)
        return scale

    kv_heads = property(lambda self: self.k.shape[2])
    head_dim = property(lambda self: self.k.shape[3])
    head_dim_v = property(lambda self: self.v.shape[3])
    dtype = property(lambda self: self.k.dtype)
    device = property(lambda self: self.k.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values there is room for."""
        return self.k.nbytes + (0 if self.v_in_k else self.v.nbytes)

    def _describe(self) -> str:
        prefix = " (a prefix of k)" if self.v_in_k else ""
        return (f"kv_heads={self.kv_heads}, head_dim={self.head_dim}, head_dim_v={self.head_dim_v}{prefix}, {self.dtype}, "
                f"{self.device}")

    def _readable(self, check: bool) -> bool:
        """Whether to look at values that lie on the device."""
        return check or self.device.type == "cpu"

    def _tokens(self, batch: int, k_new: Tensor, v_new: Tensor | None, cu_seqlens: Tensor | None, q: Tensor | None,
                check: bool) -> NewTokens:
        """Checks the new tokens of `batch` sequences, everything but what depends on the lengths."""
        dtypes = FLOATS if self.dtype == FP8 else (self.dtype,)
        packed = cu_seqlens is not None
        check_tensor("k_new", k_new, (*(("total",) if packed else (batch, "S_new")), self.kv_heads, self.head_dim), dtypes,
                     self.device)
        rows = k_new.shape[:-2]
        if self.v_in_k == (v_new is not None):
            expected = "None: v is a prefix of k" if self.v_in_k else "a tensor like k_new"
            raise ValueError(f"v_new: expected {expected}, got {'a tensor' if self.v_in_k else None}")
        if v_new is not None:
            check_tensor("v_new", v_new, (*rows, self.kv_heads, self.head_dim_v), (k_new.dtype,), self.device)
        if q is not None:
            check_tensor("q", q, (*(rows if packed else (batch, "S_q")), "H", self.head_dim), (k_new.dtype,), self.device)
        counts: list[int] | None = batch * [rows[-1]]
        if cu_seqlens is None:
            new, q_rows = _all_rows(k_new), None if q is None else _all_rows(q)
        else:
            new, counts = self._packed_rows(cu_seqlens, batch, rows[0], check)
            q_rows = None if q is None else new
            k_new, v_new, q = k_new[None], None if v_new is None else v_new[None], None if q is None else q[None]
        v_new, q = (None if x is None else x.transpose(1, 2) for x in (v_new, q))
        return NewTokens(new, k_new.transpose(1, 2), v_new, q, q_rows, counts, packed)

    def _packed_rows(self, cu_seqlens: Tensor, batch: int, total: int, check: bool) -> tuple[Tensor, list[int] | None]:
        device = cu_seqlens.device if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type == "cpu" else self.device
        check_tensor("cu_seqlens", cu_seqlens, (batch + 1,), INTEGERS, device)
        counts = None
        if check or device.type == "cpu":
            bounds = cu_seqlens.tolist()
            counts = [end - start for start, end in itertools.pairwise(bounds)]
            if bounds[0] != 0 or min(counts, default=0) < 0 or bounds[-1] > total:
                raise ValueError(f"cu_seqlens: expected values that start at 0, never decrease and end at most at the total "
                                 f"{total}, got {bounds}")
            if device != self.device:
                cu_seqlens = upload(bounds, self.device)
        starts = cu_seqlens[:-1]
        return torch.stack([torch.zeros_like(starts), starts, cu_seqlens[1:] - starts], -1).int(), counts

    def _check_rotary(self, rotary: Rotary | None, tokens: NewTokens, stored: Stored, check: bool) -> None:
        if rotary is None:
            return
        if not isinstance(rotary, Rotary):
            raise TypeError(f"rotary: expected a Rotary or None, got {type(rotary).__name__}")
        if self.v_in_k:
            raise ValueError("rotary: expected None where v is a prefix of k, which would turn too: rotate k_new and q before")
        if rotary.cos.device != self.device:
            raise ValueError(f"rotary: expected tables on {self.device}, got {rotary.cos.device}")
        if rotary.rotary_dim > self.head_dim:
            raise ValueError(f"rotary: expected a rotary_dim of at most head_dim {self.head_dim}, got {rotary.rotary_dim}")
        if self._readable(check) and len(stored.rows):
            shortest, longest = (int(n) for n in (stored.rows[:, 2] + tokens.rows[:, 2]).aminmax())
            if longest > rotary.max_position:
                raise ValueError(f"rotary: expected tables for {longest} positions, got {rotary.max_position}")
            if tokens.q is not None and not tokens.packed and tokens.q.shape[2] > shortest:
                raise ValueError(f"q: expected at most as many queries as the sequence then has keys ({shortest}), "
                                 f"got {tokens.q.shape[2]}")

    def _write(self, stored: Stored, index: Tensor, tokens: NewTokens, q: Tensor | None, rotary: Rotary | None,
               writer: Writer) -> Tensor | None:
        """Writes, advances the lengths of the sequences `index`, and returns q, rotated, in the caller's layout."""
        turned = writer(stored, tokens.rows, tokens.k, tokens.v, tokens.q, tokens.q_rows, rotary)
        if stored.lengths is not None:  # then it was checked that all find room
            self.lengths.index_add_(0, index, tokens.rows[:, 2])
        else:
            self.lengths.index_copy_(0, index, torch.minimum(stored.rows[:, 2] + tokens.rows[:, 2], stored.limits()).int())
        if turned is None or rotary is None:
            return q
        return turned.transpose(1, 2)[0] if tokens.packed else turned.transpose(1, 2)


class KVCache(Storage):
    """Keys and values of a fixed number of sequences, each with a slot of its own.

    k: [batch, capacity, H_kv, D]; v: [batch, capacity, H_kv, D_v], with v_in_k a view of k's first D_v entries (multi-head
    latent attention); lengths: int32 [batch], how many keys are stored, left padding not counted.
    dtype: float16, bfloat16, float32, float64, or float8_e4m3fn, which k_scale and v_scale, fp32 [H_kv], scale (default 1):
    stored = key / scale, saturating; infinities become NaN. left_padding: int32 [batch], rows before a sequence's first key.
    """
    left_padding: Tensor | None
    slots: Tensor | None                # of each sequence, where the caller chose them (`wrap`); None: all in order

    def __init__(self, batch: int, capacity: int, kv_heads: int, head_dim: int, *, head_dim_v: int | None = None,
                 dtype: torch.dtype = torch.bfloat16, device=None, v_in_k: bool = False, k_scale: Tensor | None = None,
                 v_scale: Tensor | None = None, left_padding: Tensor | None = None):
        check_sizes(batch=batch, capacity=capacity)
        k, v = allocate(batch, capacity, kv_heads, head_dim, head_dim_v, dtype, device, v_in_k)
        self._take(k, v, v_in_k, k_scale, v_scale)
        self._count(torch.zeros(batch, dtype=torch.int32, device=k.device), left_padding)

    @classmethod
    def wrap(cls, k: Tensor, v: Tensor, lengths: Tensor, *, slots: Tensor | None = None, left_padding: Tensor | None = None,
             k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> KVCache:
        """A cache in the caller's tensors, written in place: k [batch, capacity, H_kv, D], v likewise, lengths int32 [batch].

        Where v is k[..., :D_v], it is taken for a prefix of k (v_in_k).
        slots: integer tensor [B]: there are B sequences, b lies in k[slots[b]], and lengths, left_padding and cache_batch_idx
        are about sequences. Several may read one slot; those that are written to have each its own.
        """
        cache = cls.__new__(cls)
        cache._take(k, v, check_memory(k, v, "batch", "capacity"), k_scale, v_scale)
        cache._count(lengths, left_padding, slots)
        return cache

    def _count(self, lengths: Tensor, left_padding: Tensor | None, slots: Tensor | None = None) -> None:
        if slots is not None:
            check_tensor("slots", slots, ("B",), INTEGERS, self.device)
            if self._readable(check=False):
                check_values("slots", slots, self.k.shape[0] - 1)
        self.slots = slots
        check_tensor("lengths", lengths, (self.batch,), (torch.int32,), self.device)
        if left_padding is not None:
            check_tensor("left_padding", left_padding, (self.batch,), (torch.int32,), self.device)
        self.lengths, self.left_padding = lengths, left_padding
        if self._readable(check=False):
            first = self._first(slice(None))
            check_values("left_padding", first, self.capacity)
            check_values("lengths", lengths, self.capacity - first)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.k.shape[0] if self.slots is None else self.slots.shape[0]

    @property
    def capacity(self) -> int:
        """Rows of a slot: the most keys of a sequence, left padding included."""
        return self.k.shape[1]

    def __repr__(self) -> str:
        return f"KVCache(batch={self.batch}, capacity={self.capacity}, {self._describe()})"

    def stored(self, cache_batch_idx: Tensor | None = None, *, check: bool = False) -> Stored:
        """What a backend reads. cache_batch_idx: integer tensor [B] of sequences; None: all in order."""
        if cache_batch_idx is None and self.slots is None and self.left_padding is None and self._readable(check=False):
            rows, counts = _in_order(self.batch, 0).clone(), self.lengths.tolist()
            rows[:, 2] = self.lengths
            return Stored(self.k.transpose(1, 2), self.v.transpose(1, 2), rows, None, self.k_scale, self.v_scale,
                          max(counts, default=0), lengths=counts)
        index = self._sequences(cache_batch_idx, check)
        lengths = self.lengths[index]
        known: list[int] | None = lengths.tolist() if self._readable(check=False) else None
        longest = self.capacity if known is None else max(known, default=0)
        rows = torch.stack([self._slots(index).int(), self._first(index), lengths], -1)
        return Stored(self.k.transpose(1, 2), self.v.transpose(1, 2), rows, None, self.k_scale, self.v_scale, longest,
                      lengths=known)

    def append(self, k_new: Tensor, v_new: Tensor | None = None, *, cache_batch_idx: Tensor | None = None,
               cu_seqlens: Tensor | None = None, q: Tensor | None = None, rotary: Rotary | None = None, check: bool = False,
               writer: Writer = write) -> Tensor | None:
        """Writes new keys and values behind those present, advances the lengths, returns q (rotated, if there is a rotary).

        k_new: [B, S_new, H_kv, D], or packed [total, H_kv, D] with cu_seqlens int32 [B + 1] on the cache's device or the CPU;
        v_new: likewise with D_v, None with v_in_k; q: [B, S_q, H, D], or packed by the same cu_seqlens.
        cache_batch_idx: integer tensor [B] of sequences, each once; None: all in order.
        Positions: `write`. Raises before anything is written.
        """
        return self.append_to(self.stored(cache_batch_idx, check=check), k_new, v_new, cache_batch_idx=cache_batch_idx,
                              cu_seqlens=cu_seqlens, q=q, rotary=rotary, check=check, writer=writer)

    def append_to(self, stored: Stored, k_new: Tensor, v_new: Tensor | None, *, cache_batch_idx: Tensor | None,
                  cu_seqlens: Tensor | None, q: Tensor | None, rotary: Rotary | None, check: bool,
                  writer: Writer) -> Tensor | None:
        """`append` for one who has just asked what is `stored` of these sequences."""
        index = self._sequences(cache_batch_idx, check)
        tokens = self._tokens(len(index), k_new, v_new, cu_seqlens, q, check)
        if self._readable(check):
            if cache_batch_idx is not None or self.slots is not None:
                check_distinct("cache_batch_idx" if self.slots is None else "slots", self._slots(index).tolist())
            check_room(index, stored, tokens)
        self._check_rotary(rotary, tokens, stored, check)
        return self._write(stored, index, tokens, q, rotary, writer)

    def truncate(self, lengths: Tensor, cache_batch_idx: Tensor | None = None, *, check: bool = False) -> None:
        """Forgets the last tokens: sequences keep their first lengths [B] (integers) keys; never more than are present."""
        index = self._sequences(cache_batch_idx, check)
        check_tensor("lengths", lengths, (len(index),), INTEGERS, self.device)
        present = self.lengths[index]
        if self._readable(check):
            check_values("lengths", lengths, present)
        self.lengths.index_copy_(0, index, torch.minimum(lengths.clamp(min=0), present).int())

    def reset(self) -> None:
        """Forgets all keys."""
        self.lengths.zero_()

    def _first(self, index) -> Tensor:
        return (torch.zeros_like(self.lengths) if self.left_padding is None else self.left_padding)[index]

    def _slots(self, index: Tensor) -> Tensor:
        return index if self.slots is None else self.slots[index]

    def _sequences(self, cache_batch_idx: Tensor | None, check: bool) -> Tensor:
        if cache_batch_idx is None:
            return torch.arange(self.batch, device=self.device)
        check_tensor("cache_batch_idx", cache_batch_idx, ("B",), INTEGERS, self.device)
        if self._readable(check):
            check_values("cache_batch_idx", cache_batch_idx, self.batch - 1)
        return cache_batch_idx.long()


def allocate(slots: int, rows: int, kv_heads: int, head_dim: int, head_dim_v: int | None, dtype: torch.dtype, device,
             v_in_k: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised k [slots, rows, kv_heads, head_dim], and v the same or a view of k."""
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    check_sizes(kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim_v)
    if dtype not in (*FLOATS, FP8):
        raise TypeError(f"dtype: expected {_names((*FLOATS, FP8))}, got {dtype}")
    if v_in_k and head_dim_v > head_dim:
        raise ValueError(f"head_dim_v: expected at most head_dim {head_dim} with v_in_k, got {head_dim_v}")
    k = torch.empty(slots, rows, kv_heads, head_dim, dtype=dtype, device=device)
    return k, k[..., :head_dim_v] if v_in_k else k.new_empty(slots, rows, kv_heads, head_dim_v)


def check_memory(k: Tensor, v: Tensor, slots: str, rows: str) -> bool:
    """Checks a caller's k [slots, rows, H_kv, D] and v; whether v is a prefix of k."""
    check_tensor("k", k, (slots, rows, "H_kv", "D"), (*FLOATS, FP8), None)
    check_tensor("v", v, (*k.shape[:3], "D_v"), (k.dtype,), k.device)
    if min(k.numel(), v.numel()) == 0:
        raise ValueError(f"k, v: expected no dimension of size 0, got {list(k.shape)} and {list(v.shape)}")
    return v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and v.shape[3] <= k.shape[3]


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 on the device, without waiting for it."""
    host = torch.tensor(values, dtype=torch.int64, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def check_tensor(name: str, x, shape: Sequence[int | str], dtypes: Sequence[torch.dtype],
                 device: torch.device | None) -> None:
    """Raises TypeError or ValueError. shape: sizes, and names where any size will do; device None: any."""
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {_names(dtypes)}, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {x.device}")
    if x.dim() != len(shape) or any([want != size for want, size in zip(shape, x.shape, strict=True) if isinstance(want, int)]):
        raise ValueError(f"{name}: expected [{', '.join(map(str, shape))}], got {list(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: expected a contiguous last dimension (stride 1), got stride {x.stride(-1)}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for a size that is not an integer >= 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")


def check_values(name: str, x: Tensor, highest: Tensor | int) -> None:
    """Raises ValueError unless 0 <= x <= highest, elementwise; reads the device."""
    wrong = (x < 0) | (x > highest)
    if wrong.any():
        at = int(wrong.int().argmax())
        limit = highest if isinstance(highest, int) else int(highest[at])
        raise ValueError(f"{name}: expected values from 0 to {limit}, got {int(x[at])} at index {at}")


def check_room(numbers: Tensor, stored: Stored, tokens: NewTokens) -> None:
    """Raises ValueError if a sequence [B] has less memory left than it gets tokens; reads the device."""
    if stored.lengths is not None and tokens.counts is not None and stored.pages is None:
        firsts = stored.rows[:, 1].tolist()
        most = max(map(sum, zip(firsts, stored.lengths, tokens.counts, strict=True)), default=0)
        if most <= stored.k.shape[2]:
            return
    columns = numbers, stored.rows[:, 2], stored.limits(), tokens.rows[:, 2]
    for number, length, limit, count in zip(*(x.tolist() for x in columns), strict=True):
        if length + count > limit:
            raise ValueError(f"k_new: expected at most {limit - length} tokens for sequence {number} (length {length}, "
                             f"capacity {limit}, left padding not counted), got {count}")


def check_distinct(name: str, values: Sequence[int]) -> None:
    """Raises ValueError if a sequence is named twice."""
    if len(set(values)) < len(values):
        repeated = next(value for value in values if values.count(value) > 1)
        raise ValueError(f"{name}: expected each sequence once, got {repeated} twice")


def _all_rows(x: Tensor) -> Tensor:
    """[B, 3] of x [B, S, H, D]: every sequence has all rows of its own slot."""
    if x.device.type == "cpu":
        return _in_order(len(x), x.shape[1])
    slots = torch.arange(len(x), device=x.device, dtype=torch.int32)
    return torch.stack([slots, torch.zeros_like(slots), torch.full_like(slots, x.shape[1])], -1)


@functools.lru_cache(maxsize=64)
def _in_order(batch: int, count: int) -> Tensor:
    """int32 [B, 3] on the CPU: sequence b has the first `count` rows of slot b. Not to be written to."""
    return torch.tensor([[slot, 0, count] for slot in range(batch)], dtype=torch.int32, device="cpu").view(batch, 3)
