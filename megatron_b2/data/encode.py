"""One shard of `b2 preprocess`: read, tokenize, write a small `.bin`/`.idx` pair and its tally."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_b2.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megatron_b2.data.manifest import Counts, Tally
from megatron_b2.documents import Document, ReadReport, read_documents, read_line_range
from megatron_b2.documents.shards import Piece
from megatron_b2.documents.texts import Texts
from megatron_b2.files.atomic import write_json
from megatron_b2.tokenizer import Tokenizer, load_tokenizer

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class EncodeJob:
    """What every shard of a run has in common."""

    tokenizer: Path
    """SentencePiece model, or its folder."""
    parts: Path
    """Folder of the shards' files."""
    dtype: str
    """Type of the tokens on disk."""
    text_key: str
    """Key or column of the text."""
    on_error: Literal["skip", "stop"]
    """What a malformed record does."""
    end_of_document: bool
    """Whether documents end in the end-of-document token."""


@dataclass(frozen=True)
class Shard:
    """The n-th part of the work."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)


def part_prefix(job: EncodeJob, number: int) -> Path:
    """Prefix of a shard's `.bin`, `.idx` and `.tally` files."""
    return job.parts / f"{number:06d}"


def encode_shard(job: EncodeJob, shard: Shard) -> Tally:
    """Encode one shard; its `.tally` is written last and marks it as finished."""
    prefix = part_prefix(job, shard.number)
    tokenizer = _tokenizer(job.tokenizer)
    tally, report = Tally(), ReadReport()
    with IndexedDatasetBuilder(prefix, dtype=job.dtype) as builder:
        for batch in _batches(_read(job, shard, report)):
            _encode(batch, tokenizer, builder, tally, end_of_document=job.end_of_document)
    tally.empty, tally.malformed, tally.malformed_examples = report.empty, report.malformed, report.messages
    write_json(prefix.with_suffix(".tally"), asdict(tally))
    return tally


def finished_shard(job: EncodeJob, shard: Shard) -> Tally | None:
    """Tally of a shard that an earlier run finished, or None if it must be (re)done."""
    prefix = part_prefix(job, shard.number)
    try:
        tally = Tally.from_dict(json.loads(prefix.with_suffix(".tally").read_bytes()))
        part = IndexedDataset(prefix)
    except (OSError, ValueError, KeyError, TypeError):  # DataError is a ValueError
        return None
    if job.on_error == "stop" and tally.malformed:
        return None  # encoded under "skip"; now its malformed record must end the run
    written = (part.num_documents, part.num_tokens)
    return tally if written == (tally.total.documents, tally.total.tokens) else None


def fresh_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer as it is now; the shards that this process encodes share it."""
    _tokenizer.cache_clear()
    return _tokenizer(path)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def _read(job: EncodeJob, shard: Shard, report: ReadReport) -> Iterator[Document]:
    for piece in shard.pieces:
        if piece.path.suffix == ".jsonl":
            yield from read_line_range(
                piece.path,
                start=piece.start,
                stop=piece.stop,
                first_line=piece.first_line,
                text_key=job.text_key,
                on_error=job.on_error,
                report=report,
            )
        else:
            yield from read_documents(
                [piece.path], text_key=job.text_key, on_error=job.on_error, report=report
            )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about a megabyte: one call into the tokenizer each."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    batch: list[Document],
    tokenizer: Tokenizer,
    builder: IndexedDatasetBuilder,
    tally: Tally,
    *,
    end_of_document: bool,
) -> None:
    texts = Texts.of(document.text for document in batch)
    ids, offsets = tokenizer.encode_column(texts, eos=end_of_document)
    lengths = np.diff(offsets)
    builder.add_documents(ids, lengths)
    counts: dict[tuple[str, str], Counts] = defaultdict(Counts)
    for document, length, size in zip(batch, lengths.tolist(), np.diff(texts.offsets).tolist(), strict=True):
        count = counts[document.language, document.source]
        count.documents += 1
        count.tokens += length
        count.text_bytes += size
    for (language, source), count in counts.items():
        tally.count(count, language=language, source=source)
