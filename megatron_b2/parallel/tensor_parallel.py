"""The tensor-parallel ranks of a model: where a layer's input enters them and its output leaves them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_b2.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    reduce_from_group,
    reduce_scatter_sequence,
)


@dataclass(frozen=True)
class TensorParallel:
    """One rank of a tensor-parallel group; the default is a model that is not split.

    Between layers activations are whole on every rank [B, S, h], or with sequence parallelism the shard
    [B, S / size, h] (Korthikanti et al. 2022).
    """

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    sequence_parallel: bool = False

    def enter(self, x: Tensor) -> Tensor:
        """The whole [B, S, h] for a column-parallel layer; gradients are summed on the way back."""
        if self.group is None:
            return x
        return all_gather_sequence(x, self.group) if self.sequence_parallel else copy_to_group(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums [B, S, h] of a row-parallel layer to the form between layers."""
        if self.group is None:
            return x
        if self.sequence_parallel:
            return reduce_scatter_sequence(x, self.group)
        return reduce_from_group(x, self.group)

    def share(self, count: int) -> int:
        """This rank's part of `count` equal things; the configuration has checked that it divides."""
        assert count % self.size == 0, f"{count} does not divide by tensor-parallel size {self.size}"
        return count // self.size
