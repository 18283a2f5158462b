"""Grouping of records: against pyarrow's group-by, in any partition, within any memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2 import _cpu
from megatron_b2.corpus.spans import (
    RECORD,
    REPEAT,
    RepeatFinder,
    SpanLimits,
    document_of,
    find_repeats,
    place_of,
    position_of,
    record_spans,
    split_by_hash,
)
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import ConfigError, InputError


def random_records(count: int, *, keys: int, seed: int = 0) -> np.ndarray:
    """`count` records with different places in random order, drawn from `keys` hashes with a long tail."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 1 << 64, (keys, 2), np.uint64)
    hashes[: keys // 4, 0] = hashes[0, 0]  # the upper half alone must not decide
    hashes[: keys // 8, 0] |= np.uint64(1 << 63)
    chosen = np.minimum(generator.pareto(1.0, count) * keys / 8, keys - 1).astype(np.int64)
    records = np.empty(count, RECORD)
    records["high"], records["low"] = hashes[chosen, 0], hashes[chosen, 1]
    records["place"] = generator.permutation(count) * 1_000_003
    return records


def arrow_repeats(records: np.ndarray, more_than: int) -> list[tuple[int, int]]:
    """By pyarrow: first place and size of each group, joined to all its records."""
    table = pa.table({name: np.ascontiguousarray(records[name]) for name in RECORD.names or ()})
    groups = table.group_by(["high", "low"]).aggregate([("place", "min"), ("place", "count")])
    joined = table.join(groups, ["high", "low"]).to_pydict()
    rows = zip(joined["place"], joined["place_min"], joined["place_count"], strict=True)
    return sorted((place, first) for place, first, count in rows if count > more_than and place != first)


@pytest.mark.parametrize("more_than", [1, 2, 50])
@pytest.mark.parametrize(("count", "keys"), [(0, 8), (1, 8), (63, 8), (5_000, 64), (40_000, 9_000)])
def test_repeats_are_those_of_pyarrow(count: int, keys: int, more_than: int) -> None:
    records = random_records(count, keys=keys)
    found = find_repeats([records], more_than=more_than)
    assert found.dtype == REPEAT
    assert [tuple(pair) for pair in found.tolist()] == arrow_repeats(records, more_than)


def test_records_sort_as_numpy_sorts_them() -> None:
    for count in (0, 1, 64, 65, 1_000, 30_000):
        records = random_records(count, keys=max(8, count // 3))
        expected = records[np.lexsort((records["place"], records["low"], records["high"]))]
        for pieces in ([records], np.array_split(records, 3)):
            assert (_cpu.sort_records(list(pieces)) == expected).all()


def test_records_of_one_hash() -> None:
    records = np.zeros(10_000, RECORD)
    records["place"] = np.random.default_rng(0).permutation(10_000)
    found = find_repeats([records])
    assert found["place"].tolist() == list(range(1, 10_000))
    assert not found["first"].any()


@pytest.mark.parametrize("memory", [1, 24 * 4 * 100, 24 * 4 * 1_000, 1 << 30])
@pytest.mark.parametrize("batch", [700, 6_000])
def test_memory_and_batches_do_not_matter(tmp_path: Path, memory: int, batch: int) -> None:
    count = 60 if memory == 1 else 6_000
    records = random_records(count, keys=count // 5)
    finder = RepeatFinder(tmp_path, memory_bytes=memory)
    for start in range(0, count, batch):
        finder.add(records[start : start + batch])
    ranges = list(finder.repeats())
    found = np.sort(np.concatenate(ranges), order="place")
    assert (found == find_repeats([records])).all()
    spilled = count > max(1, memory // 96)
    assert bool(list(tmp_path.iterdir())) == spilled
    assert (len(ranges) > 5) == spilled


def test_ranges_hold_no_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = _cpu.find_repeats

    def counted(records: np.ndarray, *, more_than: int) -> np.ndarray:
        sizes.append(len(records))
        result: np.ndarray = original(records, more_than=more_than)
        return result

    monkeypatch.setattr(_cpu, "find_repeats", counted)
    generator = np.random.default_rng(1)
    records = np.empty(50_000, RECORD)
    records["high"] = generator.integers(
        0, 1 << 20, 50_000
    )  # all in one range of 2^-12 of the hashes, and of 2^-40
    records["low"] = 0
    records["place"] = np.arange(50_000)
    finder = RepeatFinder(tmp_path, memory_bytes=96 * 2_000)
    finder.add(records)
    found = np.sort(np.concatenate(list(finder.repeats())), order="place")
    assert sum(sizes) == 50_000
    assert max(sizes) <= 2_000
    assert (found == find_repeats([records])).all()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    finder = RepeatFinder(tmp_path, memory_bytes=96 * 10)
    finder.add(random_records(100, keys=10))
    path = sorted(tmp_path.iterdir())[2]
    path.write_bytes(path.read_bytes()[:-24])
    with pytest.raises(InputError, match=rf"{path.name}: not a file of records .*run the grouping again"):
        list(finder.repeats())
    np.save(path, np.zeros(3))
    with pytest.raises(InputError, match=r"float64 \(3,\) are no records"):
        list(finder.repeats())


@given(parts=st.integers(1, 300), seed=st.integers(0, 9))
@settings(max_examples=30)
def test_parts_by_hash(parts: int, seed: int) -> None:
    records = random_records(500, keys=40, seed=seed)
    pieces = split_by_hash(records, parts)
    assert len(pieces) == parts
    assert sorted(np.concatenate(pieces).tolist()) == sorted(records.tolist())
    highs = [set(piece["high"].tolist()) for piece in pieces]
    assert sum(map(len, highs)) == len(set().union(*highs))
    flat = [high for group in highs for high in sorted(group)]
    assert flat == sorted(flat)
    found = np.concatenate([find_repeats([piece]) for piece in pieces])
    assert (np.sort(found, order="place") == find_repeats([records])).all()


@given(document=st.integers(0, 2**40 - 1), position=st.integers(0, 2**24 - 1))
def test_places_hold_document_and_position(document: int, position: int) -> None:
    place = place_of(np.array([document]), np.array([position]))
    assert place.dtype == np.uint64
    assert (document_of(place).tolist(), position_of(place).tolist()) == ([document], [position])


def test_limits_are_checked_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SpanLimits(paragraph_bytes=-1, run_length=2.5, sentence_count=True)  # type: ignore[arg-type]
    assert caught.value.problems == (
        "paragraph_bytes = -1 must be an integer of at least 0",
        "run_length = 2.5 must be an integer of at least 0",
        "sentence_count = True must be an integer of at least 0",
    )


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([0], "2 texts need as many documents, not 1"),
        ([3, 3], "in the order of the corpus"),
        ([5, 2], "in the order"),
    ],
)
def test_documents_must_fit(documents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_spans(Texts.of(["a", "b"]), np.array(documents), SpanLimits())


@pytest.mark.parametrize("documents", [[-1, 2], [1, 1 << 40]])
def test_documents_must_fit_40_bits(documents: list[int]) -> None:
    with pytest.raises(IndexError, match="not all between 0 and 2\\^40"):
        record_spans(Texts.of(["a", "b"]), np.array(documents), SpanLimits())


def test_levels_that_are_off_have_no_records() -> None:
    texts = Texts.of(["One two three. Four five six. Seven eight nine. " * 3])
    limits = SpanLimits(paragraph_bytes=0, run_bytes=0, sentence_bytes=0)
    records = record_spans(texts, np.array([7]), limits)
    assert [len(x) for x in (records.documents, records.paragraphs, records.runs, records.sentences)] == [
        1,
        1,
        7,
        9,
    ]
    assert set(document_of(records.sentences["place"]).tolist()) == {7}
    off = record_spans(texts, np.array([7]), SpanLimits(run_length=0, sentence_count=0))
    assert len(off.runs) == len(off.sentences) == 0
