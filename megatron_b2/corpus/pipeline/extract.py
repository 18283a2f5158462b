"""From input files to units of documents: the first step of every pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from megatron_b2.corpus.formats.reading import SUFFIXES, PieceReader, cut_file, is_one_document
from megatron_b2.corpus.pipeline.checked import read_manifest, read_table
from megatron_b2.corpus.pipeline.stage import Unit
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import DOCUMENT_SCHEMA
from megatron_b2.documents import ReadReport
from megatron_b2.documents.document import Document
from megatron_b2.documents.reader import account
from megatron_b2.documents.shards import Piece, ScannedFile, plan_shards
from megatron_b2.documents.storage import InputFile, input_path, list_inputs, version_of
from megatron_b2.documents.streams import ReadLimits, is_remote
from megatron_b2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Input:
    """Where the documents are."""

    paths: tuple[str, ...]
    """Files, folders, patterns with * and **, and URLs of them (https://, s3:// ...): JSON lines, Parquet,
    text, HTML, Markdown, manual pages, PDF, WARC and WET, also .gz and .zst."""
    text_key: str = "text"
    """Key or column that holds the text."""
    on_error: Literal["skip", "stop"] = "skip"
    """What a malformed record does; skipped ones are counted in the report."""
    unit_mb: int = 64
    """Megabytes of input, decompressed, in a unit of work."""
    max_record_mb: int = 64
    """Longest line, row, page or file that is one document; a longer one is malformed."""
    max_expansion: int = 200
    """Most bytes that a byte of an archive may become, from 64 MiB on; what is beyond is malformed."""
    max_window_mb: int = 128
    """Memory that reading a zstd file may take; `zstd --long=31` needs 2048."""

    @property
    def limits(self) -> ReadLimits:
        """For the readers."""
        return ReadLimits(
            record_bytes=self.max_record_mb << 20,
            expansion=self.max_expansion,
            window_bytes=self.max_window_mb << 20,
        )


@dataclass(frozen=True)
class _Scan:
    path: str
    version: str
    group: str
    name: str
    target_bytes: int
    text_key: str
    limits: ReadLimits


@dataclass(frozen=True)
class _Named:
    """A piece, and the file's name and group among the inputs."""

    piece: Piece
    name: str
    group: str
    sha256: str
    """Of the file."""


@dataclass(frozen=True)
class _Extract:
    pieces: tuple[_Named, ...]
    text_key: str
    on_error: Literal["skip", "stop"]
    limits: ReadLimits


def scan_tasks(settings: Input, work: Path) -> list[Task]:
    """One task an input file: its hash and where it can be cut.

    Raises:
        InputError: an input is wrong, or inputs and work folder are inside each other.
    """
    tasks = []
    files = list_inputs(settings.paths, suffixes=SUFFIXES)
    _refuse_overlap(settings.paths, files, work)
    for file in files:
        path = str(file.path)
        scan = _Scan(
            path,
            version_of(file.path),
            file.group,
            file.name,
            settings.unit_mb << 20,
            settings.text_key,
            settings.limits,
        )
        output = work / "between" / "extract" / f"{_short(path)}.parquet"
        tasks.append(Task(f"scan {path}", _scan, 2, scan, (), output))
    return tasks


def _refuse_overlap(paths: Sequence[str], files: Sequence[InputFile], work: Path) -> None:
    """The files of `work` come and go with every run, and no run may take them for documents."""
    where = work.resolve()
    folders = {file.path.parent for file in files if not is_remote(file.path)}
    inside = sorted(folder for folder in folders if folder.resolve().is_relative_to(where))
    if inside:
        raise InputError(
            f"{inside[0]}: input inside the work folder {work}, whose files come and go; "
            "copy the input to another place, or give another `work`"
        )
    for path in map(input_path, paths):
        if is_remote(path) or not path.is_dir() or not where.is_relative_to(path.resolve()):
            continue
        below = where.relative_to(path.resolve()).parts
        if not any(part.startswith(".") for part in below):  # a hidden folder is never read
            raise InputError(
                f"{work}: the work folder is inside the input {path}, so that its files would become input; "
                "give another `work`, or the inputs in it one by one"
            )


def _scan(task: Task, _: Limits) -> Result:
    scan: _Scan = task.settings
    file = cut_file(
        input_path(scan.path), target_bytes=scan.target_bytes, text_key=scan.text_key, limits=scan.limits
    )
    rows = [{**asdict(piece), "path": scan.path} for piece in file.pieces]
    facts = {"path": scan.path, "name": scan.name, "group": scan.group, "sha256": file.sha256}
    return Result([pa.Table.from_pylist(rows)], facts)


def extract_tasks(settings: Input, work: Path, scans: Sequence[Task]) -> list[Task]:
    """One task a unit; a unit depends on its bytes of the inputs alone."""
    facts, files = {}, []
    for scan in scans:
        manifest = read_manifest(scan.output)
        assert manifest is not None
        path = input_path(manifest.facts["path"])
        facts[path] = manifest.facts
        rows = read_table(scan.output).to_pylist()
        pieces = tuple(Piece(**{**row, "path": path, "restart": tuple(row["restart"])}) for row in rows)
        files.append(ScannedFile(path, str(manifest.facts["sha256"]), pieces))
    tasks: list[Task] = []
    for pieces in plan_shards(files, target_bytes=settings.unit_mb << 20):
        named = tuple(
            _Named(piece, *(str(facts[piece.path][key]) for key in ("name", "group", "sha256")))
            for piece in pieces
        )
        extract = _Extract(named, settings.text_key, settings.on_error, settings.limits)
        name = _short(repr([(one.name, one.sha256, one.piece.start) for one in named]))
        output = work / "documents" / f"{name}.parquet"
        tasks.append(Task(f"extract {name}", _extract, 2, extract, (), output))
    return tasks


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _extract(task: Task, _: Limits) -> Result:
    extract: _Extract = task.settings
    report = ReadReport()
    columns: dict[str, list[Any]] = {name: [] for name in DOCUMENT_SCHEMA.names}
    for named, document in _documents(extract, report):
        values = asdict(document)
        values["id"] = document.id or (
            named.name if is_one_document(named.piece.path) else f"{named.name}:{document.line}"
        )
        values["source"] = document.source or named.group
        for name, column in columns.items():
            column.append(values[name])
    facts = {"empty": report.empty, "malformed": report.malformed, "messages": report.messages}
    return Result([pa.table(columns, schema=DOCUMENT_SCHEMA)], facts)


def _documents(extract: _Extract, report: ReadReport) -> Iterator[tuple[_Named, Document]]:
    with PieceReader(text_key=extract.text_key, limits=extract.limits) as reader:
        for named in extract.pieces:
            path = named.piece.path
            items = reader.read(named.piece)
            for document in account(path, items, on_error=extract.on_error, report=report):
                yield named, document


def skipped(units: Sequence[Unit]) -> tuple[int, int]:
    """Records of the input that were malformed, and those without text."""
    facts = [manifest.facts for unit in units if (manifest := read_manifest(unit.path)) is not None]
    return sum(one["malformed"] for one in facts), sum(one["empty"] for one in facts)


def units_of(tasks: Sequence[Task]) -> tuple[Unit, ...]:
    """The units that finished extract tasks wrote, in the order of the inputs."""
    units, first = [], 0
    for task in tasks:
        manifest = read_manifest(task.output)
        assert manifest is not None
        units.append(Unit(task.output.stem, task.output, first, manifest.rows))
        first += manifest.rows
    return tuple(units)
