"""Duplicates by meaning inside clusters, after SemDeDup (Abbas et al. 2023), with a rule for who stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_b2.errors import InputError

BLOCK_ROWS = 1_024


@dataclass(frozen=True)
class SemanticDuplicates:
    """Verdicts on N documents."""

    duplicate_of: np.ndarray
    """int64 [N]: the document that stays in its place; -1 for a document that stays."""
    cosine: np.ndarray
    """float32 [N]: cosine with that document; NaN for a document that stays."""

    @property
    def kept(self) -> np.ndarray:
        """bool [N]: whether a document stays."""
        return self.duplicate_of < 0


def find_semantic_duplicates(
    vectors: np.ndarray,
    clusters: np.ndarray,
    *,
    threshold: float,
    quality: np.ndarray | None = None,
    block_rows: int = BLOCK_ROWS,
) -> SemanticDuplicates:
    """Duplicates among documents of one cluster: those whose cosine reaches `threshold`.

    `vectors` float16 or float32 [N, D], rows of length 1 (e.g. a memory map), `clusters` int [N], `quality`
    float [N]. In the order of falling quality (NaN last; ties: the lowest index first) a document stays
    unless its cosine with one that stays reaches `threshold`; then it is a duplicate of the most similar of
    those (ties: the best). So no two that stay reach the threshold, and every duplicate reaches it with the
    one it names. A row of zeros is nobody's duplicate.

    Memory: `block_rows` rows twice and their products. Cosines are float32 sums; a pair closer to the
    threshold than 1e-6 may be decided otherwise on another machine. Raises InputError for shapes that do
    not fit and a threshold outside of (0, 1].
    """
    count = len(vectors)
    order_key = np.zeros(count) if quality is None else np.asarray(quality, np.float64)
    if vectors.ndim != 2 or clusters.shape != (count,) or order_key.shape != (count,):
        raise InputError(
            f"vectors {vectors.shape}, clusters {clusters.shape} and quality {order_key.shape} do not fit"
        )
    if not 0 < threshold <= 1:
        raise InputError(f"threshold = {threshold}: must be above 0, at most 1")
    found = SemanticDuplicates(np.full(count, -1, np.int64), np.full(count, np.nan, np.float32))
    falling = -np.nan_to_num(order_key, nan=-np.inf)
    order = np.lexsort((np.arange(count), falling, clusters))
    bounds = np.flatnonzero(np.diff(clusters[order])) + 1
    for members in np.split(order, bounds):
        _one_cluster(vectors, members, threshold, block_rows, found)
    return found


def _one_cluster(
    vectors: np.ndarray, members: np.ndarray, threshold: float, block_rows: int, found: SemanticDuplicates
) -> None:
    """Verdicts on `members`, in the order in which they may stay."""
    stays = np.empty(0, np.int64)
    for start in range(0, len(members), block_rows):
        block = members[start : start + block_rows]
        rows = np.asarray(vectors[block], np.float32)
        for earlier, others in _blocks(vectors, stays, block_rows):
            _note(found, block, earlier, rows @ others.T, threshold)
        inside = rows @ rows.T
        for i, document in enumerate(block):
            if found.duplicate_of[document] < 0:
                later = block[i + 1 :]
                _note(found, later, block[i : i + 1], inside[i + 1 :, i : i + 1], threshold)
        stays = np.concatenate([stays, block[found.duplicate_of[block] < 0]])


def _blocks(vectors: np.ndarray, rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        yield chosen, np.asarray(vectors[chosen], np.float32)


def _note(
    found: SemanticDuplicates,
    documents: np.ndarray,
    stays: np.ndarray,
    cosines: np.ndarray,
    threshold: float,
) -> None:
    """Documents that reach the threshold with one of `stays`, more than with those before."""
    if not cosines.size:
        return
    nearest = cosines.argmax(axis=1)
    best = cosines[np.arange(len(documents)), nearest]
    before = np.nan_to_num(found.cosine[documents], nan=-np.inf)
    chosen = (best >= threshold) & (best > before)
    found.duplicate_of[documents[chosen]] = stays[nearest[chosen]]
    found.cosine[documents[chosen]] = best[chosen]
