"""Durable files of a checkpoint folder, and its removal."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from megatron_b2.files.hashing import FileRecord

TMP = ".tmp"
"""Suffix of a folder that is being written or removed; never read."""


def write_file(path: Path, data: bytes) -> FileRecord:
    """Create `path` (it must not exist) durably with `data`."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def remove_folder(path: Path) -> None:
    """Remove a folder under a name that no reader looks at, so that half of it is never seen."""
    doomed = path if path.name.endswith(TMP) else path.with_name(path.name + TMP)
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)


def describe(error: BaseException) -> str:
    """One line: the file and the system's reason for an OSError, else the type and the message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
