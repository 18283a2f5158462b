"""Read documents from .jsonl, .parquet and .txt files, compressed or not, and folders and URLs of them.

Every malformed record is named as "file:line: reason" and either stops the reading (InputError) or is
counted and skipped. Damage to a whole file (a truncated archive, an unreadable Parquet file) counts as one
malformed record at the line where it shows; the rest of that file is lost, the other files are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_b2.documents.document import Document, MalformedError, ReadReport
from megatron_b2.documents.storage import expand_inputs
from megatron_b2.documents.streams import (
    ArchiveError,
    Overlong,
    ReadLimits,
    open_bytes,
    read_lines,
    read_whole,
)
from megatron_b2.errors import InputError

OnError = Literal["skip", "stop"]
BOM = b"\xef\xbb\xbf"
LIMITS = ReadLimits()


def read_documents(
    paths: Sequence[Path | str],
    *,
    text_key: str = "text",
    on_error: OnError = "stop",
    report: ReadReport | None = None,
    limits: ReadLimits = LIMITS,
) -> Iterator[Document]:
    """Documents of all `paths` (see `expand_inputs`) in order.

    A JSONL record is an object with a string at `text_key`; "language", "source", "id" and "url" are
    optional. Parquet columns have the same names. A .txt file is one document. Empty texts are counted, not
    yielded.

    Raises InputError at the first malformed record when `on_error` is "stop"; `report` (if any) is filled
    in both cases.
    """
    report = ReadReport() if report is None else report
    for path in expand_inputs(paths):
        yield from account(path, _read_file(path, text_key, limits), on_error=on_error, report=report)


def read_line_range(
    path: Path,
    *,
    start: int,
    stop: int,
    first_line: int,
    text_key: str = "text",
    on_error: OnError = "stop",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Documents of the bytes [start, stop) of a plain .jsonl file, both at line starts; see `read_documents`.

    `first_line` is the 1-based number of the line at `start`, so that messages name the line of the file.
    """
    report = ReadReport() if report is None else report
    items = parse_range(path, start=start, stop=stop, first_line=first_line, text_key=text_key)
    yield from account(path, items, on_error=on_error, report=report)


def parse_range(
    path: Path,
    *,
    start: int,
    stop: int,
    first_line: int,
    restart: tuple[int, int] = (0, 0),
    text_key: str = "text",
    limits: ReadLimits = LIMITS,
) -> Iterator[Document | MalformedError]:
    """Documents and malformed records of the bytes [start, stop) of a .jsonl file, both at line starts.

    Args:
        start, stop: offsets in the content, decompressed where the file is an archive.
        first_line: 1-based number of the line at `start`.
        restart: of an archive, a place where decompression can begin: its offset in the file, in the content.
    """
    lines = _lines_between(path, start, stop, restart, limits)
    return _parse_lines(path, lines, text_key=text_key, first_line=first_line)


def account(
    path: Path, items: Iterator[Document | MalformedError], *, on_error: OnError, report: ReadReport
) -> Iterator[Document]:
    """The documents with text among `items`; the others are counted in `report`, or stop the reading with an
    InputError."""
    for item in items:
        if isinstance(item, MalformedError):
            message = f"{path}:{item.line}: {item.reason}"
            report.add_malformed(message)
            if on_error == "stop":
                raise InputError(f"{message} (on_error = skip counts and skips such records)")
        elif not item.text:
            report.empty += 1
        else:
            report.documents += 1
            report.bytes += len(item.text) if item.text.isascii() else len(item.text.encode())
            yield item


def overlong(line: int, size: int) -> MalformedError:
    """A record beyond the limit."""
    reason = f"{size:,} bytes are more than a record may have; cut it, or raise max_record_mb"
    return MalformedError(line, reason)


def make_document(record: dict[str, Any], *, text_key: str, path: Path, line: int) -> Document:
    """Check one record, whose text is Unicode, and turn it into a Document; raises MalformedError."""
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise MalformedError(line, f"no key {text_key!r} (keys: {keys})")
    text = record[text_key]
    if not isinstance(text, str):
        raise MalformedError(line, f"{text_key!r} is {_kind(text)}, not a string")
    language = record.get("language")
    source = record.get("source")
    url = record.get("url")
    try:
        identifier = "" if record.get("id") is None else str(record["id"])
    except RecursionError:
        raise MalformedError(line, "'id' is nested too deeply") from None
    return Document(
        text=text,
        language=language if isinstance(language, str) and language else "und",
        source=source if isinstance(source, str) else "",
        id=identifier,
        path=str(path),
        line=line,
        url=url if isinstance(url, str) else "",
    )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _read_file(path: Path, text_key: str, limits: ReadLimits) -> Iterator[Document | MalformedError]:
    try:
        if path.name.endswith(".parquet"):
            from megatron_b2.documents.parquet import read_parquet  # pyarrow is slow to import

            yield from read_parquet(path, text_key=text_key, limits=limits)
        elif path.name.endswith((".txt", ".txt.gz", ".txt.zst")):
            yield read_text(path, limits)
        else:
            with open_bytes(path, limits=limits) as stream:
                lines = read_lines(stream, limit=limits.record_bytes)
                yield from _parse_lines(path, lines, text_key=text_key)
    except MalformedError as error:
        yield error
    except OSError as error:
        yield MalformedError(1, f"cannot be read: {error.strerror or error}")


def read_text(path: Path, limits: ReadLimits = LIMITS) -> Document:
    """A file that is one document of plain text; raises MalformedError."""
    data = read_record(path, limits)
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MalformedError(line, f"not valid UTF-8 at byte {error.start}: {error.reason}") from None
    return Document(text=text, id=path.name, path=str(path), line=1)


def read_record(path: Path, limits: ReadLimits = LIMITS) -> bytes:
    """The decompressed content of a file that is one document; raises MalformedError."""
    try:
        data = read_whole(path, limits=limits)
    except ArchiveError as error:
        raise MalformedError(1, str(error)) from None
    if isinstance(data, Overlong):
        raise overlong(1, data.bytes)
    return data


def _parse_lines(
    path: Path, lines: Iterator[bytes | Overlong], *, text_key: str, first_line: int = 1
) -> Iterator[Document | MalformedError]:
    number = first_line - 1
    while True:
        try:
            raw = next(lines, None)
        except ArchiveError as error:
            yield MalformedError(number + 1, str(error))
            return
        if raw is None:
            return
        number += 1
        if isinstance(raw, Overlong):
            yield overlong(number, raw.bytes)
            continue
        if number == 1:
            raw = raw.removeprefix(BOM)
        if raw.isspace() or not raw:
            continue
        try:
            yield _parse_line(raw, number=number, text_key=text_key, path=path)
        except MalformedError as error:
            yield error


def _parse_line(raw: bytes, *, number: int, text_key: str, path: Path) -> Document:
    try:
        record = orjson.loads(raw)
        # An integer of more than 64 bits, which an id may be or hold, has become a float.
        exact = not isinstance(record, dict) or isinstance(record.get("id"), str | int | None)
    except orjson.JSONDecodeError:
        exact = False
    if not exact:
        record = _parse_json(raw, number)
    if not isinstance(record, dict):
        raise MalformedError(number, f"the record is {_kind(record)}, not an object")
    document = make_document(record, text_key=text_key, path=path, line=number)
    if not exact:
        named = {text_key: document.text, "id": document.id, "url": document.url}
        named |= {"language": document.language, "source": document.source}
        for key, text in named.items():
            _check_unicode(text, key, number)
    return document


def _parse_json(raw: bytes, number: int) -> Any:
    """The record by Python's own parser, which is slower than orjson, takes more (NaN, lone surrogates,
    numbers of any size) and says what is wrong with the rest."""
    try:
        return json.loads(raw.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise MalformedError(number, f"not valid UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise MalformedError(number, f"not valid JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise MalformedError(number, f"not readable as JSON: {error}") from None


def _check_unicode(text: str, key: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, place = ord(text[error.start]), error.start
        reason = f"{key!r} holds a lone surrogate U+{code:04X} at character {place}"
        raise MalformedError(number, reason) from None


def _lines_between(
    path: Path, start: int, stop: int, restart: tuple[int, int], limits: ReadLimits
) -> Iterator[bytes | Overlong]:
    offset, known = restart
    if start >= stop:
        return
    with open_bytes(path, limits=limits, start=offset, skip=start - known) as stream:
        for line in read_lines(stream, limit=limits.record_bytes):
            yield line
            start += line.bytes if isinstance(line, Overlong) else len(line)
            if start >= stop:
                return
