"""Exact Jaccard similarity of candidate pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from megatron_b2 import _cpu
from megatron_b2.corpus.neighbours.han import characters
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import DataError


@dataclass(frozen=True)
class ShingleSets:
    """The shingle sets of M documents."""

    documents: np.ndarray
    """int64 [M], ascending."""
    values: np.ndarray
    """uint64 [S]: the sets behind each other, each sorted."""
    offsets: np.ndarray
    """int64 [M + 1]: where each set starts in `values`, and where the last one ends."""

    @classmethod
    def of(cls, texts: Texts, documents: np.ndarray, settings: NearDuplicates) -> ShingleSets:
        """Of texts [M] with the indices `documents`, int64 [M], ascending."""
        values, offsets = _cpu.shingle_sets(
            texts.data,
            texts.offsets,
            length=settings.ngram,
            characters=characters(settings.across_scripts),
        )
        return cls(documents, values, offsets)

    def to_arrow(self) -> pa.Table:
        """Columns document (int64) and shingles (list of uint64); not copied."""
        shingles = pa.LargeListArray.from_arrays(pa.array(self.offsets), pa.array(self.values))
        return pa.table({"document": self.documents, "shingles": shingles})

    @classmethod
    def of_arrow(cls, table: pa.Table) -> ShingleSets:
        """From a table of `to_arrow`; a single chunk is not copied."""
        column = table["shingles"].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        return cls(table["document"].to_numpy(), column.values.to_numpy(), column.offsets.to_numpy())


@dataclass(frozen=True)
class Edges:
    """Pairs of duplicates."""

    pairs: np.ndarray
    """int64 [E, 2], the smaller document first."""
    jaccard: np.ndarray
    """float64 [E]: their similarity, exact."""


def verified(pairs: np.ndarray, sets: Sequence[ShingleSets], settings: NearDuplicates) -> Edges:
    """Those of the candidate `pairs`, int64 [E, 2], whose similarity reaches the threshold.

    Args:
        sets: of all documents of the pairs; batches in ascending order of documents.

    Raises:
        DataError: if the set of a document is missing.
    """
    documents = np.concatenate([np.empty(0, np.int64), *(batch.documents for batch in sets)])
    numbers = np.searchsorted(documents, pairs)
    known = numbers < len(documents)
    known[known] = documents[numbers[known]] == pairs[known]
    if not known.all():
        raise DataError(
            f"{(~known).sum():,} documents of candidate pairs have no shingle set, the first is "
            f"{pairs[~known][0]}: the sets must come from the same corpus as the pairs"
        )
    jaccard = _cpu.jaccard([(batch.values, batch.offsets) for batch in sets], numbers)
    kept = jaccard >= settings.threshold
    return Edges(pairs[kept], jaccard[kept])
