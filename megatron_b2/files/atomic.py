"""Files and folders that appear whole or not at all: temporary name, fsync, rename.

`error` is the class raised when the disk refuses: OutputError unless the caller promises another.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_b2.errors import B2Error, OutputError


@contextlib.contextmanager
def atomic_files(*paths: Path, error: type[B2Error] = OutputError) -> Iterator[tuple[BinaryIO, ...]]:
    """Binary files that become `paths` when the block ends well; after an error nothing is left.

    All are flushed to disk before the first is renamed, and they are renamed in the order given: the last one
    promises the others. Missing parent folders are made. A write error (full disk, no permission) is an
    `error`.
    """
    temporaries = [_hidden(path, "tmp") for path in paths]
    folders = list(dict.fromkeys(path.parent for path in paths))
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            streams = tuple(stack.enter_context(temporary.open("wb")) for temporary in temporaries)
            yield streams
            for stream in streams:
                stream.flush()
                os.fsync(stream.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        for folder in folders:
            sync_folder(folder)
    except BaseException as cause:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(cause, OSError) and cause.filename in (None, *map(str, (*temporaries, *folders))):
            names = " and ".join(map(str, paths))
            raise error(f"cannot write {names}: {cause.strerror or cause}") from cause
        raise


@contextlib.contextmanager
def atomic_file(path: Path, *, error: type[B2Error] = OutputError) -> Iterator[BinaryIO]:
    """One binary file, as `atomic_files`."""
    with atomic_files(path, error=error) as (stream,):
        yield stream


def write_json(path: Path, value: Any, *, error: type[B2Error] = OutputError) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path, error=error) as stream:
        stream.write((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(
    path: Path, *, replaces: str = "", error: type[B2Error] = OutputError
) -> Iterator[Path]:
    """New folder that becomes `path` when the block ends well; after an error nothing is left.

    Raises `error` before the block when `path` exists and is not an empty folder, unless it holds a file
    `replaces`, by which an earlier result is known from any other folder.
    """
    if path.exists() and not path.is_dir():
        raise error(f"{path} exists and is not a folder")
    is_used = path.is_dir() and any(path.iterdir())
    if is_used and replaces and not (path / replaces).is_file():
        raise error(f"{path} is not empty and no earlier result (no {replaces} in it); give another folder")
    if is_used and not replaces:
        raise error(
            f"{path} already exists and is not empty; give another folder, remove this one, "
            "or pass --overwrite where the command has it"
        )
    temporary, previous = _hidden(path, "tmp"), _hidden(path, "old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync_tree(temporary)
        if path.is_dir():
            path.rename(previous)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException as cause:
        if previous.is_dir() and not path.exists():
            previous.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(cause, OSError):
            raise error(f"cannot write {path}, nothing is left: {cause.strerror or cause}") from cause
        raise
    shutil.rmtree(previous, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(path: Path, suffix: str) -> Path:
    """A sibling of this process alone, on whatever node, so that nobody else's file is ever in the way."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{suffix}")


def _sync_tree(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _sync_tree(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)
