"""Read any rectangle of a logical tensor out of the chunks that were written, whatever layout wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_b2.checkpoint.logical import LogicalState, Shape, overlap
from megatron_b2.checkpoint.tensor_file import TensorFile, open_tensor_file
from megatron_b2.errors import CheckpointError
from megatron_b2.files.hashing import BLOCK_BYTES


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a logical tensor and the file entry that holds it."""

    file: str
    """File name inside the folder."""
    key: str
    """Name in the file."""
    offsets: Shape
    """Position of its first element in the logical tensor."""
    shape: Shape
    """Extent."""


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor on disk."""

    dtype: torch.dtype
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Anything that names logical tensors and reads rectangles of them."""

    def names(self) -> list[str]:
        """Every tensor."""
        ...

    def shape(self, name: str) -> Shape:
        """Full shape."""
        ...

    def read(
        self, name: str, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """The rectangle at `offsets` (default: the origin) of `shape` (default: the rest of the tensor)."""
        ...


class TensorReader:
    """Logical tensors over a folder of tensor files, mapped on first use; only slices are read."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.folder = folder
        self.tensors = dict(tensors)
        self._files: dict[str, TensorFile] = {}

    def names(self) -> list[str]:
        """Every tensor, in stored order."""
        return list(self.tensors)

    def shape(self, name: str) -> Shape:
        """Full shape of a tensor."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored data type of a tensor."""
        return self._stored(name).dtype

    def read(
        self, name: str, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """The rectangle at `offsets` (default: the origin) of `shape` (default: the rest), on the CPU.

        Raises CheckpointError for an unknown name, a rectangle outside the tensor, or one that the chunks
        do not cover.
        """
        stored = self._stored(name)
        low = tuple(offsets) if offsets is not None else (0,) * len(stored.shape)
        rest = (
            (n - o for n, o in zip(stored.shape, low, strict=True)) if len(low) == len(stored.shape) else ()
        )
        extent = tuple(shape) if shape is not None else tuple(rest)
        if (
            len(low) != len(stored.shape)
            or len(extent) != len(stored.shape)
            or any(
                o < 0 or n < 0 or o + n > full for o, n, full in zip(low, extent, stored.shape, strict=True)
            )
        ):
            raise CheckpointError(
                f"{self.folder}: {name} is {list(stored.shape)}, cannot read {list(extent)} at {list(low)}"
            )
        return self._gather(name, stored, low, extent)

    def read_blocks(
        self, name: str, *, start: int = 0, rows: int | None = None, limit_bytes: int = 4 * BLOCK_BYTES
    ) -> Iterator[Tensor]:
        """Rows [start, start + rows) in consecutive blocks of at most `limit_bytes` (or one row)."""
        shape = self.shape(name)
        if not shape:
            yield self.read(name)
            return
        stop = shape[0] if rows is None else start + rows
        inner = prod(shape[1:]) * self.dtype(name).itemsize
        step = max(1, limit_bytes // max(1, inner))
        for row in range(start, stop, step):
            count = min(step, stop - row)
            yield self.read(name, (row, *(0,) * (len(shape) - 1)), (count, *shape[1:]))

    def file(self, name: str) -> TensorFile:
        """An open file of the folder."""
        if name not in self._files:
            self._files[name] = open_tensor_file(self.folder / name)
        return self._files[name]

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: holds no tensor {name!r}")
        return self.tensors[name]

    def _gather(self, name: str, stored: StoredTensor, low: Shape, extent: Shape) -> Tensor:
        if prod(extent) == 0:
            return torch.empty(extent, dtype=stored.dtype)
        out: Tensor | None = None
        found = 0
        for chunk in stored.chunks:
            common = overlap(low, extent, chunk.offsets, chunk.shape)
            if common is None:
                continue
            start, size = common
            index = tuple(slice(s - o, s - o + n) for s, o, n in zip(start, chunk.offsets, size, strict=True))
            part = self.file(chunk.file).read(chunk.key, index)
            if size == extent:
                return part
            out = torch.empty(extent, dtype=stored.dtype) if out is None else out
            out[tuple(slice(s - o, s - o + n) for s, o, n in zip(start, low, size, strict=True))] = part
            found += prod(size)
        if out is None or found != prod(extent):
            raise CheckpointError(
                f"{self.folder}: {name}: {found} of the {prod(extent)} elements at {list(low)} are stored"
            )
        return out


@torch.no_grad()
def load_into(reader: TensorSource, state: LogicalState, *, prefix: str = "") -> None:
    """Fill every piece of `state` in place from `reader`, converting the data type where they differ.

    `prefix` restricts both sides to names that begin with it ("model/": weights only). Names missing on
    either side and other shapes raise one CheckpointError that lists them, before anything is written.
    """
    wanted = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    stored = {name: reader.shape(name) for name in reader.names() if name.startswith(prefix)}
    problems = shape_problems({name: tensor.shape for name, tensor in wanted.items()}, stored)
    if problems:
        raise CheckpointError("the checkpoint does not fit this model:\n  " + "\n  ".join(problems))
    for name, tensor in wanted.items():
        for piece in tensor.pieces:
            piece.tensor.copy_(reader.read(name, piece.offsets, tuple(piece.tensor.shape)))


def shape_problems(wanted: Mapping[str, Shape], stored: Mapping[str, Shape], *, limit: int = 8) -> list[str]:
    """Lines that name missing and unexpected tensors and wrong shapes, at most `limit` of each kind."""
    missing = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in stored]
    extra = [f"unexpected: {name} {list(shape)}" for name, shape in stored.items() if name not in wanted]
    wrong = [
        f"shape of {name}: stored {list(stored[name])}, the model has {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    lines: list[str] = []
    for group in (missing, extra, wrong):
        lines += group[:limit]
        if len(group) > limit:
            lines.append(f"... and {len(group) - limit} more {group[0].split(':')[0].split(' ')[0]} tensors")
    return lines
