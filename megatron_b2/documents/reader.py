"""Read documents from .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt files and folders of them.

Every malformed record is named as "file:line: reason" and either stops the reading (InputError) or is
counted and skipped. Damage to a whole file (a truncated archive, an unreadable Parquet file) counts as one
malformed record at the line where it shows; the rest of that file is lost, the other files are read.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import orjson
import zstandard

from megatron_b2.documents.document import Document, ReadReport
from megatron_b2.errors import InputError

OnError = Literal["skip", "stop"]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
BOM = b"\xef\xbb\xbf"
MAX_ZSTD_WINDOW = 1 << 31


class MalformedError(Exception):
    """A record (or the rest of a file, when `fatal`) cannot be read."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


def expand_inputs(paths: Sequence[Path | str]) -> list[Path]:
    """Files behind `paths`, in a fixed order: as given, folders recursed and sorted, each file once.

    Hidden files and folders inside a folder are left out. Raises InputError for a path that does not exist,
    a file of an unknown kind, or a folder without any readable file.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and _is_document(p.relative_to(path)))
            if not files:
                raise InputError(
                    f"{path}: no document file in this folder; readable are {', '.join(SUFFIXES)}"
                )
        elif path.is_file():
            if not path.name.endswith(SUFFIXES):
                raise InputError(f"{path}: unknown kind of file; readable are {', '.join(SUFFIXES)}")
            files = [path]
        else:
            raise InputError(f"{path}: no such file or folder")
        found.update(dict.fromkeys(files))
    if not found:
        raise InputError("no input: give at least one file or folder")
    return list(found)


def read_documents(
    paths: Sequence[Path | str],
    *,
    text_key: str = "text",
    on_error: OnError = "stop",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Documents of all `paths` (see `expand_inputs`) in order.

    A JSONL record is an object with a string at `text_key`; "language", "source" and "id" are optional.
    Parquet columns have the same names. A .txt file is one document. Empty texts are counted, not yielded.

    Raises InputError at the first malformed record when `on_error` is "stop"; `report` (if any) is filled
    in both cases.
    """
    report = ReadReport() if report is None else report
    for path in expand_inputs(paths):
        yield from _account(path, _read_file(path, text_key), on_error=on_error, report=report)


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
    items = _parse_lines(path, _lines_between(path, start, stop), text_key=text_key, first_line=first_line)
    yield from _account(path, items, on_error=on_error, report=report)


def _account(
    path: Path, items: Iterator[Document | MalformedError], *, on_error: OnError, report: ReadReport
) -> Iterator[Document]:
    """The documents with text among `items`; the others are counted in `report`, or stop the reading."""
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
    identifier = record.get("id")
    return Document(
        text=text,
        language=language if isinstance(language, str) and language else "und",
        source=source if isinstance(source, str) else "",
        id="" if identifier is None else str(identifier),
        path=str(path),
        line=line,
    )


def _is_document(relative: Path) -> bool:
    return relative.name.endswith(SUFFIXES) and not any(part.startswith(".") for part in relative.parts)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _read_file(path: Path, text_key: str) -> Iterator[Document | MalformedError]:
    try:
        if path.name.endswith(".parquet"):
            from megatron_b2.documents.parquet import read_parquet  # pyarrow is slow to import

            yield from read_parquet(path, text_key=text_key)
        elif path.name.endswith(".txt"):
            yield _read_text(path)
        else:
            yield from _parse_lines(path, _lines(path), text_key=text_key)
    except MalformedError as error:
        yield error
    except OSError as error:
        yield MalformedError(1, f"cannot be read: {error.strerror or error}")


def _read_text(path: Path) -> Document:
    data = path.read_bytes()
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MalformedError(line, f"not valid UTF-8 at byte {error.start}: {error.reason}") from None
    return Document(text=text, id=path.name, path=str(path), line=1)


def _parse_lines(
    path: Path, lines: Iterator[bytes], *, text_key: str, first_line: int = 1
) -> Iterator[Document | MalformedError]:
    number = first_line - 1
    while True:
        try:
            raw = next(lines, None)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise MalformedError(number + 1, f"damaged or truncated archive: {error}") from None
        if raw is None:
            return
        number += 1
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
        _check_unicode(document.text, text_key, number)
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


def _check_unicode(text: str, text_key: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, place = ord(text[error.start]), error.start
        reason = f"{text_key!r} holds a lone surrogate U+{code:04X} at character {place}"
        raise MalformedError(number, reason) from None


def _lines(path: Path) -> Iterator[bytes]:
    if path.name.endswith(".gz"):
        with gzip.open(path, "rb") as stream:
            yield from stream
    elif path.name.endswith(".zst"):
        yield from _split_lines(_zstd_chunks(path))
    else:
        with path.open("rb") as stream:
            yield from stream


def _lines_between(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(start)
        while start < stop and (line := stream.readline()):
            start += len(line)
            yield line


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Decompressed chunks of all frames; unlike zstandard's own reader, a cut frame is an error."""
    factory = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    decompressor = factory.decompressobj()
    inside = False
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            while chunk:
                yield decompressor.decompress(chunk)
                inside = not decompressor.eof
                chunk = decompressor.unused_data if decompressor.eof else b""
                if decompressor.eof:
                    decompressor = factory.decompressobj()
    if inside:
        raise EOFError("the last zstd frame ends early")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        head, newline, tail = chunk.partition(b"\n")
        rest.append(head)
        if not newline:
            continue
        yield b"".join(rest) + newline
        *whole, last = tail.split(b"\n")
        for line in whole:
            yield line + b"\n"
        rest = [last]
    if any(rest):
        yield b"".join(rest)
