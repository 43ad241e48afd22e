"""New keys and values into a cache in memory: a few copies where there are a few sequences."""
from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from tilewise import kv_cache
from tilewise.kv_cache import Stored
from tilewise.rotary import Rotary

MOST_COPIES = 16                        # with more, all at once by index takes less time


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
