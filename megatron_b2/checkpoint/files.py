"""Durable files: a crash leaves the old state or the new one, never a mixture."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_b2.errors import CheckpointError

OnBytes = Callable[[int], None]
"""Told the number of bytes just handled; feeds progress bars."""

BLOCK_BYTES = 16 << 20
"""Bytes read, hashed or written at once."""

TMP = ".tmp"
"""Suffix of a folder that is being written or removed; never read."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of a file."""

    bytes: int
    """Size."""
    sha256: str
    """SHA-256 of the content, lower-case hexadecimal."""


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Create `path` (it must not exist) durably with `data`."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


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


def remove_folder(path: Path) -> None:
    """Remove a folder under a name that no reader looks at, so that half of it is never seen."""
    doomed = path if path.name.endswith(TMP) else path.with_name(path.name + TMP)
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)


def require_free(folder: Path) -> None:
    """Raise CheckpointError unless `folder` is absent or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not empty; name a new folder or remove this one")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `final` that becomes `final` when the block succeeds, else is removed.

    Raises CheckpointError when `final` is there and not empty, or when the disk refuses.
    """
    require_free(final)
    tmp = final.with_name(final.name + TMP)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        yield tmp
        sync_directory(tmp)
        tmp.rename(final)
        sync_directory(final.parent)
    except OSError as error:
        raise CheckpointError(f"{final} was not written, nothing is left: {describe(error)}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def describe(error: BaseException) -> str:
    """One line: the file and the system's reason for an OSError, else the type and the message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
