"""From input files to units of documents: the first step of every pipeline."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from megatron_b2.corpus.pipeline.checked import read_manifest, read_table
from megatron_b2.corpus.pipeline.stage import Unit
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import DOCUMENT_SCHEMA
from megatron_b2.documents import ReadReport, expand_inputs, read_documents, read_line_range
from megatron_b2.documents.document import Document
from megatron_b2.documents.shards import Piece, ScannedFile, plan_shards, scan_file


@dataclass(frozen=True, kw_only=True)
class Input:
    """Where the documents are."""

    paths: tuple[str, ...]
    """Files and folders: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt."""
    text_key: str = "text"
    """Key or column that holds the text."""
    on_error: Literal["skip", "stop"] = "skip"
    """What a malformed record does; skipped ones are counted in the report."""
    unit_mb: int = 64
    """Megabytes of input in a unit of work."""


@dataclass(frozen=True)
class _Scan:
    path: str
    size: int
    modified: int
    target_bytes: int


@dataclass(frozen=True)
class _Extract:
    pieces: tuple[dict[str, Any], ...]
    files: tuple[str, ...]
    """SHA-256 of the files of the pieces."""
    text_key: str
    on_error: Literal["skip", "stop"]


def scan_tasks(settings: Input, work: Path) -> list[Task]:
    """One task an input file: its hash and where it can be cut."""
    tasks = []
    for path in expand_inputs(settings.paths):
        facts = path.stat()
        scan = _Scan(str(path), facts.st_size, facts.st_mtime_ns, settings.unit_mb << 20)
        output = work / "between" / "extract" / f"{_short(str(path))}.parquet"
        tasks.append(Task(f"scan {path}", _scan, 1, scan, (), output))
    return tasks


def _scan(task: Task, _: Limits) -> Result:
    scan: _Scan = task.settings
    file = scan_file(Path(scan.path), target_bytes=scan.target_bytes)
    rows = [{**asdict(piece), "path": str(piece.path)} for piece in file.pieces]
    return Result([pa.Table.from_pylist(rows)], {"path": scan.path, "sha256": file.sha256})


def extract_tasks(settings: Input, work: Path, scans: Sequence[Task]) -> list[Task]:
    """One task a unit; a unit depends on its bytes of the inputs alone."""
    hashes, files = {}, []
    for scan in scans:
        manifest = read_manifest(scan.output)
        assert manifest is not None
        path = Path(manifest.facts["path"])
        hashes[path] = str(manifest.facts["sha256"])
        rows = read_table(scan.output).to_pylist()
        files.append(ScannedFile(path, hashes[path], tuple(Piece(**{**row, "path": path}) for row in rows)))
    tasks: list[Task] = []
    names: Counter[str] = Counter()
    for pieces in plan_shards(files, target_bytes=settings.unit_mb << 20):
        plain = tuple({**asdict(piece), "path": str(piece.path)} for piece in pieces)
        extract = _Extract(
            plain, tuple(hashes[piece.path] for piece in pieces), settings.text_key, settings.on_error
        )
        name = _short(repr([(piece.path.name, hashes[piece.path], piece.start) for piece in pieces]))
        names[name] += 1
        if names[name] > 1:  # the same file under the same name in another folder
            name = f"{name}-{names[name]}"
        output = work / "documents" / f"{name}.parquet"
        tasks.append(Task(f"extract {name}", _extract, 1, extract, (), output))
    return tasks


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _extract(task: Task, _: Limits) -> Result:
    extract: _Extract = task.settings
    report = ReadReport()
    columns: dict[str, list[Any]] = {name: [] for name in DOCUMENT_SCHEMA.names}
    for document in _documents(extract, report):
        values = asdict(document)
        values["id"] = document.id or f"{Path(document.path).name}:{document.line}"
        for name, column in columns.items():
            column.append(values[name])
    facts = {"empty": report.empty, "malformed": report.malformed, "messages": report.messages}
    return Result([pa.table(columns, schema=DOCUMENT_SCHEMA)], facts)


def _documents(extract: _Extract, report: ReadReport) -> Iterator[Document]:
    options: Any = {"text_key": extract.text_key, "on_error": extract.on_error, "report": report}
    for plain in extract.pieces:
        piece = Piece(**{**plain, "path": Path(plain["path"])})
        if piece.path.suffix == ".jsonl":
            yield from read_line_range(
                piece.path, start=piece.start, stop=piece.stop, first_line=piece.first_line, **options
            )
        else:
            yield from read_documents([piece.path], **options)


def units_of(tasks: Sequence[Task]) -> tuple[Unit, ...]:
    """The units that finished extract tasks wrote, in the order of the inputs."""
    units, first = [], 0
    for task in tasks:
        manifest = read_manifest(task.output)
        assert manifest is not None
        units.append(Unit(task.output.stem, task.output, first, manifest.rows))
        first += manifest.rows
    return tuple(units)
