"""Groups records by hash: which parts have an equal one before them in the corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from megatron_b2 import _cpu
from megatron_b2.corpus.spans.records import RECORD
from megatron_b2.errors import InputError
from megatron_b2.files.atomic import atomic_file

REPEAT: Final = np.dtype([("place", np.uint64), ("first", np.uint64)])
"""A part that is repeated, and the place of its first occurrence."""

_LAST: Final = (1 << 64) - 1
_SEARCH_BITS: Final = 12
"""Ranges of hashes are at least 2^-12 of all, unless one such range alone is too large."""


def find_repeats(records: Sequence[np.ndarray], *, more_than: int = 1) -> np.ndarray:
    """All records but the first of each hash that has more than `more_than` of them.

    Args:
        records: arrays of RECORD, in any order and number: the result is the same.

    Returns:
        REPEAT [M], in the order of the places.
    """
    repeats: np.ndarray = _cpu.find_repeats(_cpu.sort_records(list(records)), more_than=more_than)
    return repeats


class RepeatFinder:
    """`find_repeats` over more records than fit memory.

    Added records wait in memory up to a quarter of the limit, then are sorted and written to a file of
    `folder`. The repeats come range by range of the hash, each read from all files at once; ranges are as
    wide as the memory allows, and records of one hash are in one range. Memory must hold all records of the
    most frequent text.
    """

    def __init__(self, folder: Path, *, memory_bytes: int, more_than: int = 1) -> None:
        self._folder = folder
        self._more_than = more_than
        self._limit = max(1, memory_bytes // RECORD.itemsize // 4)
        self._waiting: list[np.ndarray] = []
        self._count = 0
        self._files: list[Path] = []

    def add(self, records: np.ndarray) -> None:
        """Take an array of RECORD. Raises OutputError if the disk refuses what does not fit memory."""
        for start in range(0, len(records), self._limit):
            piece = records[start : start + self._limit]
            if self._count + len(piece) > self._limit:
                self._spill()
            self._waiting.append(piece.copy())
            self._count += len(piece)

    def repeats(self) -> Iterator[np.ndarray]:
        """REPEAT arrays of disjoint ranges of hashes, each in the order of its places.

        Raises InputError if a file of records was damaged.
        """
        if not self._files:
            yield find_repeats(self._waiting, more_than=self._more_than)
            return
        self._spill()
        sorted_files = [_read(path) for path in self._files]
        for low, high in self._ranges(sorted_files, 0, 1 << _SEARCH_BITS, 64 - _SEARCH_BITS):
            pieces = [file[_bounds(file, low, high)] for file in sorted_files]
            yield find_repeats(pieces, more_than=self._more_than)

    def _spill(self) -> None:
        together = _cpu.sort_records(self._waiting)
        self._waiting, self._count = [], 0
        path = self._folder / f"records-{len(self._files):06d}.npy"
        with atomic_file(path) as stream:
            np.save(stream, together)
        self._files.append(path)

    def _ranges(
        self, files: Sequence[np.ndarray], first: int, last: int, shift: int
    ) -> Iterator[tuple[int, int]]:
        """Bounds of ranges from first << shift to last << shift, with no more records than the limit."""
        edges = np.array([number << shift for number in range(first, last)], np.uint64)
        counts = [_cpu.count_below(file, edges) for file in files]
        ends = [_bounds(file, 0, last << shift).stop for file in files]
        total = np.append(np.sum(counts, axis=0), sum(ends))
        begin = 0
        while begin < last - first:
            end = max(begin + 1, int(np.searchsorted(total, total[begin] + self._limit, side="right")) - 1)
            if total[end] - total[begin] > self._limit and shift > 0:
                finer = min(_SEARCH_BITS, shift)
                yield from self._ranges(
                    files, (first + begin) << finer, (first + end) << finer, shift - finer
                )
            else:
                yield (first + begin) << shift, (first + end) << shift
            begin = end


def _bounds(file: np.ndarray, low: int, high: int) -> slice:
    """The records of a sorted file in a range of hashes."""
    below = _cpu.count_below(file, np.array([low, min(high, _LAST)], np.uint64))
    return slice(int(below[0]), len(file) if high > _LAST else int(below[1]))


def _read(path: Path) -> np.ndarray:
    try:
        records = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a file of records ({error}); run the grouping again") from None
    if records.dtype != RECORD or records.ndim != 1:
        raise InputError(f"{path}: {records.dtype} {records.shape} are no records; run the grouping again")
    return records
