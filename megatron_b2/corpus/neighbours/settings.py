"""What counts as a near-duplicate, and how it is searched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_b2.errors import ConfigError

_STEPS = 1 << 12


@dataclass(frozen=True)
class NearDuplicates:
    """Documents whose Jaccard similarity over word n-grams is at least `threshold`."""

    ngram: int = 5
    """Words of a shingle; a word is a Han, kana or Hangul character in scripts that use those."""
    threshold: float = 0.8
    """Least Jaccard similarity of the shingle sets of two duplicates."""
    bands: int = 16
    """LSH bands: documents that agree in one of them are compared."""
    rows: int = 6
    """Hashes of a band; a signature has bands x rows."""
    across_scripts: bool = True
    """Traditional Chinese characters count as their simplified forms: a text in both is a duplicate."""
    first: int = 4
    """In a bucket every document is compared with this many of the smallest indices ..."""
    previous: int = 4
    """... and with this many right before it; buckets of first + previous + 1 documents lose no pair."""
    seed: int = 0
    """Of the permutations."""

    def __post_init__(self) -> None:
        least = {"ngram": 1, "bands": 1, "rows": 1, "first": 1, "previous": 0, "seed": 0}
        problems = [
            f"{name} = {getattr(self, name)}: must be at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if not 0 < self.threshold <= 1:
            problems.append(f"threshold = {self.threshold}: must be above 0 and at most 1")
        if self.seed >= 1 << 64:
            problems.append(f"seed = {self.seed}: must be below 2^64")
        if problems:
            raise ConfigError(problems)

    @property
    def permutations(self) -> int:
        """Hashes of a signature."""
        return self.bands * self.rows

    def probability(self, jaccard: float | np.ndarray) -> np.ndarray:
        """Chance that a pair of this similarity agrees in a band: 1 - (1 - s^rows)^bands, the S-curve.

        Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4.2.
        """
        agree = np.asarray(jaccard, float) ** self.rows
        return -np.expm1(self.bands * np.log1p(-np.minimum(agree, 1 - 1e-16)))

    def expected_recall(self) -> float:
        """Mean of the S-curve from the threshold to 1: the share of duplicates found if every similarity
        above the threshold were as frequent."""
        return float(self.probability(_midpoints(self.threshold, 1.0)).mean())

    def expected_waste(self) -> float:
        """Mean of the S-curve from 0 to the threshold: the share of other pairs compared in vain."""
        return float(self.probability(_midpoints(0.0, self.threshold)).mean())


def _midpoints(low: float, high: float) -> np.ndarray:
    return low + (high - low) * (np.arange(_STEPS) + 0.5) / _STEPS
