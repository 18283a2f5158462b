"""A column of texts in the layout that the native code reads: Arrow's large_string, without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Texts:
    """N texts in UTF-8."""

    data: np.ndarray
    """uint8 [B]: the bytes of all texts behind each other."""
    offsets: np.ndarray
    """int64 [N + 1]: where each text starts in `data`, and where the last one ends."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """From Python strings; raises UnicodeEncodeError for a lone surrogate."""
        encoded = [b"", *(text.encode() for text in texts)]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), lengths.cumsum())

    @classmethod
    def of_arrow(cls, column: pa.Array | pa.ChunkedArray) -> Texts:
        """From an Arrow column of strings without nulls; a single large_string chunk is not copied."""
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        column = column.cast(pa.large_string())
        if column.null_count:
            raise ValueError(f"{column.null_count} of {len(column)} texts are null")
        _, offsets, data = column.buffers()
        if not len(column):
            return cls(np.empty(0, np.uint8), np.zeros(1, np.int64))
        starts = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
        return cls(np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8), starts)

    def __iter__(self) -> Iterator[bytes]:
        """The UTF-8 of each text."""
        data = self.data.data
        return (bytes(data[start:end]) for start, end in pairwise(self.offsets.tolist()))

    def to_arrow(self) -> pa.Array:
        """A large_string column that shares the memory."""
        buffers = [None, pa.py_buffer(self.offsets.data), pa.py_buffer(self.data.data)]
        return pa.Array.from_buffers(pa.large_string(), len(self), buffers)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.offsets[-1] - self.offsets[0])
