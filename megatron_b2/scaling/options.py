"""How points are made and laws are fitted; imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from megatron_b2.errors import InputError
from megatron_b2.scaling.compute import ComputeConvention

LossName = Literal["valid_ce", "train_ce"]
"""`valid_ce`: cross-entropy on the held-out documents. `train_ce`: that of the training batches, smoothed."""

WINDOW: Final = 50
"""Steps that the training loss is averaged over (our choice)."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How laws are fitted."""

    loss: LossName = "valid_ce"
    """Which loss: of the held-out documents, or the smoothed training loss."""
    compute: ComputeConvention = "training"
    """Which FLOPs: all of training (the report's C), or six times parameters times tokens."""
    huber: float = 1e-3
    """Deviation in log L beyond which a run counts linearly (Hoffmann et al. 2022)."""
    draws: int = 2_000
    """Replicates of the bootstrap."""
    confidence: float = 0.95
    """Of the bands of predictions."""
    seed: int = 1234
    """Of the bootstrap."""

    def check(self) -> None:
        """Raise InputError for a value that makes no sense."""
        for name, value, wanted, is_good in (
            ("huber", self.huber, "positive", self.huber > 0),
            ("draws", self.draws, "100 or more", self.draws >= 100),
            ("confidence", self.confidence, "at least 0.5 and below 1", 0.5 <= self.confidence < 1),
            ("seed", self.seed, "0 or more", self.seed >= 0),
        ):
            if not is_good:
                raise InputError(f"--{name} {value}: must be {wanted}")
