"""Kernels of the head: row norms, statistics of the logits, their merge, gradient of the logits.

Logits z[t, v] = n_v (h_t . w_v), n_v = 1 / ||w_v||, live in registers only: the product is accumulated in
fp32 and n_v is applied to it, so neither the logits nor W / ||W|| are in memory.

Statistics of one token over a set of vocabulary columns are four fp32 numbers: the largest logit m, s = sum
of exp(z - m), the lowest id among the largest (exact, ids are below 2^24) and the label's logit (0 where it
is not in the set). The empty set is (-inf, 0, id, 0).
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_b2.ops.triton.matmul import grouped_tile, multiply_tile


@triton.jit
def inverse_norms_kernel(
    weight, inverse_norms, vocab, width, weight_stride, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """n_v = 1 / max(||w_v||, eps), fp32 [V]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    row_mask = row < vocab
    pointers = weight + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        mask = row_mask[:, None] & (start + column[None, :] < width)
        w = tl.load(pointers + start, mask=mask, other=0.0).to(tl.float32)
        squares += w * w
    norms = tl.sqrt_rn(tl.sum(squares, 1))
    tl.store(inverse_norms + row, tl.div_rn(1.0, tl.maximum(norms, eps)), mask=row_mask)


@triton.jit
def segment_bounds(segment, vocab, parts, splits, COLUMNS: tl.constexpr):
    """First column of a segment and the one behind its last.

    The rank's columns are cut into `parts` as equal as can be, each part into `splits` at multiples of
    COLUMNS from its beginning. A padded tile is therefore only at the end of a part, and for V divisible by
    the parts of all ranks the cuts are at the same vocabulary ids whatever the number of ranks.
    """
    part, split = segment // splits, segment % splits
    begin, end = part * vocab // parts, (part + 1) * vocab // parts
    tiles = tl.cdiv(end - begin, COLUMNS)
    first = begin + split * tiles // splits * COLUMNS
    last = begin + (split + 1) * tiles // splits * COLUMNS
    return first, tl.minimum(last, end)


@triton.jit
def products_tile(
    hidden,
    weight,
    row,
    column,
    row_mask,
    column_mask,
    width,
    hidden_stride,
    weight_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """h_t . w_v, fp32 [ROWS, COLUMNS], of tokens `row` and vocabulary rows `column`; 0 outside the masks."""
    k = tl.arange(0, DEPTH)
    left = hidden + row.to(tl.int64)[:, None] * hidden_stride + k[None, :]
    right = weight + column.to(tl.int64)[None, :] * weight_stride + k[:, None]
    return multiply_tile(left, right, row_mask, column_mask, width, DEPTH, DEPTH, ROWS, COLUMNS, DEPTH)


@triton.jit
def include_tile(top, total, top_column, target, logits, column, column_mask, label):
    """Running statistics [ROWS] with one more tile of logits, -inf where masked: online softmax
    (Milakov and Gimelshein 2018). Later columns win only with a larger logit."""
    tile_top = tl.max(logits, 1)
    tile_column = tl.min(tl.where(logits == tile_top[:, None], column[None, :], 2147483647), 1)
    top_column = tl.where(tile_top > top, tile_column, top_column)
    new_top = tl.maximum(top, tile_top)
    total = tl.fma(total, tl.exp(top - new_top), tl.sum(tl.exp(logits - new_top[:, None]), 1))
    is_target = (column[None, :] == label[:, None]) & column_mask[None, :]
    target += tl.sum(tl.where(is_target, logits, 0.0), 1)
    return new_top, total, top_column, target


@triton.jit
def statistics_kernel(
    hidden,
    weight,
    inverse_norms,
    labels,
    statistics,
    products,
    tokens,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    products_stride,
    first_id,
    parts,
    splits,
    KEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Statistics [segments, 4, T] of every token over every segment; program (token block, segment).

    A column counts only below the end of its segment: behind it are columns of the next segment, or of
    another rank, whose label must not match here. With KEEPS the products h . w go to `products` fp32 [T, V].
    """
    segment = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < tokens
    wide_row = row.to(tl.int64)
    label = (tl.load(labels + row, mask=row_mask, other=-1) - first_id).to(tl.int32)
    first, last = segment_bounds(segment, vocab, parts, splits, COLUMNS)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    top_column = tl.zeros((ROWS,), tl.int32) + first
    total = tl.zeros((ROWS,), tl.float32)
    target = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_mask = column < last
        product = products_tile(
            hidden, weight, row, column, row_mask, column_mask, width, hidden_stride, weight_stride,
            ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        if KEEPS:
            kept = products + wide_row[:, None] * products_stride + column[None, :]
            tl.store(kept, product, mask=row_mask[:, None] & column_mask[None, :])
        logits = product * tl.load(inverse_norms + column, mask=column_mask, other=0.0)[None, :]
        logits = tl.where(column_mask[None, :], logits, float("-inf"))
        top, total, top_column, target = include_tile(
            top, total, top_column, target, logits, column, column_mask, label
        )
    wide = tl.cast(tokens, tl.int64)
    out = statistics + segment * 4 * wide + row
    tl.store(out, top, mask=row_mask)
    tl.store(out + wide, total, mask=row_mask)
    tl.store(out + 2 * wide, (top_column + first_id).to(tl.float32), mask=row_mask)
    tl.store(out + 3 * wide, target, mask=row_mask)


@triton.jit
def halves(values, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """[ROWS, 2 PAIRS] as the even and the odd columns."""
    return tl.split(tl.reshape(values, (ROWS, PAIRS, 2)))


@triton.jit
def merge_kernel(
    statistics,
    merged,
    tokens,
    count,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Statistics [count, 4, T] of neighbouring sets to [4, T] of their union; count <= 2^LEVELS.

    A balanced tree over neighbours: the statistics of a power of two of segments, merged on one rank or first
    on several ranks and then between them, are the same bits. One of two scales is 1, and the other's product
    and sum is one FMA: no compiler can round it in another way.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < tokens
    leaf = tl.arange(0, 2**LEVELS)
    wide = tl.cast(tokens, tl.int64)
    pointers = statistics + leaf[None, :] * 4 * wide + row[:, None]
    mask = row_mask[:, None] & (leaf < count)[None, :]
    top = tl.load(pointers, mask=mask, other=float("-inf"))
    total = tl.load(pointers + wide, mask=mask, other=0.0)
    top_id = tl.load(pointers + 2 * wide, mask=mask, other=0.0)
    target = tl.load(pointers + 3 * wide, mask=mask, other=0.0)
    for level in tl.static_range(LEVELS):
        top_0, top_1 = halves(top, ROWS, 2 ** (LEVELS - 1 - level))
        total_0, total_1 = halves(total, ROWS, 2 ** (LEVELS - 1 - level))
        id_0, id_1 = halves(top_id, ROWS, 2 ** (LEVELS - 1 - level))
        target_0, target_1 = halves(target, ROWS, 2 ** (LEVELS - 1 - level))
        is_second = top_1 > top_0
        top = tl.where(is_second, top_1, top_0)
        lower = tl.where(is_second, top_0, top_1)
        scale = tl.exp(lower - tl.where(top == float("-inf"), 0.0, top))
        total = tl.fma(tl.where(is_second, total_0, total_1), scale, tl.where(is_second, total_1, total_0))
        top_id = tl.where(is_second, id_1, id_0)
        target = target_0 + target_1
    out = merged + row
    tl.store(out, tl.reshape(top, (ROWS,)), mask=row_mask)
    tl.store(out + wide, tl.reshape(total, (ROWS,)), mask=row_mask)
    tl.store(out + 2 * wide, tl.reshape(top_id, (ROWS,)), mask=row_mask)
    tl.store(out + 3 * wide, tl.reshape(target, (ROWS,)), mask=row_mask)


@triton.jit
def delta_tile(logits, labels, statistics, scales, row, column, row_mask, tokens, first_id, ignored):
    """d total / d logits in units of the scales: see `logit_gradient_kernel`."""
    label = tl.load(labels + row, mask=row_mask, other=ignored)
    ce = tl.where(label == ignored, 0.0, tl.load(scales))
    is_target = column[None, :] == (label - first_id).to(tl.int32)[:, None]
    token = statistics + row
    wide = tl.cast(tokens, tl.int64)
    top = tl.load(token, mask=row_mask, other=0.0)
    inverse_total = 1.0 / tl.load(token + wide, mask=row_mask, other=1.0)
    top_id = tl.load(token + 2 * wide, mask=row_mask, other=-1.0).to(tl.int32)
    is_top = column[None, :] == (top_id - first_id)[:, None]
    probability = tl.exp(logits - top[:, None]) * inverse_total[:, None]
    delta = ce[:, None] * (probability - tl.where(is_target, 1.0, 0.0))
    return delta + tl.where(is_top, (top * tl.load(scales + 1))[:, None], 0.0)


@triton.jit
def logit_gradient_kernel(
    hidden,
    weight,
    inverse_norms,
    labels,
    statistics,
    scales,
    products,
    gradient,
    sums,
    tokens,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    products_stride,
    gradient_stride,
    sums_stride,
    first_id,
    ignored,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """D[t, v] = n_v delta[t, v] in the dtype of the inputs, and its column sums weighted by the products.

    delta = ce (p - 1[v is the label]) + z M 1[v is the top], with ce = scales[0] (0 for ignored labels) and
    z = scales[1], p = exp(z - M) / s, M the largest logit. `sums` fp32 [token blocks, V] gets the sum over
    the block's tokens of D (h . w) with D as it was rounded: that is <w_v, G_v> for G = D^T h, so that the
    projected gradient of a row is orthogonal to the row although D is rounded (our choice).
    """
    row_blocks, column_blocks = tl.cdiv(tokens, ROWS), tl.cdiv(vocab, COLUMNS)
    row_block, column_block = grouped_tile(tl.program_id(0), row_blocks, column_blocks, GROUP)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = row < tokens, column < vocab
    mask = row_mask[:, None] & column_mask[None, :]
    wide_row = row.to(tl.int64)
    if KEPT:
        kept = products + wide_row[:, None] * products_stride + column[None, :]
        product = tl.load(kept, mask=mask, other=0.0)
    else:
        product = products_tile(
            hidden, weight, row, column, row_mask, column_mask, width, hidden_stride, weight_stride,
            ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    inverse = tl.load(inverse_norms + column, mask=column_mask, other=0.0)
    logits = product * inverse[None, :]
    delta = delta_tile(
        logits, labels, statistics, scales, row, column, row_mask, tokens, first_id, ignored
    )  # fmt: skip
    delta = tl.where(mask, delta * inverse[None, :], 0.0).to(gradient.dtype.element_ty)
    tl.store(gradient + wide_row[:, None] * gradient_stride + column[None, :], delta, mask=mask)
    block_sums = tl.sum(delta.to(tl.float32) * product, 0)
    tl.store(sums + row_block.to(tl.int64) * sums_stride + column, block_sums, mask=column_mask)
