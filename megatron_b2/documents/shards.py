"""Cutting input files into shards of about equal size: units of work of `b2 preprocess` and `b2 corpus`.

A shard is a run of pieces; a piece is a whole file or a range of whole records. The cut depends on the inputs
alone, never on the number of workers, so a later run can reuse finished shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_b2.documents.streams import BLOCK_BYTES, ArchiveError, Block, ReadLimits, read_blocks
from megatron_b2.errors import InputError

SHARDS = 1024
"""Aim for this many, so that the last shards do not keep many workers waiting ..."""
MIN_SHARD_BYTES = 1 << 20
"""... but not smaller than this, a part of a second of work ..."""
MAX_SHARD_BYTES = 256 << 20
"""... nor larger than this, about a minute."""


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of the content of one input file; line `first_line` is the first in them."""

    path: Path
    start: int
    """Offset in the file or, where an archive was cut, in what it decompresses to."""
    stop: int
    first_line: int = 1
    restart: tuple[int, int] = (0, 0)
    """Of an archive that was cut, the last member before `start`: its offset in the file, in the content."""

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


def scan_file(path: Path, *, target_bytes: int, archives: ReadLimits | None = None) -> ScannedFile:
    """Hash a file and, if it is JSON lines, find the line ends where it can be cut: one pass.

    Args:
        archives: cut `.jsonl.gz` and `.jsonl.zst` too, read within these limits; without, such a file is one
            piece. An archive of one member is decompressed from its beginning for each of its pieces.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    limits = archives or ReadLimits()
    lines = path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst") if archives else ".jsonl")
    try:
        pieces: list[Piece] = []
        whole = False
        if lines:
            blocks = read_blocks(path, limits=limits, on_raw=digest.update)
            pieces, whole = _cut_lines(path, target_bytes, blocks)
        if not whole:
            digest = hashlib.sha256()
            size = _hash(path, digest)
            pieces = pieces or [Piece(path, 0, size)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return ScannedFile(path, digest.hexdigest(), tuple(pieces))


def _cut_lines(path: Path, target_bytes: int, blocks: Iterator[Block]) -> tuple[list[Piece], bool]:
    """Pieces, and whether the end was reached; if not, the last piece goes one byte beyond what could be
    read, for whoever reads it to find out why."""
    pieces: list[Piece] = []
    start, first_line, offset, line = 0, 1, 0, 1
    restart = member = (0, 0)
    whole = False
    with suppress(ArchiveError):
        for block in blocks:
            data, begin = block.data, 0  # `begin`: of the part of the block not yet counted
            if block.member > member[0]:
                member = (block.member, offset)
            while (cut := _line_end(data, max(begin, start + target_bytes - offset - 1))) > 0:
                line += data.count(b"\n", begin, cut)
                pieces.append(Piece(path, start, offset + cut, first_line, restart))
                start, first_line, begin, restart = offset + cut, line, cut, member
            line += data.count(b"\n", begin)
            offset += len(data)
        whole = True
    offset += not whole
    if offset > start or not pieces:
        pieces.append(Piece(path, start, offset, first_line, restart))
    return pieces, whole


def _hash(path: Path, digest: hashlib._Hash) -> int:
    """Bytes of the file."""
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return size


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
