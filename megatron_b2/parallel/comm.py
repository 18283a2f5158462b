"""Host-side communication between the ranks of a run: rank, size, barrier, object gather.

Modules that only need to agree with their peers (checkpoint, training) take a `Comm` and never see
process groups; one process uses `SingleComm`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist


class Comm(Protocol):
    """A fixed set of ranks that can agree with each other."""

    @property
    def rank(self) -> int:
        """This process, 0-based."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def barrier(self) -> None:
        """Return once every rank has called it."""
        ...

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Picklable `obj` of every rank, in rank order."""
        ...

    def gather_object(self, obj: Any) -> list[Any] | None:
        """Picklable `obj` of every rank in rank order on rank 0, None on the others."""
        ...

    def broadcast_object(self, obj: Any) -> Any:
        """Rank 0's picklable `obj` on every rank; what the others give is ignored."""
        ...

    def all_reduce_max(self, value: int) -> int:
        """The largest `value` of all ranks."""
        ...


class SingleComm:
    """One process talking to itself."""

    rank = 0
    size = 1

    def barrier(self) -> None:
        """Nothing to wait for."""

    def all_gather_object(self, obj: Any) -> list[Any]:
        """The one object."""
        return [obj]

    def gather_object(self, obj: Any) -> list[Any]:
        """The one object."""
        return [obj]

    def broadcast_object(self, obj: Any) -> Any:
        """The object itself."""
        return obj

    def all_reduce_max(self, value: int) -> int:
        """The one value."""
        return value


class ProcessGroupComm:
    """The ranks of a torch process group (the default one unless given)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:

        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def barrier(self) -> None:
        """Return once every rank has called it."""
        dist.barrier(group=self.group)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Picklable `obj` of every rank, in rank order."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, obj, group=self.group)
        return gathered

    def gather_object(self, obj: Any) -> list[Any] | None:
        """Picklable `obj` of every rank in rank order on rank 0, None on the others."""
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(obj, gathered, group=self.group, group_dst=0)
        return gathered

    def broadcast_object(self, obj: Any) -> Any:
        """Rank 0's picklable `obj` on every rank; what the others give is ignored."""
        box = [obj if self.rank == 0 else None]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def all_reduce_max(self, value: int) -> int:
        """The largest `value` of all ranks."""

        tensor = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor.item())
