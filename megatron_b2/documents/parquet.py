"""Parquet files as documents; apart from the other readers because pyarrow is slow to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_b2.documents.document import Document
from megatron_b2.documents.reader import MalformedError, make_document

ROWS = 1_024


def read_parquet(path: Path, *, text_key: str) -> Iterator[Document | MalformedError]:
    """Rows of `path` as documents, in file order; `Document.line` is the 1-based row.

    Raises MalformedError for damage to the whole file: unreadable, no column `text_key`, or not of strings.
    """
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow, text_key)
            row = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=columns):
                for record in _records(batch):
                    row += 1
                    try:
                        if isinstance(record, UnicodeDecodeError):
                            raise MalformedError(row, f"not valid UTF-8 at byte {record.start} of a column")
                        yield make_document(record, text_key=text_key, path=path, line=row)
                    except MalformedError as error:
                        yield error
    except (pa.ArrowException, OSError) as error:
        raise MalformedError(1, f"not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _columns(schema: pa.Schema, text_key: str) -> list[str]:
    if text_key not in schema.names:
        raise MalformedError(1, f"no column {text_key!r} (columns: {', '.join(map(repr, schema.names))})")
    kind = schema.field(text_key).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise MalformedError(1, f"column {text_key!r} is {kind}, not string")
    return [text_key, *(n for n in ("language", "source", "id") if n in schema.names and n != text_key)]


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Rows of a batch; a row whose bytes are not UTF-8 (Arrow does not check) comes as its error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield {name: batch.column(name)[i].as_py() for name in batch.schema.names}
            except UnicodeDecodeError as error:
                yield error
