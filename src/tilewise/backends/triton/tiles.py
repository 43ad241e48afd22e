"""Where a program works, and how tiles of rows come from memory and go back. Offsets are 64-bit."""
import triton
import triton.language as tl


@triton.jit
def place(pid, blocks, heads, group, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(sequence, head, key head, first row) of a program. LAST_FIRST: longest first under a causal mask, for queries."""
    block = pid % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    h = (pid // blocks) % heads
    return pid // blocks // heads, h, h // group, block * BLOCK


@triton.jit
def row_offsets(strides, b, h, first_row, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of a tile [ROWS, BLOCK_D]; the scalar part is added first, which keeps it out of the vector registers."""
    base = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + first_row.to(tl.int64) * strides[2]
    return base + (tl.arange(0, ROWS)[:, None].to(tl.int64) * strides[2] + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_rows(X, strides, b, h, first_row, n, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first_row .. of X[b, h] as a tile [ROWS, BLOCK_D]; 0 beyond row n and beyond column D."""
    return load_rows_between(X, strides, b, h, first_row, 0, n, ROWS, D, BLOCK_D, True)


@triton.jit
def load_rows_between(X, strides, b, h, first_row, start, end, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                      RAGGED: tl.constexpr):
    """As `load_rows`; if RAGGED, 0 outside rows start .. end, otherwise they are known to be inside."""
    pointers = X + row_offsets(strides, b, h, first_row, ROWS, BLOCK_D)
    rows = first_row + tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    if RAGGED and D < BLOCK_D:
        return tl.load(pointers, mask=(rows >= start) & (rows < end) & (dims < D), other=0.0)
    elif RAGGED:
        return tl.load(pointers, mask=(rows >= start) & (rows < end), other=0.0)
    elif D < BLOCK_D:
        return tl.load(pointers, mask=dims < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(X, strides, b, h, first_row, n, x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a tile [ROWS, BLOCK_D] to X[b, h], inside row n and column D."""
    pointers = X + row_offsets(strides, b, h, first_row, ROWS, BLOCK_D)
    rows = first_row + tl.arange(0, ROWS)[:, None]
    tl.store(pointers, x.to(X.dtype.element_ty), mask=(rows < n) & (tl.arange(0, BLOCK_D)[None, :] < D))
