"""Matrix products with fp32 accumulation and what the head does with them: running sum, scale, projection.

One program owns one tile of the result: deterministic, no atomics. The inner dimension is added in steps of
the tile's depth, in order, so an element's bits do not depend on where in the matrix it stands.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megatron_b2.ops.triton.tiles import Tile

_GROUP = 8
"""Blocks of rows that run beside each other, so that what they share stays in the L2 cache (our choice)."""


@triton.jit
def multiply_tile(
    left,
    right,
    row_mask,
    column_mask,
    depth,
    left_step,
    right_step,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """fp32 [ROWS, COLUMNS]: sum over k < depth of left[:, k] right[k, :].

    `left` [ROWS, DEPTH] and `right` [DEPTH, COLUMNS] point to the first step and move on by `left_step` and
    `right_step` elements. fp32 operands are multiplied in fp32, never in TF32.
    """
    offsets = tl.arange(0, DEPTH)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        inside = start + offsets < depth
        a = tl.load(left, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & column_mask[None, :], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
        left += left_step
        right += right_step
    return product


@triton.jit
def grouped_tile(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """(row block, column block) of a program: down GROUP rows, then to the next column."""
    of_group = GROUP * column_blocks
    first = program // of_group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    inside = program % of_group
    return first + inside % height, inside // height


@triton.jit
def finish_tile(
    product,
    total,
    out,
    scale,
    coefficients,
    direction,
    row,
    column,
    row_mask,
    column_mask,
    total_stride,
    out_stride,
    direction_stride,
    ADDS: tl.constexpr,
    KEEPS: tl.constexpr,
    PROJECTS: tl.constexpr,
):
    """Add the running sum to a tile and store it there, or finish it and round it into `out`."""
    wide_row = row.to(tl.int64)
    mask = row_mask[:, None] & column_mask[None, :]
    totals = total + wide_row[:, None] * total_stride + column[None, :]
    if ADDS:
        product += tl.load(totals, mask=mask, other=0.0)
    if KEEPS:
        tl.store(totals, product, mask=mask)
    else:
        if PROJECTS:
            vectors = direction + wide_row[:, None] * direction_stride + column[None, :]
            vector = tl.load(vectors, mask=mask, other=0.0).to(tl.float32)
            product -= tl.load(coefficients + row, mask=row_mask, other=0.0)[:, None] * vector
        product *= tl.load(scale)
        outs = out + wide_row[:, None] * out_stride + column[None, :]
        tl.store(outs, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def product_kernel(
    left,
    right,
    total,
    out,
    scale,
    coefficients,
    direction,
    rows,
    columns,
    depth,
    left_stride,
    right_stride,
    total_stride,
    out_stride,
    direction_stride,
    TRANSPOSED: tl.constexpr,
    ADDS: tl.constexpr,
    KEEPS: tl.constexpr,
    PROJECTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """G = [total +] left right; total = G or out = scale (G [- coefficients direction]): see `accumulate`."""
    row_blocks, column_blocks = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    row_block, column_block = grouped_tile(tl.program_id(0), row_blocks, column_blocks, GROUP)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = row < rows, column < columns
    k = tl.arange(0, DEPTH).to(tl.int64)
    wide_row = row.to(tl.int64)
    step = tl.full((), DEPTH, tl.int64)
    if TRANSPOSED:
        left_pointers = left + k[None, :] * left_stride + row[:, None]
        left_step = step * left_stride
    else:
        left_pointers = left + wide_row[:, None] * left_stride + k[None, :]
        left_step = step
    right_pointers = right + k[:, None] * right_stride + column[None, :]
    product = multiply_tile(
        left_pointers,
        right_pointers,
        row_mask,
        column_mask,
        depth,
        left_step,
        step * right_stride,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    finish_tile(
        product, total, out, scale, coefficients, direction, row, column, row_mask, column_mask,
        total_stride, out_stride, direction_stride, ADDS, KEEPS, PROJECTS,
    )  # fmt: skip


class Projection(NamedTuple):
    """What is taken off each row before the last store."""

    coefficients: Tensor
    """fp32 [M]."""
    direction: Tensor
    """[M, N]; row m is subtracted coefficients[m] times."""


def accumulate(
    left: Tensor,
    right: Tensor,
    *,
    total: Tensor | None,
    out: Tensor | None,
    adds: bool,
    scale: Tensor,
    tile: Tile,
    transposed: bool = False,
    projection: Projection | None = None,
) -> None:
    """One step G = [total +] left right of a sum of products, in fp32; the last step rounds once.

    Args:
        left: [M, K], or with `transposed` [K, M]; last dimension contiguous, as in every matrix here.
        right: [K, N], same dtype.
        total: fp32 [M, N], the sum so far. Takes G unless `out` is given. None where one step is all.
        out: [M, N] of any dtype; takes scale (G - projection). None before the last step.
        adds: whether `total` holds something.
        scale: fp32, one element.
        tile: how the result is cut.
        transposed: left is [K, M].
        projection: with `out` only.
    """
    depth, columns = right.shape
    rows = left.shape[1 if transposed else 0]
    total = right if total is None else total
    direction = right if projection is None else projection.direction
    product_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        left,
        right,
        total,
        total if out is None else out,
        scale,
        scale if projection is None else projection.coefficients,
        direction,
        rows,
        columns,
        depth,
        left.stride(0),
        right.stride(0),
        total.stride(0),
        0 if out is None else out.stride(0),
        direction.stride(0),
        TRANSPOSED=transposed,
        ADDS=adds,
        KEEPS=out is None,
        PROJECTS=projection is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=_GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
