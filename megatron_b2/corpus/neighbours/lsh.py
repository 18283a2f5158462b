"""Locality-sensitive hashing: records by band, partitioned for grouping, and candidate pairs from them.

A record is (hash of a band, document). Records with the same hash in the same band are a bucket. A partition
has the records of one band whose hashes are in one range, so that no bucket is cut: partitions are grouped by
one worker or many, in any number, with the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from megatron_b2 import _cpu
from megatron_b2.corpus.neighbours.minhash import NO_HASH
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.errors import ConfigError

RECORD_SCHEMA = pa.schema([("hash", pa.uint64()), ("document", pa.int64())])
_MAX_RANGES = 1 << 16


def hash_ranges(documents: int, settings: NearDuplicates, *, memory: int) -> int:
    """Ranges that a band is cut into so that grouping one partition takes about `memory` bytes at most.

    A record takes 16 bytes as columns, 16 as it is sorted, and 16 for each pair it may be in.

    Raises:
        ConfigError: if that needs more than 65,536 ranges.
    """
    needed = documents * (32 + 16 * max(1, settings.first + settings.previous))
    ranges = max(1, -(-needed // memory))
    if ranges > _MAX_RANGES:
        raise ConfigError(
            f"memory = {memory:,} bytes is too little to group {documents:,} documents: "
            f"give at least {-(-needed // _MAX_RANGES):,}"
        )
    return ranges


def records(
    signatures: np.ndarray, settings: NearDuplicates, *, first_document: int, ranges: int
) -> list[pa.Table]:
    """The records of N consecutive documents, a table for each of the bands x ranges partitions.

    Args:
        signatures: uint32 [N, permutations].
        first_document: index of the first of them in the corpus.
        ranges: of each band, the same for the whole corpus (`hash_ranges`).

    Raises:
        ConfigError: if `ranges` is not from 1 to 65,536.
    """
    if not 1 <= ranges <= _MAX_RANGES:
        raise ConfigError(f"ranges = {ranges}: must be from 1 to {_MAX_RANGES:,}")
    rows = np.flatnonzero((signatures != NO_HASH).any(axis=1))
    documents = rows + first_document
    tables = []
    for hashes in _cpu.band_hashes(signatures, bands=settings.bands, rows=settings.rows):
        column = hashes[rows]
        prefix = ((column >> np.uint64(48)) * np.uint64(ranges) >> np.uint64(16)).astype(np.uint16)
        order = np.argsort(prefix, kind="stable")
        bounds = np.searchsorted(prefix[order], np.arange(ranges + 1))
        table = pa.table([column[order], documents[order]], schema=RECORD_SCHEMA)
        tables += [table.slice(begin, end - begin) for begin, end in pairwise(bounds)]
    return tables


def candidate_pairs(partition: Sequence[pa.Table], settings: NearDuplicates) -> np.ndarray:
    """Pairs to compare, int64 [E, 2]: sorted, distinct, the smaller document first.

    In a bucket of m documents every one meets the `first` smallest and the `previous` ones before it, at most
    m x (first + previous) pairs, where all pairs would be m^2 / 2.

    Args:
        partition: the tables of one partition, of all parts of the corpus in any order.
    """
    table = pa.concat_tables(partition)
    hashes, documents = (table[name].to_numpy() for name in RECORD_SCHEMA.names)
    return _cpu.candidate_pairs(hashes, documents, first=settings.first, previous=settings.previous)


def distinct_pairs(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The pairs int64 [E, 2] of several partitions together, sorted and without repeats."""
    return _cpu.unique_pairs(np.concatenate([np.empty((0, 2), np.int64), *parts]))
