"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OnBytes = Callable[[int], None]
"""Told the number of bytes just handled; feeds progress bars."""

BLOCK_BYTES = 16 << 20
"""Bytes read, hashed or written at once."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of a file."""

    bytes: int
    """Size."""
    sha256: str
    """SHA-256 of the content, lower-case hexadecimal."""


def hash_file(path: Path, *, on_bytes: OnBytes | None = None) -> FileRecord:
    """Size and SHA-256 of a file as it is on disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return FileRecord(bytes=size, sha256=digest.hexdigest())
