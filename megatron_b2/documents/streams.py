"""Bytes of input files, plain or in a gzip or zstd archive, within limits that no input can get around.

Whatever a file holds, no more than a block of it is in memory, a line is never longer than the limit, and an
archive that grows out of proportion (a "zip bomb") ends the reading of that file.
"""

from __future__ import annotations

import io
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_b2.errors import InputError

BLOCK_BYTES = 1 << 20
ZSTD_FEED_BYTES = 1 << 10
"""A block of a zstd frame takes 4 bytes at least and gives 128 KiB at most: a step gives 32 MiB at most."""
DAMAGED = "damaged or truncated archive"
SMALL_BYTES = 64 << 20
"""Whatever its proportion, so much of an archive is read."""


@dataclass(frozen=True, kw_only=True)
class ReadLimits:
    """What a reader takes; more of it is a malformed record, which is counted or ends the reading."""

    record_bytes: int = 256 << 20
    """Longest line, row, page or file that is one document."""
    expansion: int = 200
    """Most bytes that a byte of an archive may become, from 64 MiB on. Text becomes 3 to 20; gzip can reach
    1,032, zstd 30,000."""
    window_bytes: int = 128 << 20
    """Largest window of a zstd frame, which is the memory that it takes to read (`zstd --long=31`: 2 GiB)."""


class ArchiveError(Exception):
    """An archive is damaged, truncated, or grows beyond the limit; `member` is the offset of the gzip member
    or zstd frame in which it shows."""

    def __init__(self, reason: str, member: int) -> None:
        super().__init__(reason)
        self.member = member


@dataclass(frozen=True, slots=True)
class Block:
    """Some bytes of a file."""

    data: bytes
    """Decompressed; at most 1 MiB, 32 MiB from zstd."""
    member: int
    """Offset in the file of the archive's member that they are of; 0 in a plain file."""


@dataclass(frozen=True, slots=True)
class Overlong:
    """A line beyond the limit."""

    bytes: int
    """Its length with the line end."""


class _BlockStream(io.RawIOBase):
    """Blocks as a stream."""

    def __init__(self, blocks: Iterator[Block], start: int) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")
        self._position = 0
        self._members: deque[tuple[int, int]] = deque([(start, 0)])

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the current block goes."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block.data)
            if block.member > self._members[-1][0]:
                self._members.append((block.member, self._position))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        return count

    def member_at(self, position: int) -> tuple[int, int]:
        """See InputStream."""
        while len(self._members) > 1 and self._members[1][1] <= position:
            self._members.popleft()
        return self._members[0]


class InputStream(io.BufferedReader):
    """A buffered stream of blocks that knows which member of the archive its bytes are of."""

    def __init__(self, blocks: Iterator[Block], start: int) -> None:
        self._source = _BlockStream(blocks, start)
        super().__init__(self._source, BLOCK_BYTES)

    def member_at(self, position: int) -> tuple[int, int]:
        """Where the member that has this byte of the stream begins: in the file, and in the stream.

        Positions must not fall from one call to the next.
        """
        return self._source.member_at(position)


def is_remote(path: Path) -> bool:
    """Whether it is read over a network, or from any other place that has a URL."""
    return "://" in str(path)


def is_archive(path: Path) -> bool:
    """Whether a file is compressed, by its name."""
    return path.name.endswith((".gz", ".zst"))


def read_blocks(
    path: Path,
    *,
    limits: ReadLimits,
    start: int = 0,
    on_raw: Callable[[bytes], object] | None = None,
) -> Iterator[Block]:
    """The content of a file in order.

    Args:
        start: offset to begin at: any of a plain file, that of a member of an archive.
        on_raw: told the bytes of the file as they are read; for a hash.

    Raises:
        ArchiveError: see there.
        OSError: a local file cannot be read.
        InputError: a remote one cannot; never a counted skip, since the next try may succeed.
    """
    raw = _raw_blocks(path, start, on_raw)
    if path.name.endswith(".gz"):
        yield from _within(limits, _gzip_blocks(raw, start))
    elif path.name.endswith(".zst"):
        yield from _within(limits, _zstd_blocks(raw, start, limits.window_bytes))
    else:
        for data in raw:
            yield Block(data, 0)


def open_bytes(path: Path, *, limits: ReadLimits, start: int = 0, skip: int = 0) -> InputStream:
    """A file to read from, decompressed; `read_blocks` has the arguments and errors.

    Args:
        skip: decompressed bytes behind `start` to leave out.
    """
    if not is_archive(path):
        start, skip = start + skip, 0
    stream = InputStream(read_blocks(path, limits=limits, start=start), start)
    while skip and (data := stream.read(min(skip, BLOCK_BYTES))):
        skip -= len(data)
    return stream


def read_whole(path: Path, *, limits: ReadLimits) -> bytes | Overlong:
    """The content of a file that is one document, decompressed."""
    with open_bytes(path, limits=limits) as stream:
        data = stream.read(limits.record_bytes + 1)
        if len(data) <= limits.record_bytes:
            return data
        size = len(data)
        del data
        while block := stream.read(BLOCK_BYTES):
            size += len(block)
    return Overlong(size)


def read_lines(stream: BinaryIO, *, limit: int) -> Iterator[bytes | Overlong]:
    """Lines with their ends; of one longer than `limit` bytes only the length."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        size = len(line)
        while not line.endswith(b"\n") and (line := stream.readline(BLOCK_BYTES)):
            size += len(line)
        yield Overlong(size)


def _raw_blocks(path: Path, start: int, on_raw: Callable[[bytes], object] | None) -> Iterator[bytes]:
    """Blocks that end at multiples of their size in the file, wherever the first begins: so what is decoded
    of a damaged archive before the damage shows does not depend on where the reading began."""
    size = BLOCK_BYTES - start % BLOCK_BYTES
    try:
        with path.open("rb") as stream:
            if start:
                stream.seek(start)
            while data := stream.read(size):
                size = BLOCK_BYTES
                if on_raw is not None:
                    on_raw(data)
                yield data
    except Exception as error:
        if not is_remote(path):
            raise
        raise InputError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _within(limits: ReadLimits, blocks: Iterator[tuple[Block, int]]) -> Iterator[Block]:
    """Blocks with data; given each with the bytes of its member that were read so far."""
    member, produced = -1, 0
    for block, consumed in blocks:
        produced = len(block.data) + (produced if block.member == member else 0)
        member = block.member
        if produced > SMALL_BYTES and produced > limits.expansion * consumed:
            raise ArchiveError(
                f"{consumed:,} bytes of the archive became {produced:,}, more than {limits.expansion}-fold: "
                "a bomb, or raise max_expansion",
                member,
            )
        if block.data:
            yield block


def _gzip_blocks(raw: Iterator[bytes], start: int) -> Iterator[tuple[Block, int]]:
    """Blocks of all members; zeros between and behind members are padding."""
    position = start  # of the first byte of `data` in the file
    data, ended, member, decoder = b"", False, start, None
    while True:
        if not data and not ended:
            data = next(raw, b"")
            ended = not data
        if decoder is None:
            rest = data.lstrip(b"\0")
            position += len(data) - len(rest)
            data = rest
            if not data:
                if ended:
                    return
                continue
            decoder, member = zlib.decompressobj(wbits=31), position
        try:
            output = decoder.decompress(data, BLOCK_BYTES)
        except zlib.error as error:
            raise ArchiveError(f"{DAMAGED}: {error}", member) from None
        rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        position += len(data) - len(rest)
        data = rest
        yield Block(output, member), position - member
        if decoder.eof:
            decoder = None
        elif ended and not output:
            raise ArchiveError(f"{DAMAGED}: the last gzip member ends early", member)


def _zstd_blocks(raw: Iterator[bytes], start: int, window_bytes: int) -> Iterator[tuple[Block, int]]:
    """Blocks of all frames; unlike zstandard's own reader, a cut frame is an error."""
    factory = zstandard.ZstdDecompressor(max_window_size=window_bytes)
    decoder, member, position, inside = factory.decompressobj(), start, start, False
    for block in raw:
        rest = memoryview(block)
        while rest:
            feed = rest[: ZSTD_FEED_BYTES - position % ZSTD_FEED_BYTES]
            try:
                output = decoder.decompress(feed)
            except zstandard.ZstdError as error:
                raise ArchiveError(f"{DAMAGED}: {error}", member) from None
            used = len(feed) - len(decoder.unused_data)
            rest, position, inside = rest[used:], position + used, not decoder.eof
            yield Block(output, member), position - member
            if decoder.eof:
                decoder, member = factory.decompressobj(), position
    if inside:
        raise ArchiveError(f"{DAMAGED}: the last zstd frame ends early", member)
