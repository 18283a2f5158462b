"""Logical tensors: the whole-model view of weights and optimizer state, independent of any layout.

A rank holds pieces of logical tensors: hyper-rectangles of the full tensor, each a view of the memory
the engine trains on. Saving writes the pieces; loading fills whatever pieces the new layout has.
Names: "model/<parameter>", "optim/exp_avg/<parameter>", "optim/exp_avg_sq/<parameter>".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor that this rank holds."""

    tensor: Tensor
    """The values, one dimension for each of the logical tensor; a view, so that loading writes in place."""
    offsets: Shape
    """Position of its first element in the logical tensor."""
    write: bool = True
    """False when another rank saves the same rectangle."""


@dataclass(frozen=True)
class LogicalTensor:
    """A full tensor and the pieces of it that this rank holds (possibly none)."""

    shape: Shape
    """Shape of the full tensor."""
    dtype: torch.dtype
    """Data type that is saved; every piece has it."""
    pieces: tuple[Piece, ...]
    """Disjoint rectangles."""


LogicalState = dict[str, LogicalTensor]
"""Name to tensor. Every rank lists every name (with no pieces where it holds none); together the written
pieces of all ranks cover each tensor exactly once."""


@dataclass(frozen=True)
class Rectangle:
    """A hyper-rectangle whose elements are consecutive in a row-major flat array."""

    offsets: Shape
    """Position of its first element, by dimension."""
    shape: Shape
    """Extent, by dimension."""
    start: int
    """Flat index of its first element."""

    @property
    def stop(self) -> int:
        """Flat index one past its last element."""
        return self.start + prod(self.shape)


def rectangles(local_shape: Sequence[int], start: int, stop: int) -> list[Rectangle]:
    """Cut the flat range [start, stop) of a row-major tensor into rectangles, in flat order.

    At most 2·n - 1 of them for n dimensions: in two, the rest of the first row, whole rows, and the
    beginning of the last row. This is how a ZeRO partition, a flat range, is named in logical tensors.
    """
    shape = tuple(local_shape)
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"flat range [{start}, {stop}) is outside a tensor of shape {list(shape)}")
    if start == stop:
        return []
    if len(shape) <= 1:
        return [Rectangle(offsets=(start,) * len(shape), shape=(stop - start,) * len(shape), start=start)]
    row_size = prod(shape[1:])
    found: list[Rectangle] = []
    row, column = divmod(start, row_size)
    if column:
        end = min(stop, (row + 1) * row_size)
        found += _inside_row(shape, row, column, end - row * row_size)
        start = end
    row, whole = start // row_size, (stop - start) // row_size
    if whole:
        inner = (0,) * (len(shape) - 1)
        found.append(Rectangle(offsets=(row, *inner), shape=(whole, *shape[1:]), start=start))
    if start + whole * row_size < stop:
        found += _inside_row(shape, row + whole, 0, stop - (row + whole) * row_size)
    return found


def _inside_row(shape: Shape, row: int, start: int, stop: int) -> list[Rectangle]:
    base = row * prod(shape[1:])
    return [
        Rectangle(offsets=(row, *part.offsets), shape=(1, *part.shape), start=base + part.start)
        for part in rectangles(shape[1:], start, stop)
    ]


def flat_pieces(
    flat: Tensor,
    *,
    local_shape: Sequence[int],
    start: int,
    offsets: Sequence[int] | None = None,
    write: bool = True,
) -> tuple[Piece, ...]:
    """Pieces for a rank that holds elements [start, start + len(flat)) of a flattened local tensor.

    `flat` is one-dimensional; `offsets` is where the local tensor begins in the logical one (default: at 0).
    The pieces are views of `flat`.
    """
    origin = tuple(offsets) if offsets is not None else (0,) * len(tuple(local_shape))
    return tuple(
        Piece(
            tensor=flat[part.start - start : part.stop - start].view(part.shape),
            offsets=tuple(o + p for o, p in zip(origin, part.offsets, strict=True)),
            write=write,
        )
        for part in rectangles(local_shape, start, start + flat.numel())
    )


def overlap(
    offsets: Shape, shape: Shape, other_offsets: Shape, other_shape: Shape
) -> tuple[Shape, Shape] | None:
    """Offsets and shape of the intersection of two rectangles; None when they share no element."""
    low = tuple(max(a, b) for a, b in zip(offsets, other_offsets, strict=True))
    high = tuple(
        min(a + n, b + m) for a, n, b, m in zip(offsets, shape, other_offsets, other_shape, strict=True)
    )
    extent = tuple(h - lo for lo, h in zip(low, high, strict=True))
    return (low, extent) if all(n > 0 for n in extent) else None


def coverage_problem(shape: Shape, parts: Sequence[tuple[Shape, Shape]]) -> str | None:
    """Why rectangles (offsets, shape) do not tile a tensor of `shape` exactly once; None when they do."""
    for offsets, extent in parts:
        inside = len(offsets) == len(extent) == len(shape) and all(
            o >= 0 and o + n <= full for o, n, full in zip(offsets, extent, shape, strict=True)
        )
        if not inside:
            return f"piece at {list(offsets)} of shape {list(extent)} is outside the shape {list(shape)}"
    covered = sum(prod(extent) for _, extent in parts)
    if covered < prod(shape):
        return f"only {covered} of {prod(shape)} elements are there"
    return _overlap_problem(shape, [part for part in parts if prod(part[1])])


def _overlap_problem(shape: Shape, parts: Sequence[tuple[Shape, Shape]]) -> str | None:
    """Sweep along the first dimension; only rectangles that are open at the same row are compared."""
    if not shape:
        return f"the scalar is there {len(parts)} times" if len(parts) > 1 else None
    ordered = sorted(parts)
    if len(shape) == 1:
        for (first, extent), (second, _) in pairwise(ordered):
            if first[0] + extent[0] > second[0]:
                return f"pieces at {list(first)} and {list(second)} overlap"
        return None
    active: list[tuple[Shape, Shape]] = []
    for offsets, extent in ordered:
        active = [part for part in active if part[0][0] + part[1][0] > offsets[0]]
        for other_offsets, other_extent in active:
            if overlap(offsets, extent, other_offsets, other_extent) is not None:
                return f"pieces at {list(other_offsets)} and {list(offsets)} overlap"
        active.append((offsets, extent))
    return None
