"""Where input files are: local paths, patterns, and URLs of every kind that fsspec knows.

A URL (s3://, https://, memory:// ...) is a UPath: it has the methods of a Path and is used as one.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from megatron_b2.documents.streams import is_remote
from megatron_b2.errors import InputError

DOCUMENT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".txt.gz", ".txt.zst")
"""What every command reads."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file among the inputs."""

    path: Path
    group: str
    """Last part of the folder that was given, or of the folder before the first * of a pattern; empty for a
    file that was given itself."""
    name: str
    """Unique among the inputs: the group and the path below it; where two files would have the same, the
    whole path. It does not change when the folder moves."""


def input_path(given: Path | str) -> Path:
    """The file or folder of a path or URL.

    Raises:
        InputError: no library is installed for this kind of URL.
    """
    if "://" not in str(given):
        return Path(given)
    from upath import UPath  # slow to import, and for URLs only

    try:
        path: Any = UPath(str(given))
        path.fs  # noqa: B018  imports the library of the protocol
    except Exception as error:
        raise InputError(f"{given}: cannot be opened: {type(error).__name__}: {error}") from error
    return cast(Path, path)


def version_of(path: Path) -> str:
    """Size and a mark that changes with the content, as far as the place has one (time, ETag)."""
    facts = path.stat()
    if not is_remote(path):
        return f"{facts.st_size} {facts.st_mtime_ns}"
    remote = cast(Any, path)
    return f"{facts.st_size} {remote.fs.ukey(remote.path)}"


def expand_inputs(
    paths: Sequence[Path | str], *, suffixes: tuple[str, ...] = DOCUMENT_SUFFIXES
) -> list[Path]:
    """Files behind `paths`, in a fixed order: as given, folders recursed and sorted, each file once.

    Hidden files and folders inside a folder are left out. Raises InputError for a path that does not exist, a
    file of an unknown kind, a folder or pattern without any readable file, or a place that cannot be reached.
    """
    return [file.path for file in list_inputs(paths, suffixes=suffixes)]


def list_inputs(
    paths: Sequence[Path | str], *, suffixes: tuple[str, ...] = DOCUMENT_SUFFIXES
) -> list[InputFile]:
    """As `expand_inputs`, with the names of the files."""
    found: dict[str, InputFile] = {}
    names: set[str] = set()
    for given in paths:
        for path, group, name in _list(given, suffixes):
            if str(path) not in found:
                found[str(path)] = InputFile(path, group, str(path) if name in names else name)
                names.add(name)
    if not found:
        raise InputError("no input: give at least one file or folder")
    return list(found.values())


def _list(given: Path | str, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, str, str]]:
    """Path, group and name of each file behind one argument."""
    path = input_path(given)
    try:
        if path.is_dir():
            yield from _folder(path, path, suffixes)
        elif path.is_file():
            if not path.name.endswith(suffixes):
                raise InputError(f"{given}: unknown kind of file; readable are {', '.join(suffixes)}")
            yield path, "", path.name
        elif matches := _matches(path):
            base = _fixed_part(path)
            for match in matches:
                if match.is_dir():
                    yield from _folder(match, base, suffixes)
                elif _is_wanted(_relative(match, base), suffixes):
                    yield match, base.name, _name(match, base)
        else:
            raise InputError(f"{given}: no such file or folder")
    except Exception as error:
        if not is_remote(path) or isinstance(error, InputError):
            raise
        raise InputError(f"{given}: cannot be listed: {type(error).__name__}: {error}") from error


def _folder(folder: Path, base: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, str, str]]:
    files: list[Path] = sorted(p for p in _all_files(folder) if _is_wanted(_relative(p, folder), suffixes))
    if not files:
        raise InputError(f"{folder}: no document file in this folder; readable are {', '.join(suffixes)}")
    for file in files:
        yield file, base.name, _name(file, base)


def _all_files(folder: Path) -> Iterator[Path]:
    if not is_remote(folder):
        yield from (path for path in folder.rglob("*") if path.is_file())
        return
    system = cast(Any, folder).fs
    yield from (input_path(system.unstrip_protocol(name)) for name in system.find(cast(Any, folder).path))


def _matches(pattern: Path) -> list[Path]:
    """Files and folders that a pattern with *, ?, [] or ** stands for, sorted."""
    if not glob.has_magic(str(pattern)):
        return []
    if not is_remote(pattern):
        return sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    system = cast(Any, pattern).fs
    names = sorted(system.glob(cast(Any, pattern).path))
    return [input_path(system.unstrip_protocol(name)) for name in names]


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first part of a pattern that has a special character."""
    base = pattern.parent
    while glob.has_magic(str(base)):
        base = base.parent
    return base


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _name(path: Path, base: Path) -> str:
    return f"{base.name}/{_relative(path, base)}" if base.name else _relative(path, base)


def _is_wanted(relative: str, suffixes: tuple[str, ...]) -> bool:
    return relative.endswith(suffixes) and not any(part.startswith(".") for part in relative.split("/"))
