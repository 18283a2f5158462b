"""What the attention kernels share: cutting the head width, loading tiles, which blocks a tile must visit.

A head width D that is no power of two is cut into two pieces, HEAD + TAIL columns, where that wastes less
than the next power of two does (88: 64 + 32, 104: 128, 144: 128 + 16, 152 and 160: 128 + 32). A kernel
without a second piece (TAIL = 0) hands the first one on in its place and never uses it.

In fp32, where the GPU has no exact matrix instruction, each thread would need whole rows of both operands of
the scores: too many registers. There both are read DEPTH columns at a time, again for each tile of scores.

Scores are kept times UNIT, which is in the scale and the ALiBi slopes. For 16-bit inputs it is log2 e, so
that exp needs no multiplication. In fp32 it is 1: the rounding of a change of base in the log-sum-exp would
be an error of all probabilities of a row.

Strides of q, k and v are counted in STEP elements, 16 bytes where all of them and so all rows allow it: the
compiler then makes 128-bit accesses. (By itself it looks for multiples of 16 elements, which 88 is not.)

Positions are counted from the first key of the call: query row i stands at `shift` + i.

Leaving out far keys under ALiBi (our choice): a key at distance d scores at most scale |q| |k| - slope d, so
all keys beyond a distance weigh together less than a geometric sum. `first_needed` finds the distance at
which that is less than 2^-24 of a row's sum. Forward and backward each ask it with what they know of the sum.
"""

from __future__ import annotations

import math
from typing import Final

import triton
import triton.language as tl

SIZES: Final = (
    "num_heads",
    "num_queries",
    "num_keys",
    "query_start",
    "key_start",
    "length",
    "shift",
    *(f"{x}_{stride}" for x in "qkv" for stride in ("batch", "head", "row")),
)
"""Arguments of kernels that are not compiled in, whatever their value: a cache grows by one key a token, and
of the strides all that matters is in STEP."""
LOG2_E = tl.constexpr(1.0 / math.log(2.0))
NO_SCORE = tl.constexpr(-(2.0**126))
"""Running maximum before any key: finite, so that it can be subtracted from -inf."""
NEGLIGIBLE = tl.constexpr(24.0 * math.log(2.0))
"""Keys that are left out weigh less than exp(-this) = 2^-24 of a row's sum: below the resolution of fp32."""
NORM_KEYS = tl.constexpr(64)
"""Keys that share a bound on their length."""
NORM_BLOCKS = tl.constexpr(128)
"""Such bounds that are looked at together."""


def pieces(head_dim: int) -> tuple[int, int]:
    """Columns of the first and of the second piece, powers of two of at least 16; the second may be 0."""
    whole = max(16, triton.next_power_of_2(head_dim))
    if whole == head_dim or head_dim < 32:
        return whole, 0
    tail = max(16, triton.next_power_of_2(head_dim - whole // 2))
    return (whole // 2, tail) if tail < whole // 2 else (whole, 0)


@triton.jit
def load(
    base, row, stride, num_rows,
    ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Columns FIRST.. of rows row..row + ROWS of a matrix with D columns, its rows `stride` STEPs apart: 0
    beyond D and, where MASKED, in rows from `num_rows` on. Offsets have 64 bits."""
    rows = row + tl.arange(0, ROWS)
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride * STEP + columns[None, :]
    if MASKED and FIRST + WIDTH > D:
        mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)
    elif FIRST + WIDTH > D:
        tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_pair(
    base, row, stride, num_rows,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Both pieces of the rows, [ROWS, HEAD] and [ROWS, TAIL]."""
    head = load(base, row, stride, num_rows, ROWS, 0, HEAD, D, STEP, MASKED)
    tail = head
    if TAIL > 0:
        tail = load(base, row, stride, num_rows, ROWS, HEAD, TAIL, D, STEP, MASKED)
    return head, tail


@triton.jit
def operand(
    base, row, stride, num_rows,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
    DEPTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows as `products` takes them: both pieces, or where DEPTH > 0 pointers to the first DEPTH columns and
    which rows exist."""
    if DEPTH > 0:
        rows = row + tl.arange(0, ROWS)
        columns = tl.arange(0, DEPTH)
        first = base + rows.to(tl.int64)[:, None] * stride * STEP + columns[None, :]
        second = (rows < num_rows)[:, None]
    else:
        first, second = load_pair(base, row, stride, num_rows, ROWS, HEAD, TAIL, D, STEP, MASKED)
    return first, second


@triton.jit
def store(base, row, stride, num_rows, tile, FIRST: tl.constexpr, D: tl.constexpr):
    """Columns FIRST.. of the rows below `num_rows`, rounded to the type of the matrix."""
    rows = row + tl.arange(0, tile.shape[0])
    columns = FIRST + tl.arange(0, tile.shape[1])
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_pair(base, row, stride, num_rows, head, tail, TAIL: tl.constexpr, D: tl.constexpr):
    """Both pieces of the rows."""
    store(base, row, stride, num_rows, head, 0, D)
    if TAIL > 0:
        store(base, row, stride, num_rows, tail, head.shape[1], D)


@triton.jit
def products(a, a_tail, b, b_tail, D: tl.constexpr, TAIL: tl.constexpr, DEPTH: tl.constexpr):
    """Inner products of the rows of two operands, fp32 [rows of a, rows of b]."""
    if DEPTH > 0:
        result = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
        for column in range(0, D, DEPTH):
            is_column = (column + tl.arange(0, DEPTH) < D)[None, :]
            x = tl.load(a + column, mask=a_tail & is_column, other=0.0)
            y = tl.load(b + column, mask=b_tail & is_column, other=0.0)
            result = tl.dot(x, tl.trans(y), result, input_precision="ieee")
    else:
        result = tl.dot(a, tl.trans(b), input_precision="ieee")
        if TAIL > 0:
            result = tl.dot(a_tail, tl.trans(b_tail), result, input_precision="ieee")
    return result


@triton.jit
def add_product(total, total_tail, weights, x, x_tail, TAIL: tl.constexpr):
    """total + weights x, for both pieces of x."""
    total = tl.dot(weights, x, total, input_precision="ieee")
    if TAIL > 0:
        total_tail = tl.dot(weights, x_tail, total_tail, input_precision="ieee")
    return total, total_tail


@triton.jit
def power(x, UNIT: tl.constexpr):
    """exp(x / UNIT) for a UNIT of 1 or log2 e."""
    return tl.exp(x) if UNIT == 1.0 else tl.exp2(x)


@triton.jit
def phases(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """Blocks to visit of [begin, end), of which every element of [full_begin, full_end) is visible.

    All but `end` are multiples of BLOCK. Returns the number of blocks before the full ones, that of all
    blocks with a mask, and the full range, maybe empty. `masked_block` is where block t with a mask begins.
    """
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_end, full_begin)
    num_before = tl.cdiv(tl.maximum(tl.minimum(full_begin, end) - begin, 0), BLOCK)
    num_after = tl.cdiv(tl.maximum(end - full_end, 0), BLOCK)
    return num_before, num_before + num_after, full_begin, full_end


@triton.jit
def masked_block(t, begin, num_before, full_end, BLOCK: tl.constexpr):
    """First element of block number t of those with a mask: before the full range, then after it."""
    return tl.where(t < num_before, begin + t * BLOCK, full_end + (t - num_before) * BLOCK)


@triton.jit
def key_range(
    starts_ptr, row, num_queries, num_keys, shift, query_start, key_start,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """begin, full_begin, full_end and end (see `phases`) of the keys of queries row..row + BLOCK_M.

    Document starts never decrease along a sequence: the first row has the earliest, the last row the latest.
    """
    end = tl.minimum(num_keys, tl.minimum(row + BLOCK_M, num_queries) + shift)
    full_end = tl.maximum(tl.minimum(row + shift + 1, num_keys), 0) // BLOCK_N * BLOCK_N
    begin = 0
    full_begin = 0
    if PACKED:
        last = tl.minimum(row + BLOCK_M, num_queries) - 1
        earliest = tl.maximum(tl.load(starts_ptr + query_start + row) - key_start, 0)
        latest = tl.maximum(tl.load(starts_ptr + query_start + last) - key_start, 0)
        begin = earliest // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(latest, BLOCK_N) * BLOCK_N
    return begin, full_begin, full_end, end


@triton.jit
def bias(keys, diagonal, slope):
    """ALiBi bias slope * (key - query) of keys and of queries at `diagonal`, both broadcast."""
    return slope * (keys - diagonal).to(tl.float32)


@triton.jit
def within(keys, diagonal, earliest, num_keys, PACKED: tl.constexpr):
    """Whether queries at `diagonal` whose document starts at `earliest` see the keys; all broadcast."""
    seen = (keys <= diagonal) & (keys < num_keys)
    if PACKED:
        seen = seen & (keys >= earliest)
    return seen


@triton.jit
def first_needed(longest_keys_ptr, longest, lowest, position, slope, full_end, UNIT: tl.constexpr):
    """First key to visit, a multiple of NORM_KEYS: those before weigh less than 2^-24 of any row's sum.

    longest_keys: length of the longest key up to the end of each NORM_KEYS. longest: scale times the length
    of the longest query. lowest: log of a lower bound on the sums. position: that of the first query, which
    sees all keys before full_end. Keys at distance d and more weigh together at most
    exp(longest key * longest - slope d) / (1 - exp(-slope)).
    """
    budget = lowest - NEGLIGIBLE * UNIT + tl.log(1.0 - power(-slope, UNIT)) * UNIT
    num_blocks = full_end // NORM_KEYS
    num_skipped = 0
    for first in range(0, num_blocks, NORM_BLOCKS):
        blocks = first + tl.arange(0, NORM_BLOCKS)
        keys = tl.load(longest_keys_ptr + blocks, mask=blocks < num_blocks, other=float("inf"))
        distance = position - (blocks * NORM_KEYS + NORM_KEYS - 1)
        skipped = keys * longest - slope * distance.to(tl.float32) < budget
        num_skipped += tl.sum(skipped.to(tl.int32), 0)
    return num_skipped * NORM_KEYS
