"""Write JSONL, plain or compressed by suffix, atomically."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import zstandard

from megatron_b2.files.atomic import atomic_file


class JsonlWriter:
    """Context manager that writes one JSON object a line to .jsonl, .jsonl.gz or .jsonl.zst.

    The file appears when the block ends well, and only then. The same records give the same bytes.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.records = 0
        self._digest = hashlib.sha256()
        self._stack = ExitStack()
        self._stream: BinaryIO | None = None

    @property
    def sha256(self) -> str:
        """Of the uncompressed lines written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        raw = self._stack.enter_context(atomic_file(self.path))
        if self.path.name.endswith(".gz"):
            compressed = gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="")
            self._stream = cast(BinaryIO, self._stack.enter_context(compressed))
        elif self.path.name.endswith(".zst"):
            writer = zstandard.ZstdCompressor(level=6).stream_writer(raw, closefd=False)
            self._stream = cast(
                BinaryIO, self._stack.enter_context(io.BufferedWriter(cast(io.RawIOBase, writer)))
            )
        else:
            self._stream = raw
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; raises UnicodeEncodeError for a lone surrogate."""
        assert self._stream is not None, "write() is for use inside the with block"
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        self._digest.update(line)
        self._stream.write(line)
        self.records += 1
