"""A blocked Bloom filter: which hashes have been seen before, in a few bits each.

When to use it: to tell whether text was in an *earlier* corpus whose records are not there any more, or are
too many to sort again (`b2 corpus remember`, `exact.seen`). It says "yes" wrongly at the chosen rate (some
good text is lost) and never says "no" wrongly. Within one corpus, the exact grouping of `find_repeats` is
the default: it has no errors, needs no size in advance, names the first occurrence, and does not depend on
the order in which documents come.

All bits of a key are in one block of 512 bits (Putze, Sanders, Singler 2007, "Cache-, Hash- and
Space-Efficient Bloom Filters"), which costs one access to memory and about a tenth more bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_b2 import _cpu
from megatron_b2.errors import ConfigError, InputError
from megatron_b2.files.atomic import atomic_file

BLOCK_BITS = 512
MAX_PROBES = 24
_MAGIC = b"b2bloom1"


def bloom_rate(bits_per_key: float, probes: int) -> float:
    """Expected rate of wrong "yes" of a full filter: Putze et al., equation 3, with independent probes.

    The keys of a block are Poisson distributed; a block of k keys has a bit set with the chance
    1 - (1 - 1 / 512)^(k probes).
    """
    load = BLOCK_BITS / bits_per_key
    keys = np.arange(int(load + 12 * math.sqrt(load)) + 32)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(keys[1:]))])
    chance = np.exp(keys * math.log(load) - load - log_factorial)
    is_set = -np.expm1(keys * probes * math.log1p(-1 / BLOCK_BITS))
    return float((chance * is_set**probes).sum())


def _smallest(rate: float) -> tuple[float, int]:
    """Fewest bits a key that keep `rate`, and the number of probes."""
    low, high = 1.0, 1.0
    while min(bloom_rate(high, probes) for probes in range(1, MAX_PROBES + 1)) > rate:
        high *= 2
        if high > BLOCK_BITS:
            raise ConfigError(f"false_positive_rate = {rate:g} is too small; 1e-9 is possible")
    while high - low > 0.01:
        middle = (low + high) / 2
        enough = min(bloom_rate(middle, probes) for probes in range(1, MAX_PROBES + 1)) <= rate
        low, high = (low, middle) if enough else (middle, high)
    return high, min(range(1, MAX_PROBES + 1), key=lambda probes: bloom_rate(high, probes))


class BloomFilter:
    """Constant memory for up to `keys` hashes."""

    def __init__(
        self,
        bits: np.ndarray,
        *,
        probes: int,
        keys: int,
        added: int = 0,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.bits = bits
        """uint64 [8 B]: B blocks."""
        self.probes = probes
        self.keys = keys
        """Different keys it was made for."""
        self.added = added
        """Keys that were put in and seemed new."""
        self.facts = dict(facts or {})
        """What the keys are, for the file; JSON values."""

    @classmethod
    def for_keys(cls, keys: int, *, false_positive_rate: float) -> Self:
        """An empty filter that keeps the rate up to `keys` different keys.

        Raises ConfigError if there are no keys or the rate is not between 0 and 1, with all problems.
        """
        problems = []
        if keys < 1:
            problems.append(f"keys = {keys} must be at least 1")
        if not 0 < false_positive_rate < 1:
            problems.append(f"false_positive_rate = {false_positive_rate} must be between 0 and 1")
        if problems:
            raise ConfigError(problems)
        bits_per_key, probes = _smallest(false_positive_rate)
        blocks = math.ceil(keys * bits_per_key / BLOCK_BITS)
        return cls(np.zeros(blocks * BLOCK_BITS // 64, np.uint64), probes=probes, keys=keys)

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Put in hashes uint64 [N, 2] (see `hash_texts`); bool [N], whether each seemed to be in already."""
        found: np.ndarray = _cpu.bloom_add(
            self.bits, np.ascontiguousarray(hashes, np.uint64), probes=self.probes
        )
        self.added += int((~found).sum())
        return found

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Whether each of the hashes uint64 [N, 2] seems to be in, bool [N]."""
        found: np.ndarray = _cpu.bloom_contains(
            self.bits, np.ascontiguousarray(hashes, np.uint64), probes=self.probes
        )
        return found

    @property
    def is_overfull(self) -> bool:
        """Whether it has more keys than it was made for: the rate is higher than wanted."""
        return self.added > self.keys

    def save(self, path: Path) -> None:
        """Write it, atomically. Raises OutputError if the disk refuses."""
        counts = {"probes": self.probes, "keys": self.keys, "added": self.added, "words": len(self.bits)}
        header = json.dumps(counts | {"facts": self.facts}).encode().ljust(4096 - len(_MAGIC))
        with atomic_file(path) as stream:
            stream.write(_MAGIC + header)
            self.bits.tofile(stream)

    @classmethod
    def load(cls, path: Path, *, writable: bool = False) -> Self:
        """Map it from a file: memory is used as blocks are read. A writable one keeps additions to itself.

        Raises InputError if the file is no filter or was cut.
        """
        try:
            with path.open("rb") as stream:
                header = stream.read(4096)
            if not header.startswith(_MAGIC):
                raise ValueError("it does not start as one")
            counts = json.loads(header[len(_MAGIC) :])
            bits = np.memmap(path, np.uint64, "c" if writable else "r", 4096, (int(counts.pop("words")),))
            return cls(bits, **counts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a Bloom filter: {error}") from None
