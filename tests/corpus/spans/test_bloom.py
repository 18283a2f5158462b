"""The Bloom filter: never a wrong "no", and wrong "yes" as often as the closed form says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2 import _cpu
from megatron_b2.corpus.spans import BloomFilter, bloom_rate
from megatron_b2.errors import ConfigError, InputError


def hashes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 64, (count, 2), np.uint64)


@pytest.mark.parametrize("rate", [0.1, 1e-2, 1e-3])
def test_wrong_yes_as_often_as_computed(rate: float) -> None:
    keys, others = 100_000, 400_000
    bloom = BloomFilter.for_keys(keys, false_positive_rate=rate)
    bloom.add(hashes(keys, 0))
    computed = bloom_rate(64 * len(bloom.bits) / keys, bloom.probes)
    assert 0.9 * rate < computed <= rate
    wrong = int(bloom.contains(hashes(others, 1)).sum())
    # Six standard deviations, widened as keys of one block are wrong together.
    assert abs(wrong - others * computed) < 6 * (2 * others * computed) ** 0.5 + 0.03 * others * computed


@pytest.mark.parametrize(("bits", "probes"), [(8, 5), (12, 7), (20, 3)])
def test_closed_form_by_simulation(bits: float, probes: int) -> None:
    """Blocks of 512 bits with Poisson many keys, filled by numpy's generator instead of our hash."""
    generator = np.random.default_rng(7)
    rates = []
    for keys in generator.poisson(512 / bits, 4_000):
        filled = np.zeros(512, bool)
        filled[generator.integers(0, 512, keys * probes)] = True
        rates.append(filled.mean() ** probes)
    error = np.std(rates) / len(rates) ** 0.5
    assert abs(np.mean(rates) - bloom_rate(bits, probes)) < 5 * error + 1e-4


def test_a_blocked_filter_costs_a_little_more_than_a_plain_one() -> None:
    bloom = BloomFilter.for_keys(1_000_000, false_positive_rate=1e-3)
    plain = -np.log(1e-3) / np.log(2) ** 2
    assert plain < 64 * len(bloom.bits) / 1_000_000 < 1.25 * plain


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5), rate=st.floats(1e-6, 0.5))
def test_never_a_wrong_no(sizes: list[int], rate: float) -> None:
    bloom = BloomFilter.for_keys(sum(sizes) + 1, false_positive_rate=rate)
    batches = [hashes(size, i) for i, size in enumerate(sizes)]
    for batch in batches:
        bloom.add(batch)
    for batch in batches:
        assert bloom.contains(batch).all()
        assert bloom.add(batch).all()


def test_add_says_what_was_there() -> None:
    bloom = BloomFilter.for_keys(1_000, false_positive_rate=1e-6)
    batch = hashes(500, 0)
    assert not bloom.contains(batch).any()
    assert not bloom.add(batch).any()
    again = np.concatenate([batch[:7], hashes(3, 5), batch[:1]])
    assert bloom.add(again).tolist() == [True] * 7 + [False] * 3 + [True]
    twice = np.repeat(hashes(1, 9), 2, axis=0)
    assert bloom.add(twice).tolist() == [False, True]
    assert bloom.added == 504
    assert not bloom.is_overfull


def test_an_overfull_filter_says_so() -> None:
    bloom = BloomFilter.for_keys(100, false_positive_rate=0.01)
    bloom.add(hashes(300, 0))
    assert bloom.is_overfull


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "earlier.bloom"
    bloom = BloomFilter.for_keys(5_000, false_positive_rate=1e-4)
    bloom.add(hashes(4_000, 0))
    bloom.save(path)
    loaded = BloomFilter.load(path)
    assert (loaded.probes, loaded.keys, loaded.added) == (bloom.probes, 5_000, bloom.added)
    assert (loaded.bits == bloom.bits).all()
    assert loaded.contains(hashes(4_000, 0)).all()
    with pytest.raises(ValueError, match="not writeable"):
        loaded.add(hashes(1, 1))
    writable = BloomFilter.load(path, writable=True)
    writable.add(hashes(10, 1))
    assert writable.contains(hashes(10, 1)).all()
    assert (BloomFilter.load(path).bits == bloom.bits).all()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "earlier.bloom"
    BloomFilter.for_keys(5_000, false_positive_rate=1e-4).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:100], b"", b"x" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"earlier.bloom: not a Bloom filter"):
            BloomFilter.load(path)
    with pytest.raises(InputError, match="not a Bloom filter"):
        BloomFilter.load(tmp_path / "none")


def test_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        BloomFilter.for_keys(0, false_positive_rate=1.0)
    assert caught.value.problems == (
        "keys = 0 must be at least 1",
        "false_positive_rate = 1.0 must be between 0 and 1",
    )
    with pytest.raises(ConfigError, match="1e-30 is too small"):
        BloomFilter.for_keys(10, false_positive_rate=1e-30)


def test_bad_arrays_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"uint64 \[8 B\], B > 0, not 9 words"):
        _cpu.bloom_contains(np.zeros(9, np.uint64), hashes(1, 0), probes=3)
    with pytest.raises(ValueError, match=r"hashes must be uint64 \[N, 2\]"):
        _cpu.bloom_contains(np.zeros(8, np.uint64), np.zeros(4, np.uint64), probes=3)
    with pytest.raises(ValueError, match="at least one probe, not 0"):
        _cpu.bloom_contains(np.zeros(8, np.uint64), hashes(1, 0), probes=0)
