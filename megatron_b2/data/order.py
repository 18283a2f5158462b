"""Order of the training samples: pure functions of (seed, position), nothing built, nothing stored.

Position p of a run is answered in two steps, each random-access and vectorised:

1. `Blend.locate`: which source p draws from, and how many samples that source gave before (k).
2. `permute`: sample k % N of the source's N, in the order of epoch k // N.

`phases.py` joins the two, also where sources and weights change during a run. Neither knows ranks or batch
sizes, so the global order is the same under any layout.
Design: our choice (DATA.md section 2.3); the report gives none.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_b2.errors import ConfigError

IntArray = NDArray[np.int64]

WEIGHT_UNITS = 2**31
"""Weights are rounded to this many equal units, so that every count below is exact in 64 bits."""

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bijective 64-bit mixer (the finaliser of SplitMix64), elementwise."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: int | IntArray) -> NDArray[np.uint64]:
    """64-bit keys from integers such as (seed, source, epoch); arrays broadcast. Shape [n], at least 1."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = np.asarray(part if isinstance(part, np.ndarray) else part & _WORD, dtype=np.uint64)
        key = mix64((key + np.uint64(_GOLDEN)) ^ mix64(np.atleast_1d(word)))
    return key


def permute(index: IntArray, *, size: int, key: NDArray[np.uint64]) -> IntArray:
    """Image of each `index` [n] under a pseudo-random permutation of range(size), one for each 64-bit key.

    `key` has shape [1] or [n]. A balanced Feistel network over the next even power of two, walked until the
    image lies inside the range: a bijection for any key, and four steps a lookup at most on average.
    """
    if size < 1 or size > 2**62:
        raise ValueError(f"size {size} must be in 1 .. 2^62")
    if index.size and (int(index.min()) < 0 or int(index.max()) >= size):
        raise ValueError(f"index {int(index.min())} .. {int(index.max())} leaves range({size})")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.broadcast_to(key, index.shape)
    image = index.astype(np.uint64)
    active = np.arange(index.size)
    while active.size:
        left, right, active_keys = image[active] >> half, image[active] & mask, keys[active]
        for turn in range(_ROUNDS):
            round_key = active_keys + np.uint64(turn * _GOLDEN & _WORD)
            left, right = right, left ^ (mix64(right + mix64(round_key)) & mask)
        image[active] = (left << half) | right
        active = active[image[active] >= np.uint64(size)]
    return image.astype(np.int64)


@dataclass(frozen=True)
class _Fork:
    """Inner node of the blend tree: `left_units` of its `units` go to the left child."""

    left: _Fork | int
    right: _Fork | int
    left_units: int
    units: int

    def left_count(self, num: IntArray) -> IntArray:
        """How many of the node's first `num` samples go left: num * left_units / units, rounded."""
        whole, rest = np.divmod(num, self.units)
        return whole * self.left_units + (rest * self.left_units + self.units // 2) // self.units


class Blend:
    """Low-discrepancy interleaving of sources by weight.

    The sources are the leaves of a Huffman tree of their weights; each inner node deals its samples left and
    right by rounding its exact share, which has a closed form and hence random access. A node is off its
    ideal count by at most 1/2 plus its share of its parent's error, and two levels of a Huffman tree at least
    halve the weight, so for ANY number of sources and every prefix of n positions

        |count(source, n) - n * weight(source)| < 2        (at most 1/2 for two sources),

    with weights as rounded to multiples of 2^-31 (`weights`). The state is the weights.
    """

    BOUND = 2.0

    def __init__(self, weights: Sequence[float]) -> None:
        self._units = _round_weights(weights)
        self.weights = tuple(units / WEIGHT_UNITS for units in self._units)
        """Normalised weights, exactly as they are dealt."""
        self._root = _huffman_tree(self._units)

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Source of each position and the number of earlier positions of that source; both [n]."""
        sources, counts = np.empty_like(positions), np.empty_like(positions)
        pending = [(self._root, np.arange(positions.size), positions)]
        while pending:
            node, rows, local = pending.pop()
            if isinstance(node, int):
                sources[rows], counts[rows] = node, local
                continue
            before = node.left_count(local)
            goes_left = node.left_count(local + 1) > before
            for child, chosen, index in (
                (node.left, goes_left, before),
                (node.right, ~goes_left, local - before),
            ):
                if chosen.any():
                    pending.append((child, rows[chosen], index[chosen]))
        return sources, counts

    def counts(self, num: int) -> list[int]:
        """How many of the first `num` positions each source has."""
        counts = [0] * len(self.weights)
        pending = [(self._root, num)]
        while pending:
            node, total = pending.pop()
            if isinstance(node, int):
                counts[node] = total
                continue
            left = int(node.left_count(np.array([total]))[0])
            pending += [(node.left, left), (node.right, total - left)]
        return counts


def _round_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Units of each source, at least 1 each, WEIGHT_UNITS in all: floors, then the largest remainders."""
    if not weights or any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise ConfigError(
            f"source weights {list(weights)}: at least one, all finite and > 0 (drop unused sources)"
        )
    total = math.fsum(weights)
    exact = [weight / total * WEIGHT_UNITS for weight in weights]
    units = [max(1, math.floor(value)) for value in exact]
    missing = WEIGHT_UNITS - sum(units)
    if missing >= 0:
        order = sorted(range(len(units)), key=lambda i: (units[i] - exact[i], i))
        for i in order[:missing]:
            units[i] += 1
    else:
        units[units.index(max(units))] += missing  # tiny sources were lifted to one unit
    return tuple(units)


def _huffman_tree(units: Sequence[int]) -> _Fork | int:
    heap: list[tuple[int, int, _Fork | int]] = [(count, i, i) for i, count in enumerate(units)]
    heapq.heapify(heap)
    for serial in range(len(units), 2 * len(units) - 1):
        right_units, _, right = heapq.heappop(heap)
        left_units, _, left = heapq.heappop(heap)
        total = left_units + right_units
        heapq.heappush(
            heap, (total, serial, _Fork(left=left, right=right, left_units=left_units, units=total))
        )
    return heap[0][2]
