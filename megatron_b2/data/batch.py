"""One micro-batch of packed token sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B samples of S tokens. Labels are already shifted: labels[b, t] is the target of position t."""

    input_ids: Tensor
    """int64 [B, S]."""
    labels: Tensor
    """int64 [B, S]; -100 is ignored by the loss."""
    segment_ids: Tensor
    """int32 [B, S]; 0, 1, 2 ... numbers the documents inside a sample."""
    position_ids: Tensor
    """int32 [B, S]; restarts at 0 with each segment."""

    def context_part(self, rank: int, size: int) -> Batch:
        """The consecutive 1 / size of every sequence that a context-parallel rank works on.

        Segment ids stay whole: attention needs to know where the documents of the other parts begin.
        """
        if size == 1:
            return self
        length = self.input_ids.shape[1] // size
        here = slice(rank * length, (rank + 1) * length)
        return Batch(
            input_ids=self.input_ids[:, here],
            labels=self.labels[:, here],
            segment_ids=self.segment_ids,
            position_ids=self.position_ids[:, here],
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies from pinned memory do not block."""
        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            segment_ids=self.segment_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class BatchArrays:
    """The arrays of a batch while it is filled, each [B, S]; the fields are those of `Batch`."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    segment_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]

    @classmethod
    def empty(cls, num_samples: int, seq_len: int) -> Self:
        """Arrays of undefined content."""
        shape = (num_samples, seq_len)
        return cls(
            input_ids=np.empty(shape, np.int64),
            labels=np.empty(shape, np.int64),
            segment_ids=np.empty(shape, np.int32),
            position_ids=np.empty(shape, np.int32),
        )

    def batch(self) -> Batch:
        """The batch; it shares memory with the arrays."""
        return Batch(
            input_ids=torch.from_numpy(self.input_ids),
            labels=torch.from_numpy(self.labels),
            segment_ids=torch.from_numpy(self.segment_ids),
            position_ids=torch.from_numpy(self.position_ids),
        )
