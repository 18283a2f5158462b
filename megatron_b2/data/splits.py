"""Train, validation and test: contiguous ranges of the documents of a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_b2.errors import ConfigError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def split_bounds(num_documents: int, shares: Sequence[float]) -> tuple[int, ...]:
    """First document of each split and, last, the end: rounded cumulative shares, normalised to 1.

    Raises ConfigError for negative shares or shares that are all 0.
    """
    if any(not share >= 0 for share in shares) or not 0 < sum(shares) < float("inf"):
        raise ConfigError(f"data.split {list(shares)}: must be >= 0 and not all 0, as [0.98, 0.02, 0]")
    total, reached, bounds = sum(shares), 0.0, [0]
    for share in shares:
        reached += share
        bounds.append(min(num_documents, round(num_documents * (reached / total))))
    return (*bounds[:-1], num_documents)
