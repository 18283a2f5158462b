"""Archives against Python's own gzip and the zstd library, and against bombs; lines beyond the limit."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_b2.documents import ReadReport, read_documents
from megatron_b2.documents.shards import scan_file
from megatron_b2.documents.streams import (
    ArchiveError,
    Overlong,
    ReadLimits,
    open_bytes,
    read_blocks,
    read_lines,
    read_whole,
)

LIMITS = ReadLimits()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.binary(max_size=5_000), max_size=5), padding=st.integers(0, 3), data=st.data())
def test_gzip_members_as_python_reads_them(tmp_path: Path, parts: list[bytes], padding: int, data) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "x.gz"
    path.write_bytes(b"".join(gzip.compress(part) + bytes(padding) for part in parts))
    with gzip.open(path) as stream:
        content = stream.read()
    assert b"".join(block.data for block in read_blocks(path, limits=LIMITS)) == content == b"".join(parts)
    skip = data.draw(st.integers(0, len(content)))
    with open_bytes(path, limits=LIMITS, skip=skip) as stream:
        assert stream.read() == content[skip:]


def test_members_are_named_where_they_begin(tmp_path: Path) -> None:
    for name, pack in (("x.gz", gzip.compress), ("x.zst", zstandard.compress)):
        parts = [os.urandom(3_000) for _ in range(5)]
        packed = [pack(part) for part in parts]
        (tmp_path / name).write_bytes(b"".join(packed))
        starts = [sum(map(len, packed[:i])) for i in range(5)]
        found: dict[int, bytes] = {}
        for block in read_blocks(tmp_path / name, limits=LIMITS):
            found[block.member] = found.get(block.member, b"") + block.data
        assert found == dict(zip(starts, parts, strict=True))
        with open_bytes(tmp_path / name, limits=LIMITS, start=starts[2]) as stream:
            assert stream.read() == b"".join(parts[2:])
            assert stream.member_at(3_001) == (starts[3], 3_000)


def test_zstd_with_a_skippable_frame_and_a_large_window(tmp_path: Path) -> None:
    path = tmp_path / "x.zst"
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"skip!"
    path.write_bytes(zstandard.compress(b"a") + skippable + zstandard.compress(b"b"))
    assert read_whole(path, limits=LIMITS) == b"ab"
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(stream.compress(b"text " * 1_000) + stream.flush())
    with pytest.raises(ArchiveError, match="too much memory"):
        read_whole(path, limits=LIMITS)
    assert read_whole(path, limits=ReadLimits(window_bytes=1 << 28)) == b"text " * 1_000


@given(st.lists(st.binary(max_size=40)), st.integers(1, 20))
def test_lines(lines: list[bytes], limit: int) -> None:
    data = b"\n".join(lines)
    expected = [
        line
        if len(line.rstrip(b"\n")) <= limit and (len(line) <= limit or line.endswith(b"\n"))
        else Overlong(len(line))
        for line in io.BytesIO(data)
    ]
    found = list(read_lines(io.BytesIO(data), limit=limit))
    assert found == expected
    assert sum(len(line) if isinstance(line, bytes) else line.bytes for line in found) == len(data)


def gzip_bomb(size: int) -> bytes:
    """`size` zeros, made of a member that is written again and again inside one deflate stream."""
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=9) as file:
        for _ in range(size >> 24):
            file.write(bytes(1 << 24))
    return stream.getvalue()


def zstd_bomb(size: int) -> bytes:
    """A frame after RFC 8878 of run-length blocks: 128 KiB in four bytes."""
    blocks, block = size >> 17, 1 << 17
    header = b"\x28\xb5\x2f\xfd" + bytes([0b0000_0000, (17 - 10) << 3])
    run = (block << 3 | 1 << 1).to_bytes(3, "little") + b"{"
    return header + run * (blocks - 1) + (block << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"{"


def test_the_bombs_are_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "x.zst").write_bytes(zstd_bomb(1 << 20))
    assert zstandard.ZstdDecompressor().decompressobj().decompress(zstd_bomb(1 << 20)) == b"{" * (1 << 20)
    assert read_whole(tmp_path / "x.zst", limits=LIMITS) == b"{" * (1 << 20)
    assert gzip.decompress(gzip_bomb(1 << 24)) == bytes(1 << 24)


READER = """
import resource, sys
from megatron_b2.documents import ReadReport, read_documents
from megatron_b2.documents.streams import ReadLimits
limit = 2 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = ReadReport()
limits = ReadLimits(record_bytes=16 << 20)
texts = [d.text for d in read_documents([sys.argv[1]], on_error="skip", report=report, limits=limits)]
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(texts), report.malformed, grown >> 10, report.messages)
"""


def read_in_a_process(path: Path) -> tuple[int, int, int, str]:
    """Documents, malformed records, MB that the process grew by, and messages."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READER), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    documents, malformed, grown, messages = done.stdout.split(maxsplit=3)
    return int(documents), int(malformed), int(grown), messages


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.txt.gz", "x.jsonl"])
def test_bombs_end_the_reading_of_their_file_in_bounded_memory(tmp_path: Path, name: str) -> None:
    """256 MB of zeros in 260 kB, 64 GB in 2 MB, or a line of 256 MB."""
    path = tmp_path / name
    good = b'{"text": "good"}\n'
    if name.endswith(".gz"):
        path.write_bytes((gzip.compress(good) if "jsonl" in name else b"") + gzip_bomb(256 << 20))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(good) + zstd_bomb(64 << 30))
    else:
        with path.open("wb") as file:
            file.write(good)
            file.truncate(256 << 20)
    documents, malformed, grown, messages = read_in_a_process(path)
    assert documents == ("jsonl" in name)
    assert malformed == 1
    assert ("bytes are more than a record may have" if name == "x.jsonl" else "-fold: a bomb") in messages
    assert grown < 150


@pytest.mark.slow
def test_a_line_of_a_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(1 << 10):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "good"}\n')
    documents, malformed, grown, messages = read_in_a_process(path)
    assert (documents, malformed) == (1, 1)
    assert f"{path}:1: 1,073,741,837 bytes are more than a record may have" in messages
    assert grown < 150
    assert [piece.size for piece in scan_file(path, target_bytes=1 << 20).pieces] == [(1 << 30) + 13, 17]


def test_the_limit_of_a_record(tmp_path: Path) -> None:
    lines = [b'{"text": "%s"}' % (b"x" * size) for size in (100, 101, 200, 5)]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    report = ReadReport()
    found = read_documents(
        [path], on_error="skip", report=report, limits=ReadLimits(record_bytes=len(lines[0]))
    )
    assert [len(document.text) for document in found] == [100, 5]
    assert [message.split(":")[1] for message in report.messages] == ["2", "3"]
