"""Where the records of a WARC file are, however the file is compressed and wherever it is damaged.

A record (ISO 28500) is a line "WARC/1.x", header lines, an empty line, Content-Length bytes, two line ends.
The same walk cuts a file into pieces and reads a piece, so both count the same records. What is broken is
skipped up to the next line that begins a record or, where the archive itself is damaged, to the next gzip
member that does.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_b2.documents.shards import Piece
from megatron_b2.documents.streams import (
    BLOCK_BYTES,
    ArchiveError,
    InputStream,
    ReadLimits,
    is_archive,
    open_bytes,
)

MAX_HEAD_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b\x08"
LOOK_BYTES = 1 << 10
"""Of a gzip member, enough to see how its content begins."""
_FIRST_LINE = re.compile(rb"WARC/1\.\d+\r?\n")
_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d{1,18})[ \t]*\r?$")


@dataclass(frozen=True, slots=True)
class Frame:
    """A record, or what was skipped where one should be."""

    position: int
    """Offset in the decompressed content; behind damage in an archive it counts what could be read."""
    member: tuple[int, int]
    """The archive's member in which it begins: offset in the file, position."""
    head: bytes = b""
    """First line and headers with the empty line; empty if broken."""
    body: bytes | None = None
    """None if the record is too long, or was not asked for."""
    size: int = 0
    """Bytes of the body."""
    broken: str = ""
    """What is wrong."""

    @property
    def offset(self) -> int:
        """Of the member or, in a plain file, of the record: where to look for it in the file."""
        return self.member[0] if self.member != (0, 0) else self.position


def cut_records(path: Path, *, target_bytes: int, limits: ReadLimits) -> list[Piece]:
    """Pieces of a file of at least `target_bytes` decompressed bytes (but for the last), at records."""
    pieces: list[Piece] = []
    start, first, restart, number, end = 0, 1, (0, 0), 1, 0
    for frame in frames(path, limits=limits, bodies=False):
        if frame.position - start >= target_bytes:
            pieces.append(Piece(path, start, frame.position, first, restart))
            start, first, restart = frame.position, number, frame.member
        number += 1
        end = frame.position + max(len(frame.head) + frame.size, 1)
    if end > start or not pieces:
        pieces.append(Piece(path, start, max(end, start), first, restart))
    return pieces


def frames(
    path: Path, *, limits: ReadLimits, start: int = 0, restart: tuple[int, int] = (0, 0), bodies: bool = True
) -> Iterator[Frame]:
    """Records from `start` on, in order.

    Args:
        start: position of a record.
        restart: the `member` of that record.
        bodies: read them; those longer than limits.record_bytes are left out.
    """
    while True:
        offset, known = restart
        stream = open_bytes(path, limits=limits, start=offset, skip=start - known)
        walk = _Walk(stream, start, restart, is_archive(path))
        try:
            yield from walk.frames(limits.record_bytes if bodies else -1)
            return
        except ArchiveError as error:
            yield Frame(walk.begin, (error.member, walk.begin), broken=str(error))
            found = _next_member(path, error.member + 1) if path.name.endswith(".gz") else None
            if found is None:
                return
            start = walk.begin + 1
            restart = (found, start)


class _Walk:
    """Goes through the records of a stream that begins at position `begin`."""

    def __init__(self, stream: InputStream, begin: int, restart: tuple[int, int], archive: bool) -> None:
        self._stream = stream
        self._is_archive = archive
        self._shift = restart[1]  # position of the first byte of the stream
        self.begin = begin
        """Position of the record that is being read."""
        self._position = begin

    def frames(self, limit: int) -> Iterator[Frame]:
        """Records; bodies of more than `limit` bytes are passed over. Raises ArchiveError."""
        line = self._line()
        while line:
            if not line.strip():  # two line ends follow each record
                self.begin, line = self._position, self._line()
                continue
            head, reason = self._head(line)
            match = _LENGTH.search(head)
            if not reason and match is None:
                reason = "the record has no Content-Length"
            member = self._member()
            if reason or match is None:
                yield Frame(self.begin, member, broken=reason)
                line = self._next_first_line()
                continue
            size = int(match[1])
            body, count = self._body(size, limit)
            if count < size:
                reason = f"the file ends {size - count:,} bytes before the record does"
            yield Frame(self.begin, member, head, body, size, reason)
            self.begin, line = self._position, self._line()

    def _member(self) -> tuple[int, int]:
        if not self._is_archive:
            return 0, 0
        offset, begin = self._stream.member_at(self.begin - self._shift)
        return offset, begin + self._shift

    def _line(self) -> bytes:
        line = self._stream.readline(MAX_HEAD_BYTES)
        self._position += len(line)
        return line

    def _head(self, line: bytes) -> tuple[bytes, str]:
        """First line and headers, and what is wrong with them."""
        if not _FIRST_LINE.fullmatch(line):
            return b"", f"no record begins here but {line[:24]!r}"
        lines = [line]
        size = 0
        while (line := self._line()).strip():
            size += len(line)
            lines.append(line)
            if size > MAX_HEAD_BYTES:
                return b"", f"the headers have more than {MAX_HEAD_BYTES:,} bytes"
        if not line:
            return b"", "the file ends inside the headers of the record"
        return b"".join([*lines, b"\r\n"]), ""

    def _body(self, size: int, limit: int) -> tuple[bytes | None, int]:
        """The body if it is within the limit, and how many of its bytes there are."""
        if size <= limit:
            body = self._stream.read(size)
            self._position += len(body)
            return body, len(body)
        count = 0
        while count < size and (data := self._stream.read(min(size - count, BLOCK_BYTES))):
            count += len(data)
        self._position += count
        return None, count

    def _next_first_line(self) -> bytes:
        """Pass over what is broken: the next line that begins a record, or none."""
        while True:
            self.begin = self._position
            line = self._line()
            if not line or _FIRST_LINE.fullmatch(line):
                return line


def _next_member(path: Path, start: int) -> int | None:
    """Offset of the next gzip member that begins a record, from `start` on."""
    data = b""
    with path.open("rb") as stream:
        stream.seek(start)
        while True:
            more = stream.read(BLOCK_BYTES)
            data += more
            place = data.find(GZIP_MAGIC)
            while place >= 0 and (place + LOOK_BYTES <= len(data) or not more):
                if _begins_record(data[place : place + LOOK_BYTES]):
                    return start + place
                place = data.find(GZIP_MAGIC, place + 1)
            if not more:
                return None
            keep = len(data) - place if place >= 0 else len(GZIP_MAGIC)
            start += len(data) - keep
            data = data[-keep:]


def _begins_record(data: bytes) -> bool:
    try:
        return zlib.decompressobj(wbits=31).decompress(data, 7) == b"WARC/1."
    except zlib.error:
        return False
