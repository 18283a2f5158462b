"""Metrics for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_b2.training.metrics import Record

AXES = ("kind", "step", "tokens", "skipped")
"""Fields that are no curve."""


class TensorBoardSink:
    """Every number of a record as `train/<name>` or `valid/<name>` over steps.

    Points after `resume_step`, from a part of the run that a crash made it repeat, are hidden.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, records: Sequence[Record]) -> None:
        """Add the points."""
        for record in records:
            for name, value in asdict(record).items():
                if name not in AXES and value is not None:
                    self._writer.add_scalar(f"{record.kind}/{name}", value, global_step=record.step)

    def close(self) -> None:
        """Write everything out."""
        self._writer.close()
