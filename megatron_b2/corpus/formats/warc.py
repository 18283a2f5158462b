"""WARC files of a crawl (HTML and text responses) and WET files (extracted text), parsed by FastWARC."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from fastwarc.warc import WarcRecord

from megatron_b2.corpus.formats.framing import Frame, frames
from megatron_b2.corpus.formats.html import decode_text, html_text
from megatron_b2.corpus.formats.text import Converted, UnreadableError, language_tag, tidy
from megatron_b2.documents.document import Document, MalformedError
from megatron_b2.documents.shards import Piece
from megatron_b2.documents.streams import ReadLimits

HTML_TYPES = ("text/html", "application/xhtml+xml")
_WANTED = (b"response", b"resource", b"conversion")
_TYPE = re.compile(rb"(?im)^warc-type:[ \t]*(\w+)[ \t]*\r?$")


def read_records(piece: Piece, *, limits: ReadLimits) -> Iterator[Document | MalformedError]:
    """Documents of a piece of a file, in order: of responses with status 200 and resources whose type is HTML
    or plain text, and of conversions to plain text. Other records are none.

    `Document.id` is the WARC-Record-ID, `url` the WARC-Target-URI, `line` the 1-based number of the record. A
    broken record is a MalformedError with its offset in the file.
    """
    number = piece.first_line - 1
    for frame in frames(piece.path, limits=limits, start=piece.start, restart=piece.restart):
        if frame.position >= piece.stop:
            return
        number += 1
        try:
            found = _document(frame, limits)
        except UnreadableError as error:
            yield MalformedError(number, f"record at byte {frame.offset:,}: {error}")
            continue
        if found is not None:
            yield replace(found, path=str(piece.path), line=number)


def _document(frame: Frame, limits: ReadLimits) -> Document | None:
    """The document of a record, if it is of a kind that has one."""
    if frame.broken:
        raise UnreadableError(frame.broken)
    kind = _TYPE.search(frame.head)
    if kind is None or kind[1].lower() not in _WANTED:
        return None
    if frame.body is None:
        raise UnreadableError(f"{frame.size:,} bytes, more than a record may have; raise max_record_mb")
    try:
        record, content = _parse(frame.head + frame.body, limits)
    except OSError as error:
        raise UnreadableError(str(error)) from None
    found = _converted(record, content)
    if found is None:
        return None
    return Document(
        tidy(found.text),
        language=found.language,
        id=(record.record_id or "").strip("<>"),
        url=(record.headers.get("WARC-Target-URI") or "").strip("<>"),
    )


def _parse(data: bytes, limits: ReadLimits) -> tuple[WarcRecord, bytes]:
    """A record and its content without the encodings of the transfer; raises OSError."""
    record = WarcRecord.from_bytes(data)
    try:
        record.parse_http(auto_decode="all")
        content = record.reader.read(limits.record_bytes + 1)
    except OSError:  # crawlers decode the content and leave the header as it was
        record = WarcRecord.from_bytes(data)
        record.parse_http(auto_decode="transfer")
        content = record.reader.read(limits.record_bytes + 1)
    if len(content) > limits.record_bytes:
        raise UnreadableError(
            f"its {len(data):,} bytes become more than {limits.record_bytes:,}; raise max_record_mb"
        )
    return record, content


def _converted(record: WarcRecord, content: bytes) -> Converted | None:
    """Text of a record, or None if it is of another kind."""
    if record.is_http and record.http_headers.status_code != 200:
        return None
    given = record.http_content_type if record.is_http else record.headers.get("Content-Type")
    kind = (given or "").partition(";")[0].strip().lower()
    charset = (record.http_charset if record.is_http else "") or ""
    if kind in HTML_TYPES:
        return html_text(content, charset)
    if kind == "text/plain":
        language = record.headers.get("WARC-Identified-Content-Language") or ""
        return Converted(decode_text(content, (charset,)), language_tag(language))
    return None
