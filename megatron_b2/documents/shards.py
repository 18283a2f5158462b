"""Cutting input files into shards of about equal size: units of work of `b2 preprocess` and `b2 corpus`.

A shard is a run of pieces; a piece is a whole file or, for plain `.jsonl`, a range of whole lines. The cut
depends on the inputs alone, never on the number of workers, so a later run can reuse finished shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_b2.errors import InputError

SHARDS = 1024
"""Aim for this many, so that the last shards do not keep many workers waiting ..."""
MIN_SHARD_BYTES = 1 << 20
"""... but not smaller than this, a part of a second of work ..."""
MAX_SHARD_BYTES = 256 << 20
"""... nor larger than this, about a minute."""

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of one input file; line `first_line` is the first in them."""

    path: Path
    start: int
    stop: int
    first_line: int = 1

    @property
    def size(self) -> int:
        """Bytes of input."""
        return self.stop - self.start


@dataclass(frozen=True)
class ScannedFile:
    """An input file, read once: its hash and the pieces it may be cut into."""

    path: Path
    sha256: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.pieces[-1].stop


def shard_bytes(total_bytes: int) -> int:
    """Target size of a shard for inputs of `total_bytes`."""
    return min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, total_bytes // SHARDS))


def scan_file(path: Path, *, target_bytes: int) -> ScannedFile:
    """Hash a file and, if it is plain JSON lines, find the line ends where it can be cut: one pass.

    Raises InputError if the file cannot be read.
    """
    digest = hashlib.sha256()
    splittable = path.suffix == ".jsonl"
    pieces: list[Piece] = []
    start, first_line, offset, line = 0, 1, 0, 1
    for block in _blocks(path):
        digest.update(block)
        if splittable:
            begin = 0  # of the part of the block not yet counted
            while (cut := _line_end(block, max(begin, start + target_bytes - offset - 1))) > 0:
                line += block.count(b"\n", begin, cut)
                pieces.append(Piece(path, start, offset + cut, first_line))
                start, first_line, begin = offset + cut, line, cut
            line += block.count(b"\n", begin)
        offset += len(block)
    if offset > start or not pieces:
        pieces.append(Piece(path, start, offset, first_line))
    return ScannedFile(path, digest.hexdigest(), tuple(pieces))


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _line_end(block: bytes, minimum: int) -> int:
    """End of the first line that ends at byte `minimum` of the block or later; 0 if none does."""
    return block.find(b"\n", minimum) + 1 if minimum < len(block) else 0


def plan_shards(files: Sequence[ScannedFile], *, target_bytes: int) -> list[tuple[Piece, ...]]:
    """Group the pieces of all files, in order, into shards of at least `target_bytes` (but for the last)."""
    shards: list[tuple[Piece, ...]] = []
    current: list[Piece] = []
    size = 0
    for piece in chain.from_iterable(file.pieces for file in files):
        current.append(piece)
        size += piece.size
        if size >= target_bytes:
            shards.append(tuple(current))
            current, size = [], 0
    if current:
        shards.append(tuple(current))
    return shards
