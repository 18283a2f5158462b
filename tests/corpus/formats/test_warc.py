"""WARC files written by FastWARC and warcio's layout, whole, in pieces, and damaged in every way."""

from __future__ import annotations

import gzip
import io
import re
from pathlib import Path

import brotli
import pytest
import zstandard
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from megatron_b2.corpus.formats.framing import cut_records, frames
from megatron_b2.corpus.formats.warc import read_records
from megatron_b2.documents.document import Document, MalformedError
from megatron_b2.documents.shards import Piece
from megatron_b2.documents.streams import ReadLimits

LIMITS = ReadLimits(record_bytes=1 << 20)
WHOLE = 1 << 60


def page(number: int) -> str:
    return f"第{number}页。" + f"网页正文，编号{number}，" * 20


def response(
    number: int,
    *,
    body: bytes | None = None,
    http: bytes = b"",
    status: bytes = b"200 OK",
    kind: bytes = b"text/html",
) -> bytes:
    """A record made by FastWARC, with its digests."""
    content = (
        f'<html lang="zh-CN"><body><p>{page(number)}</p></body></html>'.encode() if body is None else body
    )
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: " + kind + b"\r\n" + http + b"\r\n"
    record = WarcRecord()
    record.init_headers(WarcRecordType.response)
    record.headers["WARC-Record-ID"] = f"<urn:uuid:{number:08}>"
    record.headers["WARC-Date"] = "2026-01-01T00:00:00Z"
    record.headers["WARC-Target-URI"] = f"https://example.org/{number}"
    record.headers["Content-Type"] = "application/http; msgtype=response"
    record.set_bytes_content(head + content)
    stream = io.BytesIO()
    record.write(stream)
    return stream.getvalue()


INFO = b"WARC/1.1\r\nWARC-Type: warcinfo\r\nContent-Length: 4\r\n\r\na: b\r\n\r\n"
REQUEST = b"WARC/1.1\r\nWARC-Type: request\r\nContent-Length: 3\r\n\r\nGET\r\n\r\n"
PACK = {
    "x.warc": lambda records: b"".join(records),
    "x.warc.gz": lambda records: b"".join(map(gzip.compress, records)),
    "x.warc.zst": lambda records: b"".join(
        map(zstandard.ZstdCompressor(write_checksum=True).compress, records)
    ),
    "one.warc.gz": lambda records: gzip.compress(b"".join(records)),
}


def read(
    path: Path, piece: Piece | None = None, limits: ReadLimits = LIMITS
) -> list[Document | MalformedError]:
    return list(read_records(piece or Piece(path, 0, WHOLE), limits=limits))


def ids(items: list[Document | MalformedError]) -> list[int]:
    return [int(item.id.rpartition(":")[2]) for item in items if isinstance(item, Document)]


def errors(items: list[Document | MalformedError]) -> list[str]:
    return [f"{item.line}: {item.reason}" for item in items if isinstance(item, MalformedError)]


@pytest.mark.parametrize("name", PACK)
def test_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(
        PACK[name]([INFO, REQUEST, response(1), response(2, status=b"404 Not Found"), response(3)])
    )
    first, second = read(path)
    assert isinstance(first, Document)
    assert first == Document(
        page(1),
        language="zh-Hans",
        id="urn:uuid:00000001",
        path=str(path),
        line=3,
        url="https://example.org/1",
    )
    assert isinstance(second, Document)
    assert (second.text, second.line) == (page(3), 5)


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("damage", [False, True])
def test_pieces_have_the_documents_of_the_whole(tmp_path: Path, name: str, damage: bool) -> None:
    records = [response(i) for i in range(40)]
    path = tmp_path / name
    data = bytearray(PACK[name](records))
    if damage and name != "one.warc.gz":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    whole = read(path)
    for target in (1, 3_000, 10_000, 1 << 30):
        pieces = cut_records(path, target_bytes=target, limits=LIMITS)
        assert (len(pieces) > 30) if target == 1 and len(whole) > 30 else pieces
        found = [item for piece in pieces for item in read(path, piece)]
        assert ids(found) == ids(whole)
        assert errors(found) == errors(whole)
        assert [item.line for item in found] == [item.line for item in whole]
    if not damage:
        assert ids(whole) == list(range(40))


def test_records_are_where_fastwarc_finds_them(tmp_path: Path) -> None:
    for name in ("x.warc", "x.warc.gz"):
        path = tmp_path / name
        path.write_bytes(PACK[name]([INFO, *(response(i) for i in range(20)), REQUEST]))
        with path.open("rb") as stream:
            theirs = [(r.stream_pos, r.content_length) for r in ArchiveIterator(stream, parse_http=False)]
        assert [(frame.offset, frame.size) for frame in frames(path, limits=LIMITS)] == theirs


@pytest.mark.parametrize(
    ("http", "encode"),
    [
        (b"Content-Encoding: gzip\r\n", gzip.compress),
        (b"Content-Encoding: br\r\n", brotli.compress),
        (b"Transfer-Encoding: chunked\r\n", lambda data: b"%x\r\n" % len(data) + data + b"\r\n0\r\n\r\n"),
        (b"Content-Encoding: gzip\r\n", bytes),
    ],
    ids=["gzip", "br", "chunked", "gzip that is none"],
)
def test_encodings_of_http(tmp_path: Path, http: bytes, encode) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "x.warc.gz"
    body = encode(f"<p>{page(7)}</p>".encode())
    path.write_bytes(gzip.compress(response(7, body=body, http=http)))
    assert [item.text for item in read(path) if isinstance(item, Document)] == [page(7)]


def test_charset_of_the_server(tmp_path: Path) -> None:
    path = tmp_path / "x.warc"
    body = f"<p>{page(7)}</p>".encode("gb18030")
    path.write_bytes(
        response(7, body=body, kind=b"text/html; charset=GB2312") + response(8, body=body, kind=b"text/plain")
    )
    first, second = read(path)
    assert isinstance(first, Document)
    assert isinstance(second, Document)
    assert (first.text, second.text) == (page(7), f"<p>{page(7)}</p>")


def test_wet(tmp_path: Path) -> None:
    path = tmp_path / "x.warc.wet.gz"
    text = "多语言的文本。\nSecond line."
    record = (
        "WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: https://example.org/\r\n"
        "WARC-Record-ID: <urn:uuid:1>\r\nWARC-Identified-Content-Language: jpn\r\nContent-Type: text/plain\r\n"
        f"Content-Length: {len(text.encode())}\r\n\r\n{text}\r\n\r\n"
    )
    path.write_bytes(gzip.compress(INFO) + gzip.compress(record.encode()))
    assert read(path) == [
        Document(text, language="ja", id="urn:uuid:1", path=str(path), line=2, url="https://example.org/")
    ]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"garbage\r\n" * 5, "no record begins here but b'garbage"),
        (b"WARC/1.1\r\nWARC-Type: response\r\n\r\n", "the record has no Content-Length"),
        (b"WARC/1.1\r\nContent-Length: x\r\n\r\n", "the record has no Content-Length"),
        (b"WARC/1.1\r\nX: " + b"y" * (2 << 20) + b"\r\n\r\n", "the headers have more than 1,048,576 bytes"),
        (response(5, body=b"x" * (2 << 20)), r"2,097,\d+ bytes, more than a record may have"),
        (
            response(5, body=gzip.compress(bytes(64 << 20)), http=b"Content-Encoding: gzip\r\n"),
            "become more than",
        ),
        (response(5, body=b"\x81\x8d\xff" * 50), "not text in UTF-8"),
        (response(5, body=b"zz\r\n", http=b"Transfer-Encoding: chunked\r\n"), "(?i)invalid chunk"),
    ],
    ids=["garbage", "no length", "bad length", "long headers", "long", "bomb", "charset", "chunk"],
)
@pytest.mark.parametrize("name", ["x.warc", "x.warc.gz", "x.warc.zst"])
def test_a_broken_record_is_named_and_the_next_one_read(
    tmp_path: Path, name: str, broken: bytes, reason: str
) -> None:
    path = tmp_path / name
    before = PACK[name]([response(1)])
    path.write_bytes(before + PACK[name]([broken]) + PACK[name]([response(2)]))
    items = read(path)
    assert ids(items) == [1, 2]
    (error,) = errors(items)
    assert error.startswith(f"2: record at byte {len(before):,}: ")
    assert re.search(reason, error)


def test_damage_to_a_member_costs_it_only(tmp_path: Path) -> None:
    path = tmp_path / "x.warc.gz"
    members = [gzip.compress(response(i)) for i in range(5)]
    bad = bytearray(members[2])
    bad[len(bad) // 2] ^= 0xFF
    path.write_bytes(b"".join([*members[:2], bad, *members[3:]]))
    items = read(path)
    assert ids(items) == [0, 1, 3, 4]
    assert errors(items)[0].startswith(
        f"3: record at byte {len(members[0] + members[1]):,}: damaged or truncated"
    )


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("left", [0.3, 0.6, 0.9])
def test_truncated(tmp_path: Path, name: str, left: float) -> None:
    path = tmp_path / name
    data = PACK[name]([response(i) for i in range(20)])
    path.write_bytes(data[: int(left * len(data))])
    items = read(path)
    assert ids(items) == list(range(len(ids(items))))
    assert len(errors(items)) == 1
    assert re.search("damaged or truncated|the file ends", errors(items)[0])


def test_not_warc_at_all(tmp_path: Path) -> None:
    for name, data in (("x.warc", b"PK\x03\x04" * 1000), ("x.warc.gz", b"no gzip"), ("x.warc", b"")):
        (tmp_path / name).write_bytes(data)
        assert len(errors(read(tmp_path / name))) == (1 if data else 0)
        assert len(cut_records(tmp_path / name, target_bytes=10, limits=LIMITS)) == 1
