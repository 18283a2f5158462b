"""Parquet files as documents; apart from the other readers because pyarrow is slow to import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_b2.documents.document import Document, MalformedError
from megatron_b2.documents.reader import LIMITS, make_document, overlong
from megatron_b2.documents.streams import SMALL_BYTES, ReadLimits, is_remote

ROWS = 256


@dataclass(frozen=True)
class RowGroup:
    """A part of a Parquet file that can be read alone."""

    rows: int
    compressed: int
    """Bytes in the file of the columns that documents are made of, at least 1."""
    uncompressed: int
    """Bytes of them before compression, dictionary encoding left as it is."""


def row_groups(path: Path, *, text_key: str) -> list[RowGroup]:
    """The row groups of a file, in order; raises MalformedError for damage to the whole file."""
    try:
        with _source(path) as source:
            file, columns = _open(source, text_key)
            wanted, groups = set(columns), []
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                parts = [group.column(i) for i in range(group.num_columns)]
                parts = [part for part in parts if part.path_in_schema.partition(".")[0] in wanted]
                compressed = sum(part.total_compressed_size for part in parts)
                uncompressed = sum(part.total_uncompressed_size for part in parts)
                groups.append(RowGroup(group.num_rows, max(compressed, 1), uncompressed))
            return groups
    except (pa.ArrowException, OSError) as error:
        raise MalformedError(1, _unreadable(error)) from None


def read_parquet(
    path: Path,
    *,
    text_key: str,
    groups: range | None = None,
    first_row: int = 1,
    limits: ReadLimits = LIMITS,
) -> Iterator[Document | MalformedError]:
    """Rows of `path` as documents, in file order; `Document.line` is the 1-based row.

    Args:
        groups: the row groups to read, all by default.
        first_row: number of the first row in them.

    Damage to the whole file (unreadable, no column `text_key`, or not of strings) is a MalformedError at
    row 1; a row group that is damaged, or grows beyond limits.expansion, is one at the row where it shows,
    and the rest of it is lost.
    """
    try:
        found = row_groups(path, text_key=text_key)
        row = first_row
        for number in range(len(found)) if groups is None else groups:
            yield from _read_group(path, text_key, number, found[number], row, limits)
            row += found[number].rows
    except MalformedError as error:
        yield error


def _read_group(
    path: Path, text_key: str, number: int, group: RowGroup, first_row: int, limits: ReadLimits
) -> Iterator[Document | MalformedError]:
    allowed = max(SMALL_BYTES, limits.expansion * group.compressed)
    size, row = group.uncompressed, first_row - 1
    try:
        if size > allowed:
            raise MalformedError(first_row, _bomb(group, size, limits))
        with _source(path) as source:
            (file, columns), size = _open(source, text_key), 0
            for batch in file.iter_batches(batch_size=ROWS, row_groups=[number], columns=columns):
                for record in _records(batch):
                    row += 1
                    item = _document(record, text_key, path, row, limits)
                    size += 0 if isinstance(item, MalformedError) else len(item.text)
                    if size > allowed:
                        raise MalformedError(row, _bomb(group, size, limits))
                    yield item
    except MalformedError as error:
        yield error
    except (pa.ArrowException, OSError) as error:
        yield MalformedError(row + 1, _unreadable(error))


def _bomb(group: RowGroup, size: int, limits: ReadLimits) -> str:
    return (
        f"{group.compressed:,} bytes of a row group become {size:,} or more, more than "
        f"{limits.expansion}-fold: a bomb, or raise max_expansion"
    )


def _source(path: Path) -> pa.NativeFile:
    return pa.PythonFile(path.open("rb"), "r") if is_remote(path) else pa.OSFile(str(path))


def _open(source: pa.NativeFile, text_key: str) -> tuple[pq.ParquetFile, list[str]]:
    """The file, whose texts stay in dictionaries where they are, and the columns of documents."""
    columns = _columns(pq.ParquetFile(source).schema_arrow, text_key)
    source.seek(0)
    return pq.ParquetFile(source, read_dictionary=[text_key]), columns


def _unreadable(error: Exception) -> str:
    return f"not a readable Parquet file: {str(error).splitlines()[0]}"


def _columns(schema: pa.Schema, text_key: str) -> list[str]:
    if text_key not in schema.names:
        raise MalformedError(1, f"no column {text_key!r} (columns: {', '.join(map(repr, schema.names))})")
    kind = schema.field(text_key).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise MalformedError(1, f"column {text_key!r} is {kind}, not string")
    optional = ("language", "source", "id", "url")
    return [text_key, *(n for n in optional if n in schema.names and n != text_key)]


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Rows of a batch; a row whose bytes are not UTF-8 (Arrow does not check) comes as its error."""
    columns: Sequence[pa.Array] = batch.columns
    for i in range(batch.num_rows):
        try:
            yield {name: column[i].as_py() for name, column in zip(batch.schema.names, columns, strict=True)}
        except UnicodeDecodeError as error:
            yield error


def _document(
    record: dict[str, Any] | UnicodeDecodeError, text_key: str, path: Path, row: int, limits: ReadLimits
) -> Document | MalformedError:
    if isinstance(record, UnicodeDecodeError):
        return MalformedError(row, f"not valid UTF-8 at byte {record.start} of a column")
    try:
        document = make_document(record, text_key=text_key, path=path, line=row)
    except MalformedError as error:
        return error
    if len(document.text) > limits.record_bytes:
        return overlong(row, len(document.text))
    return document
