"""Files of the pipeline that can be trusted: written whole, with a manifest beside them, verified when read.

`x` has the manifest `x.json`: rows, bytes, SHA-256, the fingerprint of the task that made it. The manifest
is renamed last, so that a file without one does not count. Two kinds of file: a Parquet table, which any tool
reads, and a parts file for shuffles, Arrow streams behind each other with a checksum each, of which a reader
takes one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_b2.errors import B2Error
from megatron_b2.files.atomic import atomic_files


class DamagedFileError(B2Error, RuntimeError):
    """A file differs from its manifest; the driver rebuilds it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Part:
    """A verifiable range of a file."""

    offset: int
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What is known of a file."""

    fingerprint: str
    """Of the task that made it."""
    bytes: int
    rows: int
    sha256: str
    parts: tuple[Part, ...] = ()
    """Of a parts file; empty for a table."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the task has to say, such as counts of skipped records; JSON values."""


def manifest_path(path: Path) -> Path:
    """Where the manifest of a file is."""
    return path.with_name(path.name + ".json")


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a file; none if it has none, or if the file is not of the size it states."""
    manifest = _parse(manifest_path(path))
    try:
        return manifest if manifest is not None and path.stat().st_size == manifest.bytes else None
    except OSError:
        return None


def is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of one of ours, sound or not."""
    return _parse(path) is not None


def _parse(path: Path) -> Manifest | None:
    try:
        plain = json.loads(path.read_bytes())
        parts = tuple(Part(**part) for part in plain.pop("parts"))
        return Manifest(**plain, parts=parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_table(path: Path, table: pa.Table, *, fingerprint: str, facts: Mapping[str, Any]) -> None:
    """A Parquet file and its manifest."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=1)
    data = sink.getvalue()
    manifest = Manifest(fingerprint, data.size, table.num_rows, _sha256(data), facts=facts)
    with atomic_files(path, manifest_path(path)) as (stream, beside):
        stream.write(data)
        beside.write(_line(manifest))


def write_parts(
    path: Path, tables: Iterable[pa.Table], *, fingerprint: str, facts: Mapping[str, Any]
) -> None:
    """A parts file and its manifest; part i is `tables[i]`. Parts are written as they come."""
    parts: list[Part] = []
    offset, whole = 0, hashlib.sha256()
    with atomic_files(path, manifest_path(path)) as (stream, beside):
        for table in tables:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            data = sink.getvalue()
            parts.append(Part(offset, data.size, _sha256(data), table.num_rows))
            whole.update(data)
            offset += data.size
            stream.write(data)
        rows = sum(part.rows for part in parts)
        manifest = Manifest(fingerprint, offset, rows, whole.hexdigest(), parts=tuple(parts), facts=facts)
        beside.write(_line(manifest))


def _line(manifest: Manifest) -> bytes:
    return (json.dumps(asdict(manifest), ensure_ascii=False) + "\n").encode()


def read_table(path: Path, columns: Sequence[str] | Callable[[str], bool] | None = None) -> pa.Table:
    """A table, all columns, those named, or those for whose name a function says so, after its bytes were
    compared with the manifest.

    Raises:
        DamagedFileError: if they differ.
    """
    manifest = _required(path)
    data = _verified(path, 0, manifest.bytes, manifest.sha256)
    if callable(columns):
        columns = [name for name in pq.read_schema(pa.BufferReader(data)).names if columns(name)]
    return pq.read_table(pa.BufferReader(data), columns=columns)


def read_part(path: Path, index: int) -> pa.Table:
    """One part of a parts file, verified.

    Raises:
        DamagedFileError: if it differs from the manifest.
    """
    return _read_part(path, _required(path).parts[index])


def read_parts(path: Path) -> Iterator[pa.Table]:
    """The parts of a parts file one after the other, verified."""
    return (_read_part(path, part) for part in _required(path).parts)


def part_bytes(path: Path, index: int) -> int:
    """Size of one part of a parts file."""
    return _required(path).parts[index].bytes


def _read_part(path: Path, part: Part) -> pa.Table:
    data = _verified(path, part.offset, part.bytes, part.sha256)
    return pa.ipc.open_stream(pa.BufferReader(data)).read_all()


def verify_file(path: Path) -> None:
    """Compare all bytes of a file with its manifest, in blocks.

    Raises:
        DamagedFileError: if they differ.
    """
    manifest = _required(path)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != manifest.sha256:
        raise DamagedFileError(path, f"does not have the SHA-256 {manifest.sha256[:12]}...")


def _required(path: Path) -> Manifest:
    manifest = read_manifest(path)
    if manifest is None:
        raise DamagedFileError(path, "is missing, or not as long as its manifest says")
    return manifest


def _verified(path: Path, offset: int, count: int, sha256: str) -> pa.Buffer:
    with path.open("rb") as stream:
        stream.seek(offset)
        data = pa.py_buffer(stream.read(count))
    if data.size != count or _sha256(data) != sha256:
        reason = f"bytes {offset:,} to {offset + count:,} do not have the SHA-256 {sha256[:12]}..."
        raise DamagedFileError(path, reason)
    return data


def _sha256(data: pa.Buffer) -> str:
    return hashlib.sha256(data).hexdigest()
