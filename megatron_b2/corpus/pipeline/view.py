"""What a stage sees of a unit of documents, and what it says about them.

A unit is a Parquet table of documents. No stage changes it. Each stage writes one table of attributes with
the same rows (`id` first), whose columns are named STAGE.NAME:

| column | type | meaning |
|---|---|---|
| STAGE.keep | bool | false: the document goes at this stage; null: it had gone before |
| STAGE.reason | string | why it goes; empty where it stays |
| STAGE.bytes | int64 | UTF-8 bytes of the text as the stage saw it |
| STAGE.left | int64 | bytes that it leaves; 0 for a document that goes |
| STAGE.text | large_string | the whole new text, null where it does not change (optional) |
| STAGE.cuts | list<int64> | begin, end, begin, end, ...: byte ranges that leave the text (optional) |
| any other | any | scores, identifiers of duplicates, counts |

A stage sees the documents that every earlier stage kept, with the texts that they left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.documents.texts import Texts

DOCUMENT_SCHEMA: Final = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("language", pa.string()),
        ("source", pa.string()),
        ("path", pa.string()),
        ("line", pa.int64()),
        ("url", pa.string()),
    ]
)
"""Of a unit; `path` and `line` say where the document was read, `url` where it was fetched, if known."""


@dataclass(frozen=True)
class View:
    """The documents of a unit that a stage sees."""

    ids: pa.ChunkedArray
    """Of all rows of the unit."""
    rows: np.ndarray
    """int64 [N], ascending: the rows that earlier stages kept."""
    documents: pa.Table
    """N rows of the unit without the texts."""
    text: pa.ChunkedArray
    """N texts as earlier stages left them; empty where they were not asked for."""
    sizes: np.ndarray
    """int64 [N]: UTF-8 bytes of the texts, also where they were not asked for."""
    attributes: pa.Table
    """N rows of the columns of earlier stages that were asked for."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> Texts:
        """The texts for native code."""
        return Texts.of_arrow(self.text)

    def write(self, stage: str, *, keep: np.ndarray, reason: Any, **columns: Any) -> pa.Table:
        """The attributes of all rows of the unit from those of the N seen.

        Args:
            stage: its name.
            keep: bool [N].
            reason: N strings.
            columns: N values each, Arrow arrays or what Arrow can make one of.
        """
        reason = _array(reason).cast(pa.string())  # of null where there are no rows
        seen: dict[str, Any] = {"keep": keep, "reason": reason, "bytes": self.sizes}
        seen["left"] = np.where(keep, _left(self.sizes, columns), 0)
        seen |= columns
        where = np.full(len(self.ids), -1, np.int64)
        where[self.rows] = np.arange(len(self))
        index = pa.array(where, mask=where < 0)
        table = {"id": self.ids}
        table |= {f"{stage}.{name}": _array(values).take(index) for name, values in seen.items()}
        return pa.table(table)


def read_view(inputs: Sequence[Path], *, wanted: Sequence[str] = (), with_text: bool = True) -> View:
    """See through all earlier stages.

    Args:
        inputs: the unit, then the attributes of the earlier stages in their order.
        wanted: names (STAGE.NAME) of columns of earlier stages to have in `attributes`.
        with_text: false leaves the texts empty and saves the time; not for the first stage.
    """
    columns = [name for name in DOCUMENT_SCHEMA.names if with_text or name != "text"]
    unit = read_table(inputs[0], columns)
    rows = np.arange(unit.num_rows, dtype=np.int64)
    nothing = pa.chunked_array([pa.array([""] * unit.num_rows, pa.large_string())])
    text = unit.column("text") if with_text else nothing
    found: dict[str, pa.ChunkedArray] = {}
    left = None
    for path in inputs[1:]:
        stage = path.parent.name
        needed = {f"{stage}.keep", f"{stage}.left", f"{stage}.text", f"{stage}.cuts", *wanted}
        table = read_table(path, needed.__contains__).take(pa.array(rows))
        left = table.column(f"{stage}.left")
        found |= {name: table.column(name) for name in table.column_names if name in wanted}
        if with_text:
            text = _changed(text, table, stage)
        kept = np.asarray(table.column(f"{stage}.keep").combine_chunks())
        if not kept.all():
            keep = pa.array(np.flatnonzero(kept))
            rows, text, left = rows[kept], text.take(keep), left.take(keep)
            found = {name: column.take(keep) for name, column in found.items()}
    documents = unit.drop_columns(["text"] if with_text else []).take(pa.array(rows))
    sizes = left if left is not None else pc.binary_length(text)
    size = np.asarray(sizes, dtype=np.int64)
    return View(unit.column("id"), rows, documents, text, size, pa.table(found))


def _array(values: Any) -> pa.Array | pa.ChunkedArray:
    return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)


def _left(size: np.ndarray, columns: Mapping[str, Any]) -> np.ndarray:
    """Bytes of each text after a stage with these columns."""
    if "text" in columns:
        lengths = pc.binary_length(_array(columns["text"]))
        size = np.asarray(pc.coalesce(lengths.cast(pa.int64()), pa.array(size)))
    if "cuts" in columns:
        ranges, offsets = _ranges(_array(columns["cuts"]))
        cut = np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])])
        size = size - np.diff(cut[offsets])
    return size


def _ranges(cuts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Byte ranges [R, 2] of all texts, and where those of each text start, [N + 1]."""
    lists = cuts.combine_chunks() if isinstance(cuts, pa.ChunkedArray) else cuts
    counts = np.asarray(pc.fill_null(pc.list_value_length(lists), 0), dtype=np.int64)
    ranges = np.asarray(pc.list_flatten(lists), dtype=np.int64).reshape(-1, 2)
    return ranges, np.concatenate([[0], np.cumsum(counts)]) // 2


def only_changed(after: pa.Array, changed: np.ndarray) -> pa.Array:
    """The column STAGE.text: `after`, with null for the texts that did not change."""
    return pc.if_else(pa.array(changed), after, pa.scalar(None, after.type))


def languages_of(view: View) -> list[str]:
    """Tag of each document: that of the stage `language` where it ran, else the input's."""
    if "language.tag" in view.attributes.column_names:
        tags: list[str] = view.attributes.column("language.tag").to_pylist()
        return tags
    given: list[str] = view.documents.column("language").to_pylist()
    return given


def _changed(text: pa.ChunkedArray, table: pa.Table, stage: str) -> pa.ChunkedArray:
    """Texts after a stage that may have replaced or cut them."""
    columns: Mapping[str, pa.ChunkedArray] = dict(zip(table.column_names, table.columns, strict=True))
    if f"{stage}.text" in columns:
        text = pc.coalesce(columns[f"{stage}.text"], text)
    if f"{stage}.cuts" in columns:
        from megatron_b2.corpus.spans import apply_cuts

        ranges, offsets = _ranges(columns[f"{stage}.cuts"])
        if len(ranges):
            text = apply_cuts(Texts.of_arrow(text), ranges, offsets).to_arrow()
    return text
