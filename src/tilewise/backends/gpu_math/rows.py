"""How tiles of rows come from memory and go back. Offsets are 64-bit."""
import triton
import triton.language as tl


@triton.jit
def located(X, strides, slot, h, start):
    """X at a sequence's first row of one head."""
    return X + (slot.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + tl.cast(start, tl.int64) * strides[2])


@triton.jit
def load_at(pointers, keep, D: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr):
    """Rows [ROWS, BLOCK_D] that begin at pointers [ROWS, 1]; 0 beyond column D and, if RAGGED, where not `keep` [ROWS, 1]."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    if RAGGED and D < BLOCK_D:
        return tl.load(pointers + dims, mask=keep & (dims < D), other=0.0)
    elif RAGGED:
        return tl.load(pointers + dims, mask=keep, other=0.0)
    elif D < BLOCK_D:
        return tl.load(pointers + dims, mask=dims < D, other=0.0)
    else:
        return tl.load(pointers + dims)


@triton.jit
def rows_from(X, stride, first_row, ROWS: tl.constexpr):
    """Pointers [ROWS, 1] to rows first_row ..; the scalar part is added first, which keeps it out of the vector registers."""
    return X + first_row.to(tl.int64) * stride + tl.arange(0, ROWS)[:, None].to(tl.int64) * stride


@triton.jit
def load_rows(X, stride, first_row, n, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first_row .. of X as a tile [ROWS, BLOCK_D]; 0 beyond row n and beyond column D."""
    return load_rows_between(X, stride, first_row, 0, n, ROWS, D, BLOCK_D, True)


@triton.jit
def load_rows_between(X, stride, first_row, start, end, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                      RAGGED: tl.constexpr):
    """As `load_rows`; if RAGGED, 0 outside rows start .. end, otherwise they are known to be inside."""
    rows = first_row + tl.arange(0, ROWS)[:, None]
    return load_at(rows_from(X, stride, first_row, ROWS), (rows >= start) & (rows < end), D, BLOCK_D, RAGGED)


@triton.jit
def load_keys(X, strides, PAGES, page_size, first_row, start, end, ROWS: tl.constexpr, D: tl.constexpr,
              BLOCK_D: tl.constexpr, RAGGED: tl.constexpr):
    """As `load_rows_between`, for keys or values. PAGES: None, or the pages of the sequence; X is then at page 0."""
    if PAGES is None:
        return load_rows_between(X, strides[2], first_row, start, end, ROWS, D, BLOCK_D, RAGGED)
    else:
        rows = first_row + tl.arange(0, ROWS)[:, None]
        keep = (rows >= start) & (rows < end)
        if RAGGED:
            page = tl.load(PAGES + rows // page_size, mask=keep, other=0)
        else:
            page = tl.load(PAGES + rows // page_size)
        pointers = X + page.to(tl.int64) * strides[0] + (rows % page_size).to(tl.int64) * strides[2]
        return load_at(pointers, keep, D, BLOCK_D, RAGGED)


@triton.jit
def store_at(pointers, keep, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores rows [ROWS, BLOCK_D] at pointers [ROWS, 1], where `keep` [ROWS, 1] and inside column D."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    tl.store(pointers + dims, x.to(pointers.dtype.element_ty), mask=keep & (dims < D))


@triton.jit
def store_rows(X, stride, first_row, n, x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a tile [ROWS, BLOCK_D] to rows first_row .. of X, inside row n and column D."""
    rows = first_row + tl.arange(0, ROWS)[:, None]
    store_at(rows_from(X, stride, first_row, ROWS), rows < n, x, D, BLOCK_D)
