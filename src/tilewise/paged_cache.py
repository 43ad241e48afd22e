"""Keys and values in pages, so that sequences of any length share one memory, and prefixes are stored once.

    cache = PagedKVCache(pages=1024, page_size=16, kv_heads=8, head_dim=128, max_sequences=64)
    prompt = cache.new()
    cache.append(k_new, v_new, sequences=[prompt])        # takes pages as needed
    answer = cache.fork(prompt)                           # shares all pages; the last is copied once one of the two grows
    cache.free(prompt)

(Kwon et al. 2023, "PagedAttention".) Key i of a sequence lies in row i % page_size of its page number i // page_size.
Which page belongs to whom is decided on the host, in `PageBook`, so no call waits for the device.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kv_cache import (
    INTEGERS,
    NewTokens,
    Storage,
    Stored,
    Writer,
    allocate,
    check_distinct,
    check_memory,
    check_room,
    check_sizes,
    check_tensor,
    check_values,
    upload,
    write,
)
from tilewise.rotary import Rotary


class CacheFull(RuntimeError):
    """There are fewer free pages, or sequences, than asked for. Nothing was changed."""


class Room(NamedTuple):
    """What making room for new tokens changes on the device."""
    entries: list[tuple[int, int, int]]   # of the block table: sequence, number of the page in it, page
    copies: list[tuple[int, int]]         # pages: from, to


class PageBook:
    """Who holds which page: the host's side of a paged cache, plain integers."""

    def __init__(self, pages: int, page_size: int, max_sequences: int, max_pages_per_sequence: int):
        self.page_size, self.capacity = page_size, max_pages_per_sequence * page_size
        self.free_pages = list(range(pages))[::-1]       # the last is taken next
        self.free_sequences = list(range(max_sequences))[::-1]
        self.references = [0] * pages                    # how many sequences hold each page
        self.pages: dict[int, list[int]] = {}            # of each sequence, in order: as many as its length needs
        self.lengths: dict[int, int] = {}

    def new(self, parent: int | None = None) -> int:
        """The number of a new sequence: empty, or holding its parent's pages."""
        if not self.free_sequences:
            raise CacheFull(f"sequences: needed 1, free 0 of {len(self.lengths)}")
        sequence = self.free_sequences.pop()
        self.pages[sequence] = [] if parent is None else self.pages[parent].copy()
        self.lengths[sequence] = 0 if parent is None else self.lengths[parent]
        for page in self.pages[sequence]:
            self.references[page] += 1
        return sequence

    def truncate(self, sequence: int, length: int) -> None:
        """Gives back the pages behind the first `length` keys."""
        held = self.pages[sequence]
        while len(held) > -(-length // self.page_size):
            page = held.pop()
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free_pages.append(page)
        self.lengths[sequence] = length

    def free(self, sequence: int) -> None:
        """Gives back all pages and the number."""
        self.truncate(sequence, 0)
        del self.pages[sequence], self.lengths[sequence]
        self.free_sequences.append(sequence)

    def extend(self, sequences: Sequence[int], counts: Sequence[int]) -> Room:
        """Takes pages for counts[i] more keys of each sequence, and a copy of a shared page that will be written to."""
        needed = 0
        sharers: dict[int, int] = {}
        for sequence, count in zip(sequences, counts, strict=True):
            length = self.lengths[sequence]
            if length + count > self.capacity:
                raise ValueError(f"counts: expected at most {self.capacity - length} tokens for sequence {sequence} (length "
                                 f"{length}, capacity {self.capacity}), got {count}")
            needed += -(-(length + count) // self.page_size) - len(self.pages[sequence])
            if count and length % self.page_size:
                page = self.pages[sequence][-1]
                sharers[page] = sharers.get(page, 0) + 1
        # Of those that share a page, the last to write keeps it.
        needed += sum(min(writers, self.references[page] - 1) for page, writers in sharers.items())
        if needed > len(self.free_pages):
            raise CacheFull(f"pages: needed {needed}, free {len(self.free_pages)} of {len(self.references)}")
        room = Room([], [])
        for sequence, count in zip(sequences, counts, strict=True):
            self._extend(sequence, count, room)
        return room

    def _extend(self, sequence: int, count: int, room: Room) -> None:
        held = self.pages[sequence]
        if count and self.lengths[sequence] % self.page_size and self.references[held[-1]] > 1:
            shared = held.pop()
            self.references[shared] -= 1
            room.copies.append((shared, self._take(sequence, room)))
        self.lengths[sequence] += count
        while len(held) * self.page_size < self.lengths[sequence]:
            self._take(sequence, room)

    def _take(self, sequence: int, room: Room) -> int:
        page = self.free_pages.pop()
        self.references[page] = 1
        room.entries.append((sequence, len(self.pages[sequence]), page))
        self.pages[sequence].append(page)
        return page


class PagedKVCache(Storage):
    """Keys and values in pages of page_size >= 1 rows, for up to max_sequences sequences.

    k: [pages, page_size, H_kv, D]; v likewise with D_v; dtype, scales and v_in_k as in `KVCache`.
    block_table: int32 [max_sequences, max_pages_per_sequence] on the device, a sequence's pages in order, then -1: no page;
    lengths: int32 [max_sequences] on the device. A sequence's number is its row in both.
    book: who holds which page, on the host; None: the pages are managed by the caller (`wrap`).
    For CUDA graphs: sequences as a tensor on the device, and `extend` before every replay.
    """
    block_table: Tensor
    book: PageBook | None
    room: Tensor | None = None          # keys each sequence has memory for, where left padding takes some

    def __init__(self, pages: int, page_size: int, kv_heads: int, head_dim: int, *, max_sequences: int,
                 max_pages_per_sequence: int | None = None, head_dim_v: int | None = None,
                 dtype: torch.dtype = torch.bfloat16, device=None, v_in_k: bool = False, k_scale: Tensor | None = None,
                 v_scale: Tensor | None = None):
        most = pages if max_pages_per_sequence is None else max_pages_per_sequence
        check_sizes(pages=pages, page_size=page_size, max_sequences=max_sequences, max_pages_per_sequence=most)
        k, v = allocate(pages, page_size, kv_heads, head_dim, head_dim_v, dtype, device, v_in_k)
        self._take(k, v, v_in_k, k_scale, v_scale)
        self.block_table = torch.full((max_sequences, most), -1, dtype=torch.int32, device=k.device)
        self.lengths = torch.zeros(max_sequences, dtype=torch.int32, device=k.device)
        self.book = PageBook(pages, page_size, max_sequences, most)

    @classmethod
    def wrap(cls, k: Tensor, v: Tensor, block_table: Tensor, lengths: Tensor, *, left_padding: Tensor | None = None,
             k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> PagedKVCache:
        """A cache in tensors whose pages the caller manages: k [pages, page_size, H_kv, D], v likewise with D_v (k[..., :D_v]:
        a prefix of k), block_table int32 [B, n], lengths int32 [B], advanced in place.

        left_padding: int32 [B], rows before a sequence's first key, not counted in lengths. The cache is then seen in smaller
        pages, of which the padding fills whole ones: of a common divisor's size on the CPU, of one row elsewhere, where nobody
        looks; the rows of a page, and those of the next, must follow each other in memory. Costs 4 bytes for each such page.

        `append` and `stored` check the table on the CPU, elsewhere with check=True: the pages in use, the first
        ceil(length / page_size) of each row, exist and occur once in it, and those written to are in use in no other row.
        """
        cache = cls.__new__(cls)
        cache._take(k, v, check_memory(k, v, "pages", "page_size"), k_scale, v_scale)
        check_tensor("block_table", block_table, ("B", "n"), (torch.int32,), cache.device)
        check_tensor("lengths", lengths, (len(block_table),), (torch.int32,), cache.device)
        if left_padding is not None:
            check_tensor("left_padding", left_padding, (len(block_table),), (torch.int32,), cache.device)
            cache.room = block_table.shape[1] * k.shape[1] - left_padding.long()
            cache.k, cache.v, block_table = _behind(left_padding, k, v, block_table)
        cache.block_table, cache.lengths, cache.book = block_table, lengths, None
        return cache

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def free_pages(self) -> int:
        """How many pages no sequence holds."""
        return len(self._managed("free_pages").free_pages)

    def __repr__(self) -> str:
        return (f"PagedKVCache(pages={len(self.k)}, page_size={self.page_size}, max_sequences={len(self.lengths)}, "
                f"{self._describe()})")

    def length(self, sequence: int) -> int:
        """Number of keys of a sequence, room made by `extend` included."""
        return self._managed("length", sequence).lengths[sequence]

    def new(self) -> int:
        """A new, empty sequence. Raises CacheFull if there are max_sequences already."""
        return self._managed("new").new()

    def fork(self, sequence: int) -> int:
        """A new sequence with the same keys and values, sharing their pages. Raises CacheFull as `new` does."""
        child = self._managed("fork", sequence).new(sequence)
        self.block_table[child].copy_(self.block_table[sequence])
        self.lengths[child].copy_(self.lengths[sequence])
        return child

    def free(self, sequence: int) -> None:
        """Gives back the sequence's pages and its number."""
        self._managed("free", sequence).free(sequence)
        self.block_table[sequence].fill_(-1)
        self.lengths[sequence].zero_()

    def truncate(self, sequence: int, length: int) -> None:
        """Keeps the first `length` keys, gives the pages behind them back."""
        book = self._managed("truncate", sequence)
        if not 0 <= length <= book.lengths[sequence]:
            raise ValueError(f"length: expected 0 to {book.lengths[sequence]} for sequence {sequence}, got {length}")
        book.truncate(sequence, length)
        self.block_table[sequence, len(book.pages[sequence]):].fill_(-1)
        self.lengths[sequence].fill_(length)

    def extend(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Makes room for counts[i] more tokens in each sequence: the host's side of an append.

        A partly filled last page that other sequences hold too is copied. Raises CacheFull or ValueError with nothing changed.
        """
        book = self._managed("extend", *sequences)
        check_distinct("sequences", sequences)
        if len(counts) != len(sequences) or min(counts, default=0) < 0:
            raise ValueError(f"counts: expected {len(sequences)} numbers of tokens >= 0, got {list(counts)}")
        room = book.extend(sequences, counts)
        if room.entries:
            sequence, column, page = upload([x for part in zip(*room.entries, strict=True) for x in part],
                                            self.device).view(3, -1)
            self.block_table[sequence, column] = page.int()
        if room.copies:
            source, target = upload([x for part in zip(*room.copies, strict=True) for x in part], self.device).view(2, -1)
            for memory in (self.k,) if self.v_in_k else (self.k, self.v):
                memory[target] = memory[source]

    def stored(self, sequences: Sequence[int] | Tensor | None = None, *, check: bool = False) -> Stored:
        """What a backend reads. sequences: numbers, as integers or an integer tensor [B], on the CPU or the device; None, where
        the caller manages the pages: all rows.
        """
        numbers, index = self._sequences(sequences, check)
        if self.book is None and self._readable(check):
            self._check_table(index, torch.zeros_like(index))
        return self._stored(numbers, index)

    def append(self, k_new: Tensor, v_new: Tensor | None = None, *, sequences: Sequence[int] | Tensor | None = None,
               cu_seqlens: Tensor | None = None, q: Tensor | None = None, rotary: Rotary | None = None, extended: bool = False,
               check: bool = False, writer: Writer = write) -> Tensor | None:
        """Writes new keys and values behind those present, advances the lengths, returns q (rotated, if there is a rotary).

        sequences: as in `stored`, each once; the other tensors and the positions as in `KVCache.append`.
        extended: `extend` has made room already; needed where sequences or cu_seqlens are on a GPU, since their values decide.
        Raises CacheFull or ValueError before anything is written.
        """
        numbers, index = self._sequences(sequences, check)
        if numbers is not None:
            check_distinct("sequences", numbers)
        tokens = self._tokens(len(index), k_new, v_new, cu_seqlens, q, check)
        stored = self._stored(numbers, index)
        self._check_rotary(rotary, tokens, stored, check)
        if self.book is not None:
            self._make_room(self.book, numbers, index, tokens, extended, check)
        elif self._readable(check):
            check_room(index, stored, tokens)
            self._check_table(index, tokens.rows[:, 2])
        try:
            return self._write(self._stored(numbers, index), index, tokens, q, rotary, writer)
        except BaseException:           # a lack of memory, for instance
            if self.book is not None and not extended and numbers is not None and tokens.counts is not None:
                self.take_back(numbers, tokens.counts)
            raise

    def _managed(self, call: str, *sequences: int) -> PageBook:
        if self.book is None:
            raise ValueError(f"{call}: expected a cache that manages its pages; this one wraps pages that the caller manages")
        for sequence in sequences:
            if sequence not in self.book.lengths:
                raise ValueError(f"{call}: expected the number of a sequence in use, got {sequence!r}")
        return self.book

    def _sequences(self, sequences: Sequence[int] | Tensor | None, check: bool) -> tuple[list[int] | None, Tensor]:
        """Numbers, where the host knows them, and the same as an int64 tensor on the device."""
        if sequences is None:
            if self.book is not None:
                raise ValueError("sequences: expected the numbers of sequences, got None")
            return list(range(len(self.lengths))), torch.arange(len(self.lengths), device=self.device)
        if isinstance(sequences, Tensor):
            check_tensor("sequences", sequences, ("B",), INTEGERS, None if sequences.device.type == "cpu" else self.device)
            if sequences.device.type != "cpu" and not check:
                return None, sequences.long()
            sequences = sequences.tolist()
        numbers = list(sequences)
        known = range(len(self.lengths)) if self.book is None else self.book.lengths
        for number in numbers:
            if number not in known:
                raise ValueError(f"sequences: expected numbers of sequences in use, got {number!r}")
        return numbers, upload(numbers, self.device)

    def _stored(self, numbers: list[int] | None, index: Tensor) -> Stored:
        lengths = self.lengths[index]
        pages, longest = self.block_table, self.block_table.shape[1] * self.page_size
        if self.book is not None and numbers is not None:
            longest = max((self.book.lengths[number] for number in numbers), default=0)
            pages = pages[:, :max(1, -(-longest // self.page_size))]
        elif self.device.type == "cpu":
            longest = max(lengths.tolist(), default=0)
        none = torch.zeros_like(lengths)
        return Stored(self.k.transpose(1, 2), self.v.transpose(1, 2), torch.stack([none, none, lengths], -1), pages[index],
                      self.k_scale, self.v_scale, longest, None if self.room is None else self.room[index])

    def _make_room(self, book: PageBook, numbers: list[int] | None, index: Tensor, tokens: NewTokens, extended: bool,
                   check: bool) -> None:
        if not extended and (numbers is None or tokens.counts is None):
            name = "sequences" if numbers is None else "cu_seqlens"
            raise ValueError(f"{name}: expected values on the CPU, or extend(sequences, counts) before and extended=True, "
                             f"got a tensor on {self.device}")
        if self._readable(check):
            columns = torch.stack([index, self.lengths[index], tokens.rows[:, 2]], -1)
            for number, length, count in columns.tolist():
                made = book.lengths[number] - length
                if made < count if extended else made > 0:
                    raise ValueError(f"extended: expected {not extended}: extend has made room for {made} tokens of sequence "
                                     f"{number}, which gets {count}")
        if not extended:
            assert numbers is not None
            assert tokens.counts is not None
            self.extend(numbers, tokens.counts)

    def take_back(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Undoes an `extend` whose tokens were not written."""
        for number, count in zip(sequences, counts, strict=True):
            self.truncate(number, self.length(number) - count)

    def _check_table(self, index: Tensor, counts: Tensor) -> None:
        """Raises ValueError unless the pages in use exist, once per sequence, and those to be written to are nobody else's."""
        pages, size, table = len(self.k), self.page_size, self.block_table.long()
        added = torch.zeros_like(self.lengths).index_copy_(0, index, counts.int())
        check_values("lengths", self.lengths, table.shape[1] * size if self.room is None else self.room)
        first_written, end = self.lengths // size, (self.lengths + added + size - 1) // size
        column = torch.arange(table.shape[1], device=self.device)
        used = column < end[:, None]
        wrong = used & ((table < 0) | (table >= pages))
        if wrong.any():
            row, at = wrong.nonzero()[0].tolist()
            raise ValueError(f"block_table: expected pages from 0 to {pages - 1} in sequence {row}, got {int(table[row, at])} "
                             f"at entry {at}")
        row_and_page, times = ((torch.arange(len(table), device=self.device)[:, None] * pages + table)[used]
                               .unique(return_counts=True))
        if (times > 1).any():
            row, page = divmod(int(row_and_page[times > 1][0]), pages)
            raise ValueError(f"block_table: expected every page once in a sequence, got page {page} twice in sequence {row}")
        owners = table[used].bincount(minlength=pages)
        shared = used & (column >= first_written[:, None]) & (added > 0)[:, None]
        shared &= owners[table.clamp(0, pages - 1)] > 1
        if shared.any():
            row, at = shared.nonzero()[0].tolist()
            raise ValueError(f"block_table: expected pages that sequence {row} writes to in no other sequence, "
                             f"got page {int(table[row, at])} in several")


def _behind(padding: Tensor, k: Tensor, v: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and table in smaller pages, so that `padding` [B] rows are whole pages, and each row of the table begins behind."""
    size = k.shape[1]
    small = 1
    if padding.device.type == "cpu":
        check_values("left_padding", padding, block_table.shape[1] * size)
        small = math.gcd(size, *padding.tolist())
    parts = size // small

    def cut(name: str, x: Tensor) -> Tensor:
        if parts == 1:
            return x
        if x.stride(0) != size * x.stride(1) and len(x) > 1:
            raise ValueError(f"{name}: expected pages whose rows follow each other in memory, as left_padding needs, got "
                             f"strides {list(x.stride())}")
        rows = x.stride(1)
        return x.as_strided((len(x) * parts, small, *x.shape[2:]), (small * rows, rows, *x.stride()[2:]))

    column = torch.arange(block_table.shape[1] * parts, device=padding.device) + (padding // small)[:, None]
    inside = column < block_table.shape[1] * parts
    page = block_table.gather(1, torch.where(inside, column // parts, 0)) * parts + column % parts
    return cut("k", k), cut("v", v), torch.where(inside, page, -1).int()
