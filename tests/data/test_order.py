"""The order of samples: bijection, balance, randomness, 64-bit range."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.data.order import WEIGHT_UNITS, Blend, derive_key, permute
from megatron_b2.errors import ConfigError

weights_strategy = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=24)


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64))
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    image = permute(np.arange(size), size=size, key=derive_key(seed))
    assert sorted(image.tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 2**40),
    raw=st.lists(st.integers(0, 2**62), min_size=1, max_size=64),
    seed=st.integers(0, 99),
)
def test_permutation_is_random_access_up_to_2_40(size: int, raw: list[int], seed: int) -> None:
    index = np.unique(np.array(raw, dtype=np.int64) % size)
    key = derive_key(seed)
    image = permute(index, size=size, key=key)
    assert image.min() >= 0
    assert image.max() < size
    assert np.unique(image).size == index.size
    one_by_one = [int(permute(index[i : i + 1], size=size, key=key)[0]) for i in range(index.size)]
    assert image.tolist() == one_by_one


def test_permutation_matches_a_scalar_reference() -> None:
    """The same network in plain Python integers."""

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    def walk(index: int, size: int, key: int) -> int:
        half = 1
        while 4**half < size:
            half += 1
        while True:
            left, right = index >> half, index % 2**half
            for turn in range(8):
                keyed = mix((right + mix((key + turn * 0x9E3779B97F4A7C15) % 2**64)) % 2**64)
                left, right = right, left ^ (keyed % 2**half)
            index = (left << half) | right
            if index < size:
                return index

    for size in (1, 2, 5, 16, 17, 1000, 2**39 + 7):
        index = np.arange(0, size, max(1, size // 20))
        key = derive_key(7, 0, 3)
        assert permute(index, size=size, key=key).tolist() == [walk(int(i), size, int(key[0])) for i in index]


def test_permutation_looks_random() -> None:
    """Over many keys each image of one index is about equally likely (chi-square), and neighbours part."""
    size, keys = 50, derive_key(1, np.arange(20_000))
    image = permute(np.full(20_000, 13), size=size, key=keys)
    expected = 20_000 / size
    chi_square = float(((np.bincount(image, minlength=size) - expected) ** 2 / expected).sum())
    assert chi_square < 49 + 5 * (2 * 49) ** 0.5
    walk = permute(np.arange(100_000), size=100_000, key=derive_key(2)).astype(np.float64)
    assert abs(np.corrcoef(walk[:-1], walk[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(walk, np.arange(100_000))[0, 1]) < 0.02


def test_keys_differ_by_every_part() -> None:
    keys = {
        int(derive_key(*parts)[0])
        for parts in ((1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2, 4), (1, 2), (1, 2, 3, 0))
    }
    assert len(keys) == 6
    epochs = derive_key(9, 0, np.array([4, 5]))
    assert epochs.tolist() == [int(derive_key(9, 0, 4)[0]), int(derive_key(9, 0, 5)[0])]


def test_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"leaves range\(3\)"):
        permute(np.array([3]), size=3, key=derive_key(0))


@settings(max_examples=60, deadline=None)
@given(weights=weights_strategy)
def test_every_prefix_is_balanced(weights: list[float]) -> None:
    """|count - n * weight| < 2 for each prefix (1/2 for two sources); locate agrees with a running count."""
    blend, num = Blend(weights), 3000
    sources, counts = blend.locate(np.arange(num))
    dealt = np.zeros((num + 1, len(weights)), dtype=np.int64)
    np.add.at(dealt[1:], (np.arange(num), sources), 1)
    dealt = dealt.cumsum(axis=0)
    assert (counts == dealt[np.arange(num), sources]).all()
    ideal = np.arange(num + 1)[:, None] * np.array(blend.weights)
    assert np.abs(dealt - ideal).max() <= (0.5 + 1e-9 if len(weights) == 2 else Blend.BOUND)
    assert (
        np.abs(np.array(blend.weights) - np.array(weights) / sum(weights)).max()
        <= len(weights) / WEIGHT_UNITS
    )


def counts_before(blend: Blend, start: int) -> list[int]:
    """How many of the first `start` positions each source has, down its tree of weights."""
    counts = [0] * len(blend.weights)
    pending = [(blend._root, np.array([start]))]
    while pending:
        node, total = pending.pop()
        if isinstance(node, int):
            counts[node] = int(total[0])
            continue
        left = node.left_count(total)
        pending += [(node.left, left), (node.right, total - left)]
    return counts


@settings(max_examples=40, deadline=None)
@given(weights=weights_strategy, start=st.integers(0, 2**50))
def test_balance_far_into_a_run(weights: list[float], start: int) -> None:
    """Exact at position 2^50, in Python integers of any size; and locate continues from counts."""
    blend = Blend(weights)
    counts = counts_before(blend, start)
    assert sum(counts) == start
    for count, weight in zip(counts, blend.weights, strict=True):
        units = round(weight * WEIGHT_UNITS)
        assert abs(count * WEIGHT_UNITS - start * units) < Blend.BOUND * WEIGHT_UNITS
    for source, drawn in zip(
        *(part.tolist() for part in blend.locate(np.arange(start, start + 50))), strict=True
    ):
        assert drawn == counts[source]
        counts[source] += 1


def test_tiny_sources_still_take_part() -> None:
    blend = Blend([1e-30, 1.0, 1e-30])
    assert min(blend.weights) == 1 / WEIGHT_UNITS
    assert sum(blend.weights) == 1.0


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="source weights"):
        Blend(weights)


def test_a_position_of_a_trillion_token_run_costs_microseconds() -> None:
    blend, size = Blend([0.5, 0.2, 0.2, 0.1]), 1_000_000_000_000 // 4096
    positions = np.arange(200_000_000, 200_000_000 + 4096)
    start = time.perf_counter()
    sources, drawn = blend.locate(positions)
    permute(drawn % size, size=size, key=derive_key(1, sources, drawn // size))
    assert time.perf_counter() - start < 4096 * 20e-6
