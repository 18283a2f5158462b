"""A unit of work: files in, files out, and a fingerprint that says whether it is already done.

The fingerprint covers the version of this package, the function, its settings and the content of the inputs,
not who ran it, when, or beside how many others. So workers may come, go or die in the middle of a run, a task
whose inputs came out byte for byte the same is not repeated, and results of two versions are never mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from megatron_b2 import __version__
from megatron_b2.corpus.pipeline.checked import (
    DamagedFileError,
    manifest_path,
    read_manifest,
    write_parts,
    write_table,
)

FORMAT = 4
"""To be raised when results of tasks change between two versions of this package."""


@dataclass(frozen=True)
class Result:
    """What a task function returns for its output."""

    tables: Iterable[pa.Table]
    """The table, or the parts of a parts file, which may be made one after the other."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest; JSON values."""


@dataclass(frozen=True)
class Limits:
    """What a task may use; not part of its fingerprint, so it must not change its result."""

    memory: int
    """Bytes."""
    scratch: Path
    """Folder for temporary files."""


Function: TypeAlias = "Callable[[Task, Limits], Result]"


@dataclass(frozen=True)
class Task:
    """One file to make. Picklable: `function` is a module's own function, `settings` a dataclass."""

    name: str
    """For people, such as "minhash signatures 3f2a"."""
    function: Function
    version: int
    """To be raised when the function's result changes between two versions of this package."""
    settings: Any
    inputs: tuple[Path, ...]
    """Checked files."""
    output: Path
    """A Parquet table, or with the ending .parts a parts file."""

    def fingerprint(self, contents: Contents) -> str:
        """Raises DamagedFileError if an input is missing."""
        function = f"{self.function.__module__}.{self.function.__qualname__}"
        inputs = [contents[path] for path in self.inputs]
        facts = [__version__, FORMAT, function, self.version, asdict(self.settings), inputs]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class Contents:
    """SHA-256 of checked files by their manifests, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def __getitem__(self, path: Path) -> str:
        if path not in self._known:
            manifest = read_manifest(path)
            if manifest is None:
                raise DamagedFileError(path, "is missing, or not as long as its manifest says")
            self._known[path] = manifest.sha256
        return self._known[path]


def is_done(task: Task, contents: Contents) -> bool:
    """Whether the output is there and came from the same inputs and settings."""
    manifest = read_manifest(task.output)
    return manifest is not None and manifest.fingerprint == task.fingerprint(contents)


def run_task(task: Task, limits: Limits) -> None:
    """Make the output, unless a worker did so that died before it could say it.

    Raises:
        DamagedFileError: if an input differs from its manifest.
    """
    contents = Contents()
    if is_done(task, contents):
        return
    fingerprint = task.fingerprint(contents)
    result = task.function(task, limits)
    if task.output.suffix == ".parts":
        write_parts(task.output, result.tables, fingerprint=fingerprint, facts=result.facts)
        return
    (table,) = result.tables
    write_table(task.output, table, fingerprint=fingerprint, facts=result.facts)


def forget(path: Path) -> None:
    """Make the task that wrote a file run again."""
    manifest_path(path).unlink(missing_ok=True)
