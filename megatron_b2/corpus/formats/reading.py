"""All kinds of input files of a pipeline: how each is cut into pieces, and the documents of a piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_b2.corpus.formats.framing import cut_records
from megatron_b2.corpus.formats.html import html_text
from megatron_b2.corpus.formats.man import man_text
from megatron_b2.corpus.formats.markdown import markdown_text
from megatron_b2.corpus.formats.pdf import PdfReader
from megatron_b2.corpus.formats.text import Converted, UnreadableError, tidy
from megatron_b2.corpus.formats.warc import read_records
from megatron_b2.documents.document import Document, MalformedError
from megatron_b2.documents.parquet import read_parquet, row_groups
from megatron_b2.documents.reader import parse_range, read_record, read_text
from megatron_b2.documents.shards import Piece, ScannedFile, scan_file
from megatron_b2.documents.streams import ReadLimits

PDF_MEMORY_BYTES = 1 << 30
WARC = (".warc", ".wet")
HTML = (".html", ".htm", ".xhtml")
MARKDOWN = (".md", ".markdown")
MAN = (*(f".{section}" for section in range(1, 10)), ".man")
ONE_DOCUMENT = (*HTML, *MARKDOWN, *MAN, ".pdf", ".txt")
LINES = (".jsonl",)
SUFFIXES = (
    ".parquet",
    *(kind + archive for kind in (*LINES, *WARC, *ONE_DOCUMENT) for archive in ("", ".gz", ".zst")),
)
"""What a pipeline reads."""


def kind_of(path: Path) -> str:
    """The ending of a name without that of an archive, such as .jsonl."""
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def is_one_document(path: Path) -> bool:
    """Whether a file has one document, not many records."""
    return kind_of(path) in ONE_DOCUMENT


def cut_file(path: Path, *, target_bytes: int, text_key: str, limits: ReadLimits) -> ScannedFile:
    """Hash a file and cut it into pieces of about `target_bytes` of its content, as far as its kind allows.

    Raises:
        InputError: it cannot be read.
    """
    file = scan_file(path, target_bytes=target_bytes, archives=limits)
    kind = kind_of(path)
    if kind in WARC:
        pieces = cut_records(path, target_bytes=target_bytes, limits=limits)
        return replace(file, pieces=tuple(pieces))
    if kind == ".parquet":
        return replace(file, pieces=tuple(_cut_parquet(path, target_bytes, text_key)))
    return file


def _cut_parquet(path: Path, target_bytes: int, text_key: str) -> list[Piece]:
    """Pieces at row groups; offsets count the uncompressed bytes of the columns that are read."""
    pieces: list[Piece] = []
    start = stop = 0
    first = row = 1
    try:
        groups = row_groups(path, text_key=text_key)
    except MalformedError:  # whoever reads the file says so
        return [Piece(path, 0, 1)]
    for group in groups:
        stop += max(group.uncompressed, 1)
        row += group.rows
        if stop - start >= target_bytes:
            pieces.append(Piece(path, start, stop, first))
            start, first = stop, row
    if stop > start or not pieces:
        pieces.append(Piece(path, start, stop, first))
    return pieces


class PieceReader:
    """Reads pieces of files of every kind, in a `with` block.

    Args:
        text_key: key or column of the text in JSON lines and Parquet.
        limits: beyond them a record is malformed.
    """

    def __init__(self, *, text_key: str, limits: ReadLimits) -> None:
        self._text_key = text_key
        self._limits = limits
        self._stack = ExitStack()
        self._pdf: PdfReader | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def read(self, piece: Piece) -> Iterator[Document | MalformedError]:
        """The documents of a piece in order, and what could not be read.

        Documents have no id where the input names none.

        Raises:
            InputError: a manual page, and mandoc is not installed; a remote file cannot be read.
        """
        kind = kind_of(piece.path)
        try:
            if kind in LINES:
                yield from self._lines(piece)
            elif kind == ".parquet":
                yield from self._parquet(piece)
            elif kind in WARC:
                yield from read_records(piece, limits=self._limits)
            elif kind == ".txt":
                yield replace(read_text(piece.path, self._limits), id="")
            else:
                yield self._converted(piece.path, kind)
        except MalformedError as error:
            yield error
        except OSError as error:
            yield MalformedError(piece.first_line, f"cannot be read: {error.strerror or error}")

    def _lines(self, piece: Piece) -> Iterator[Document | MalformedError]:
        return parse_range(
            piece.path,
            start=piece.start,
            stop=piece.stop,
            first_line=piece.first_line,
            restart=piece.restart,
            text_key=self._text_key,
            limits=self._limits,
        )

    def _parquet(self, piece: Piece) -> Iterator[Document | MalformedError]:
        begin, groups = 0, []
        for number, group in enumerate(row_groups(piece.path, text_key=self._text_key)):
            if piece.start <= begin < piece.stop:
                groups.append(number)
            begin += max(group.uncompressed, 1)
        chosen = range(groups[0], groups[-1] + 1) if groups else range(0)
        yield from read_parquet(
            piece.path,
            text_key=self._text_key,
            groups=chosen,
            first_row=piece.first_line,
            limits=self._limits,
        )

    def _converted(self, path: Path, kind: str) -> Document:
        data = read_record(path, self._limits)
        try:
            found = self._convert(data, kind)
        except UnreadableError as error:
            raise MalformedError(1, str(error)) from None
        return Document(tidy(found.text), language=found.language, path=str(path), line=1)

    def _convert(self, data: bytes, kind: str) -> Converted:
        if kind in HTML:
            return html_text(data)
        if kind in MARKDOWN:
            return markdown_text(data)
        if kind == ".pdf":
            if self._pdf is None:
                reader = PdfReader(max_bytes=self._limits.record_bytes, memory_bytes=PDF_MEMORY_BYTES)
                self._pdf = self._stack.enter_context(reader)
            return Converted(self._pdf.text(data))
        return Converted(man_text(data))
