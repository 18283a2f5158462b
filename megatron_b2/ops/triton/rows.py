"""Tensors as matrices of rows, and how wide the tiles of row-wise kernels are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import triton
from torch import Tensor

from megatron_b2.ops.triton import target

VECTOR: Final = 8
"""Neighbouring elements a thread works on: one access of 128 bits in bf16."""
WARP: Final = 32

TILE_ELEMENTS: Final = 1024
"""Of a program of SwiGLU or RoPE: one vector a thread with 4 warps."""
TILE_WARPS: Final = TILE_ELEMENTS // (VECTOR * WARP)
TILE_ROWS: Final = (1, 2, 4)
"""Rows of such a program; the more, the fewer columns."""
MAX_IDLE: Final = 1 / 8
"""Share of the lanes that may lie beyond the row in a tile wider than the narrowest."""

MIN_ROWS: Final = 4
"""Rows for one row of partial sums: fewer, and those cost more bytes than they save time."""
PROGRAMS: Final = 2
"""Programs on one multiprocessor in the backward of a norm: 4 warps of up to 255 registers fit twice."""


@dataclass(frozen=True)
class RowTile:
    """A row held in registers in two pieces, so that 5,120 columns need no padding to 8,192."""

    main: int
    """The largest power of two up to the width."""
    tail: int
    """The next power of two from what is left; 0 where nothing is."""
    warps: int


def as_rows(x: Tensor) -> Tensor:
    """x [..., N] as [R, N] with contiguous columns; a copy only where strides make it one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_tile(width: int) -> RowTile:
    """How a program holds a row of `width` columns: 32 a thread (our choice, not measured), in vectors."""
    main: int = triton.next_power_of_2(width + 1) // 2
    tail: int = triton.next_power_of_2(width - main) if width > main else 0
    return RowTile(main, tail, warps=min(max(main // (4 * VECTOR * WARP), 1), 16))


def tile_of(width: int) -> tuple[int, int]:
    """Rows and columns of a program where rows of `width` columns may be cut: as wide as wastes few lanes."""
    for rows in TILE_ROWS:
        columns = TILE_ELEMENTS // rows
        padded = triton.cdiv(width, columns) * columns
        if rows == TILE_ROWS[-1] or padded - width <= MAX_IDLE * padded:
            break
    return rows, columns


def programs_for(rows: int, arch: str) -> int:
    """Programs that share `rows` rows, each with one row of partial sums: the same on every rank."""
    return min(PROGRAMS * target.multiprocessors(arch), max(triton.cdiv(rows, MIN_ROWS), 1))
