"""Records (hash, place) of documents, paragraphs, runs of sentences and sentences.

A place is the index of a document in the corpus and the index of the part in it, in one uint64 whose order is
the order of the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from megatron_b2 import _cpu
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import ConfigError

RECORD: Final = np.dtype([("high", np.uint64), ("low", np.uint64), ("place", np.uint64)])
"""24 bytes: the hash of a part, and its place."""

POSITION_BITS: Final = 24
"""A document has at most 2^24 parts of a kind (the last takes the rest), a corpus 2^40 documents."""


def place_of(document: np.ndarray | int, position: np.ndarray | int = 0) -> np.ndarray:
    """Places uint64 of parts."""
    return (np.asarray(document, np.uint64) << np.uint64(POSITION_BITS)) | np.asarray(position, np.uint64)


def document_of(place: np.ndarray) -> np.ndarray:
    """Indexes int64 of the documents of places."""
    return (place >> np.uint64(POSITION_BITS)).astype(np.int64)


def position_of(place: np.ndarray) -> np.ndarray:
    """Indexes int64 of parts in their documents."""
    return (place & np.uint64((1 << POSITION_BITS) - 1)).astype(np.int64)


@dataclass(frozen=True)
class SpanLimits:
    """Which parts are compared. Lengths are in bytes of folded text (`fold_text`): a Han character has 3."""

    paragraph_bytes: int = 64
    """Shorter paragraphs stay. Our choice, as all of these except the run length."""
    run_length: int = 3
    """Sentences in a row that go together when they occur again (C4: 3); 0 leaves runs out."""
    run_bytes: int = 64
    """Shorter runs stay: three lines of closing brackets are no copy."""
    sentence_bytes: int = 32
    """Shorter sentences are no boilerplate, however often they occur."""
    sentence_count: int = 100
    """A sentence that occurs more often in the corpus is boilerplate: its first occurrence stays. 0 leaves
    this out."""

    def __post_init__(self) -> None:
        """Raises ConfigError with all settings that are negative or no integers."""
        problems = [
            f"{field.name} = {value!r} must be an integer of at least 0"
            for field in fields(self)
            if not isinstance(value := getattr(self, field.name), int) or isinstance(value, bool) or value < 0
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Records:
    """Structured arrays of RECORD, in the order of their places."""

    documents: np.ndarray
    paragraphs: np.ndarray
    runs: np.ndarray
    """A run stands at its first sentence."""
    sentences: np.ndarray


def record_spans(texts: Texts, documents: np.ndarray, limits: SpanLimits) -> Records:
    """Split, fold and hash N texts in one pass.

    Args:
        documents: int64 [N]: index of each in the corpus, ascending.

    Raises:
        ValueError: if `documents` do not ascend. IndexError: if one is not below 2^40.
    """
    return Records(
        *_cpu.record_spans(
            texts.data,
            texts.offsets,
            np.ascontiguousarray(documents, np.int64),
            paragraph_bytes=limits.paragraph_bytes,
            run_length=limits.run_length,
            run_bytes=limits.run_bytes,
            sentence_bytes=limits.sentence_bytes if limits.sentence_count else -1,
        )
    )


def split_by_hash(records: np.ndarray, parts: int) -> list[np.ndarray]:
    """`parts` <= 65,536 arrays of equal shares of the range of hashes: equal texts are in parts of one
    number."""
    part = ((records["high"] >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.uint16)
    order = np.argsort(part, kind="stable")  # a radix sort, as the type has two bytes
    bounds = np.searchsorted(part[order], np.arange(1, parts))
    return np.split(records[order], bounds)
