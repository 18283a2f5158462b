"""Kernels of the tests: one that is as it should be, and one for each rule that it breaks."""

import triton
import triton.language as tl


@triton.jit
def scale(x, y, factor, n, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + columns, tl.load(x + columns, mask=columns < n) * factor, mask=columns < n)


@triton.jit
def total(x, y, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + columns).to(tl.float32)))


@triton.jit
def product(x, y, TILE: tl.constexpr):
    """y = x x^T of one tile."""
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    tile = tl.load(x + rows * TILE + columns)
    tl.store(y + rows * TILE + columns, tl.dot(tile, tl.trans(tile)).to(tl.bfloat16))
