"""New keys and values into a cache in memory: a few copies where there are a few sequences; native in steps like one before."""
from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise import kv_cache
from tilewise.backends.cpu import abi, compiler
from tilewise.kv_cache import KVCache, Stored
from tilewise.paged_cache import PagedKVCache
from tilewise.rotary import Rotary

MOST_COPIES = 16                        # with more, all at once by index takes less time
MOST_BYTES = 1 << 20                    # of new tokens that one thread copies; of more, PyTorch's threads
EMPTY = "||||||"                        # program of a kernel that has no functions
Cache = KVCache | PagedKVCache
Numbers = Tensor | ctypes.Array | None


def write(stored: Stored, new: Tensor, k_new: Tensor, v_new: Tensor | None, q: Tensor | None, q_rows: Tensor | None,
          rotary: Rotary | None) -> Tensor | None:
    """`kv_cache.write`, which serves where numbers have to be computed: turned, scaled, or dropped because memory ends."""
    if rotary is None and stored.k_scale is None and len(new) <= MOST_COPIES:
        copies = list(itertools.islice(places(stored, new), MOST_COPIES + 1))
        whole = [copy for copy in copies if copy is not None]
        if len(whole) == len(copies) <= MOST_COPIES:
            for slot, row, source, first, count in whole:
                stored.k[slot, :, row:row + count] = k_new.detach()[source, :, first:first + count]
                if v_new is not None:
                    stored.v[slot, :, row:row + count] = v_new.detach()[source, :, first:first + count]
            return q
    return kv_cache.write(stored, new, k_new, v_new, q, q_rows, rotary)


def places(stored: Stored, new: Tensor) -> Iterator[tuple[int, int, int, int, int] | None]:
    """(slot and row in memory, slot and row among the new tokens, how many) of each piece; None: not all find memory."""
    slots, size = stored.k.shape[0], stored.k.shape[2]
    limits = None if stored.room is None else stored.room.tolist()
    for b, ((slot, first, length), (source, begin, count)) in enumerate(zip(stored.rows.tolist(), new.tolist(), strict=True)):
        pages = [slot] if stored.pages is None else stored.pages[b].tolist()
        end, done = first + length + count, 0
        if end > (len(pages) * size if limits is None else limits[b]):
            yield None
            return
        while done < count:
            column, row = divmod(first + length + done, size)
            piece = min(count - done, size - row)
            yield (pages[column], row, source, begin + done, piece) if 0 <= pages[column] < slots else None
            done += piece


class Frame(NamedTuple):
    """What one append needs for itself."""
    told: abi.Append
    address: int                        # of `told`
    scratch: Tensor


class Looked(NamedTuple):
    """Where the tokens of one step go."""
    frame: Frame
    rows: Tensor                        # int32 [B, 3]: slot, first row, number of keys once they are written
    order: Tensor | None                # int64 [B]: sequences, those with the most keys first; None: there is one
    longest: int                        # keys, once they are written
    shortest: int


class Append:
    """New tokens into a cache: any cache, tokens and numbers of sequences that lie in memory as these do.

    `look` reads lengths, padding, slots and pages, and writes nothing. Then either `write` writes or `leave` ends it.
    """
    __slots__ = ("capacity", "count", "frames", "look_natively", "order", "page_size", "rows", "scratch", "template",
                 "write_natively")

    def __init__(self, cache: Cache, batch: int, k_new: Tensor | None, v_new: Tensor | None, q: Tensor, turned: Tensor | None,
                 rotary: Rotary | None):
        library = compiler.library("append", EMPTY, ())
        self.look_natively, self.write_natively = library.append_look, library.append_write
        for call in (self.look_natively, self.write_natively):
            call.argtypes = [ctypes.c_void_p]
        self.look_natively.restype = ctypes.c_long
        self.count = 0 if k_new is None else k_new.shape[1]
        itemsize, rows_each = cache.k.itemsize, cache.k.shape[1]
        told = abi.Append(batch=batch, count=self.count, sequences=len(cache.lengths), slots_there=cache.k.shape[0],
                          rows_each=rows_each, kv_heads=cache.kv_heads, bytes=cache.head_dim * itemsize,
                          bytes_v=cache.head_dim_v * itemsize, writes=k_new is not None)
        if rotary is not None:
            told.kind, told.queries, told.heads = abi.KINDS[cache.dtype], *q.shape[1:3]
            told.positions, told.pairs, told.interleaved = *rotary.cos.shape, bool(rotary.interleaved)
            told.cos, told.cos_stride, told.sin_stride = rotary.cos.data_ptr(), rotary.cos.stride(0), rotary.sin.stride(0)
        self.page_size, self.capacity = None, rows_each
        if isinstance(cache, PagedKVCache):
            told.columns, told.table_stride = cache.block_table.shape[1], cache.block_table.stride(0)
            told.table, told.foreign = cache.block_table.data_ptr(), cache.book is None
            self.page_size, self.capacity = rows_each, told.columns * rows_each
        elif cache.slots is not None:
            told.slots_wide = cache.slots.dtype == torch.int64
        for name, x in (("k", cache.k), ("v", cache.v), ("k_new", k_new), ("v_new", v_new), ("q", q), ("turned", turned)):
            if x is not None:
                setattr(told, f"{name}_strides", (ctypes.c_long * 3)(*[stride * itemsize for stride in x.stride()[:3]]))
        self.template, self.scratch = bytes(told), library.append_memory(ctypes.byref(told))
        self.rows = torch.empty((), dtype=torch.int32, device="cpu").expand(batch, 3)      # patterns of what `look` allocates
        self.order = None if batch == 1 else torch.empty((), dtype=torch.int64, device="cpu").expand(batch)
        self.frames: list[Frame] = []

    def look(self, cache: Cache, index: Numbers, of_book: Numbers, extended: bool, k_new: Tensor | None,
             v_new: Tensor | None, rotary: Rotary | None) -> Looked | None:
        """Where tokens go; None: something is not right, as `kv_cache` and `paged_cache` tell.

        index, of_book: int64 [B], the sequences and the lengths that the cache's book holds, or None.
        """
        try:
            frame = self.frames.pop()
        except IndexError:
            frame = self.new_frame()
        told, rows = frame.told, torch.empty_like(self.rows)
        order = None if self.order is None else torch.empty_like(self.order)
        told.k, told.v, told.lengths = cache.k.data_ptr(), cache.v.data_ptr(), cache.lengths.data_ptr()
        told.rows, told.order = rows.data_ptr(), None if order is None else order.data_ptr()
        told.index, told.held, told.extended = address(index), address(of_book), extended
        if k_new is not None:
            told.k_new, told.v_new = k_new.data_ptr(), address(v_new)
        if isinstance(cache, PagedKVCache):
            told.table, told.room = cache.block_table.data_ptr(), address(cache.room)
        else:
            told.slots, told.padding = address(cache.slots), address(cache.left_padding)
        if rotary is not None:
            told.cos, told.sin = rotary.cos.data_ptr(), rotary.sin.data_ptr()
        if not self.look_natively(frame.address):
            self.frames.append(frame)
            return None
        return Looked(frame, rows, order, told.longest, told.shortest)

    def pages(self, looked: Looked) -> Tensor | None:
        """Memory for the sequences' pages, which `write` fills."""
        if self.page_size is None:
            return None
        return torch.empty((len(looked.rows), max(1, -(-looked.longest // self.page_size))), dtype=torch.int32, device="cpu")

    def write(self, cache: Cache, looked: Looked, pages: Tensor | None, q: Tensor, turned: Tensor | None) -> None:
        """Writes the tokens and advances the lengths. turned: where q at its positions goes, with a rotary."""
        told = looked.frame.told
        if pages is not None:
            told.pages, told.pages_row = pages.data_ptr(), pages.shape[1]
        if turned is not None:
            told.q, told.turned = q.data_ptr(), turned.data_ptr()
        self.write_natively(looked.frame.address)
        if self.count:
            torch.autograd.graph.increment_version((cache.k, cache.v, cache.lengths))
        self.frames.append(looked.frame)

    def leave(self, looked: Looked) -> None:
        self.frames.append(looked.frame)

    def new_frame(self) -> Frame:
        told, scratch = abi.Append.from_buffer_copy(self.template), torch.empty(self.scratch, dtype=torch.uint8, device="cpu")
        told.scratch = scratch.data_ptr()
        return Frame(told, ctypes.addressof(told), scratch)


def address(x: Tensor | ctypes.Array | None) -> int | None:
    if x is None:
        return None
    return x.data_ptr() if isinstance(x, Tensor) else ctypes.addressof(x)


def prepared_append(cache: Cache, index: Tensor | None, k_new: Tensor | None, v_new: Tensor | None, q: Tensor,
                    turned: Tensor | None, rotary: Rotary | None) -> Append | None:
    """None: these have to be turned to another dtype, are many, or are told in a way that is seldom."""
    told = (cache.lengths, index, *((cache.block_table, cache.room) if isinstance(cache, PagedKVCache) else
                                    (cache.slots, cache.left_padding)), *(() if rotary is None else (rotary.cos, rotary.sin)))
    if cache.k_scale is not None or any(x is not None and x.stride(-1) != 1 and x.shape[-1] > 1 for x in told):
        return None
    if k_new is not None and (k_new.dtype != cache.dtype or sum(x.nbytes for x in (k_new, v_new, turned) if x is not None)
                              > MOST_BYTES):
        return None
    if not len(q) or (index is not None and index.dtype != torch.int64) or (rotary and rotary.cos.dtype != torch.float32):
        return None
    return Append(cache, len(q), k_new, v_new, q, turned, rotary)
