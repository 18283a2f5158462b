"""The S-curve in closed form and by simulation; records and candidate pairs against Python dictionaries."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2 import _cpu
from megatron_b2.corpus.neighbours.lsh import (
    RECORD_SCHEMA,
    candidate_pairs,
    distinct_pairs,
    hash_ranges,
    records,
)
from megatron_b2.corpus.neighbours.minhash import NO_HASH
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.errors import ConfigError

SETTINGS = NearDuplicates(bands=16, rows=8)
RECORDS = st.lists(st.tuples(st.integers(0, 6).map(lambda h: h << 60 | h), st.integers(0, 30)), max_size=60)


def table(rows: list[tuple[int, int]]) -> pa.Table:
    return pa.table(
        [np.array([h for h, _ in rows], np.uint64), np.array([d for _, d in rows], np.int64)],
        schema=RECORD_SCHEMA,
    )


def python_pairs(rows: list[tuple[int, int]], first: int, previous: int) -> list[list[int]]:
    buckets = defaultdict(list)
    for value, document in sorted(rows, key=lambda row: row[1]):
        buckets[value].append(document)
    pairs = set()
    for bucket in buckets.values():
        for i, document in enumerate(bucket):
            others = [*bucket[: min(i, first)], *bucket[max(0, i - previous) : i]]
            pairs |= {(other, document) for other in others if other != document}
    return [list(pair) for pair in sorted(pairs)]


def random_signatures(rows: int, chance: np.random.Generator) -> np.ndarray:
    return chance.integers(0, 1 << 32, (rows, SETTINGS.permutations), np.uint32)


def test_s_curve() -> None:
    similarity = np.array([0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    expected = [1 - (1 - s**8) ** 16 for s in similarity]
    assert SETTINGS.probability(similarity) == pytest.approx(expected, abs=1e-12)
    assert NearDuplicates(bands=1, rows=1).probability(0.37) == pytest.approx(0.37)
    # The closed form of the mean for one row: 1 - (1 - s)^b integrates to s + (1 - s)^(b + 1) / (b + 1).
    one = NearDuplicates(bands=7, rows=1, threshold=0.3)
    mean = (1 - (0.3 + 0.7**8 / 8)) / 0.7
    assert one.expected_recall() == pytest.approx(mean, abs=1e-6)
    assert SETTINGS.expected_recall() > 0.99


def test_bands_find_as_many_pairs_as_the_s_curve_says() -> None:
    chance = np.random.default_rng(0)
    pairs = 4000
    for similarity in (0.6, 0.7, 0.8, 0.9):
        left = random_signatures(pairs, chance)
        right = np.where(chance.random(left.shape) < similarity, left, random_signatures(pairs, chance))
        hashes = [_cpu.band_hashes(side, bands=16, rows=8) for side in (left, right)]
        found = (hashes[0] == hashes[1]).any(axis=0).mean()
        expected = SETTINGS.probability(similarity)
        assert abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / pairs) + 1e-9


def test_a_band_hash_depends_on_its_rows_alone() -> None:
    left = random_signatures(1, np.random.default_rng(1))
    hashes = _cpu.band_hashes(left, bands=16, rows=8)
    for column in range(SETTINGS.permutations):
        changed = left.copy()
        changed[0, column] ^= 1
        different = np.flatnonzero(_cpu.band_hashes(changed, bands=16, rows=8)[:, 0] != hashes[:, 0])
        assert different.tolist() == [column // 8]
    repeated = np.tile(left[:, :8], 16)
    assert len(np.unique(_cpu.band_hashes(repeated, bands=16, rows=8))) == 16


@pytest.mark.parametrize("ranges", [1, 3, 8, 1000])
def test_partitions_hold_every_record_once_and_no_bucket_twice(ranges: int) -> None:
    signatures = random_signatures(50, np.random.default_rng(2))
    signatures[[0, 7]] = NO_HASH
    signatures[20] = signatures[11]
    partitions = records(signatures, SETTINGS, first_document=1000, ranges=ranges)
    assert len(partitions) == 16 * ranges
    hashes = _cpu.band_hashes(signatures, bands=16, rows=8)
    for band in range(16):
        found, range_of = [], {}
        for number in range(ranges):
            part = partitions[band * ranges + number]
            for value, document in zip(part["hash"].to_pylist(), part["document"].to_pylist(), strict=True):
                found.append((value, document))
                assert range_of.setdefault(value, number) == number == (value >> 48) * ranges >> 16
        expected = [(int(hashes[band, i]), 1000 + i) for i in range(50) if i not in (0, 7)]
        assert sorted(found) == sorted(expected)


@given(RECORDS, st.integers(1, 4), st.integers(0, 4), st.integers(0, 60))
def test_candidates_are_those_of_a_dictionary(
    rows: list[tuple[int, int]], first: int, previous: int, cut: int
) -> None:
    settings = NearDuplicates(first=first, previous=previous)
    found = candidate_pairs([table(rows[cut:]), table(rows[:cut])], settings)
    assert found.tolist() == python_pairs(rows, first, previous)


def test_small_buckets_lose_no_pair_and_large_ones_stay_linear() -> None:
    for size in (2, 9, 10, 5000):
        found = candidate_pairs([table([(5, i) for i in range(size)])], SETTINGS)
        if size <= 9:
            assert found.tolist() == [list(pair) for pair in itertools.combinations(range(size), 2)]
        assert len(found) <= size * (SETTINGS.first + SETTINGS.previous)


def test_many_records_are_grouped_like_numpy_groups_them() -> None:
    chance = np.random.default_rng(3)
    hashes = chance.integers(0, 1 << 64, 30_000, np.uint64)[chance.integers(0, 30_000, 100_000)]
    documents = chance.permutation(100_000)
    found = _cpu.candidate_pairs(hashes, documents, first=100, previous=0)
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    assert len(found) == (counts * (counts - 1) // 2).sum()
    of_document = np.empty(100_000, np.int64)
    of_document[documents] = group
    assert (of_document[found[:, 0]] == of_document[found[:, 1]]).all()
    assert (found[:, 0] < found[:, 1]).all()


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8), max_size=4))
def test_distinct_pairs(parts: list[list[tuple[int, int]]]) -> None:
    arrays = [np.array(part, np.int64).reshape(-1, 2) for part in parts]
    assert distinct_pairs(arrays).tolist() == [list(pair) for pair in sorted(set(itertools.chain(*parts)))]


def test_ranges_follow_the_memory() -> None:
    assert hash_ranges(0, SETTINGS, memory=1) == 1
    assert hash_ranges(1000, SETTINGS, memory=160_000) == 1
    assert hash_ranges(1001, SETTINGS, memory=160_000) == 2
    assert hash_ranges(10**9, SETTINGS, memory=1 << 30) == 150
    with pytest.raises(ConfigError, match=r"memory = 1,000 bytes is too little .* give at least 2,442"):
        hash_ranges(10**6, SETTINGS, memory=1000)
    assert hash_ranges(10**6, SETTINGS, memory=2442) <= 1 << 16
    with pytest.raises(ConfigError, match="ranges = 0"):
        records(np.zeros((1, 128), np.uint32), SETTINGS, first_document=0, ranges=0)
