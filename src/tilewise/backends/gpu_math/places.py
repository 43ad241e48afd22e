"""Where a program works: which block of which sequence and head.

Rows of a sequence are found by its slot and first row (`tilewise/sequences.py`); all other row numbers count from there.
"""
import triton
import triton.language as tl


@triton.jit
def place(pid, WORK, blocks, heads, group, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(sequence, head, key head, first row) of a program.

    WORK: None, or for sequences of unequal length the blocks of all of them (`schedule.py`), sequence -1: nothing to do.
    Otherwise each sequence has `blocks`; LAST_FIRST: longest first under a causal mask, for queries.
    """
    if WORK is None:
        block = pid % blocks
        if LAST_FIRST:
            block = blocks - 1 - block
        h = (pid // blocks) % heads
        return pid // blocks // heads, h, h // group, block * BLOCK
    else:
        h = pid % heads
        item = WORK + 2 * (pid // heads)
        return tl.load(item), h, h // group, tl.load(item + 1) * BLOCK


@triton.jit
def sequence(ROWS, b, n):
    """(slot, first row, number of rows) of a sequence; of none, for b = -1, no rows. ROWS None: n rows from 0 in slot b."""
    if ROWS is None:
        return b, 0, tl.where(b < 0, 0, n)
    else:
        own = ROWS + 3 * tl.maximum(b, 0)
        return tl.load(own), tl.load(own + 1), tl.where(b < 0, 0, tl.load(own + 2))


@triton.jit
def place_together(pid, WORK, blocks, heads, group, together, BLOCK: tl.constexpr):
    """As `place`, where a sequence's last blocks, under a causal mask the longest, come first over `together` heads: as many
    as leave their keys and values in the L2 cache."""
    if WORK is None:
        one = pid // (blocks * together) * together
        place_in = pid % (blocks * together)
        block = blocks - 1 - place_in // together
        of_all = one + place_in % together
        return of_all // heads, of_all % heads, of_all % heads // group, block * BLOCK
    else:
        return place(pid, WORK, blocks, heads, group, BLOCK, True)
