"""Process groups of a layout. Every rank creates all groups in the same order, as torch demands."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_b2.parallel.layout import Coordinates, GroupKind, Layout


@dataclass(frozen=True)
class ParallelGroups:
    """The groups that this rank belongs to; tp, cp, pp are none if they would have one rank."""

    layout: Layout
    coordinates: Coordinates
    tp: ProcessGroup | None
    """Tensor parallel: ranks that hold the other parts of the same layers."""
    cp: ProcessGroup | None
    """Context parallel: ranks that work on the other parts of the same sequences."""
    pp: ProcessGroup | None
    """Pipeline: the other stages of the same micro-batches."""
    pp_gradients: ProcessGroup | None
    """The same ranks again for gradients: NCCL orders the messages of a group, so the directions need two."""
    data_context: ProcessGroup
    """Ranks with the same shard of the model; ZeRO and gradient sums work over them."""
    model: ProcessGroup
    """Ranks that together hold one copy of the model."""

    @classmethod
    def create(cls, layout: Layout, *, timeout: timedelta) -> ParallelGroups:
        """Make the groups of `layout` on an initialised torch.distributed of the same size, and connect them.

        Collective: each group runs a first all-reduce, kind after kind. NCCL makes a group's communicator in
        its first operation, which all ranks must join: a message between two of them may not be the first.
        """
        rank = dist.get_rank()

        def make(kind: GroupKind) -> ProcessGroup:
            mine: ProcessGroup | None = None
            for ranks in layout.groups(kind):
                group = dist.new_group(ranks, timeout=timeout)
                mine = group if rank in ranks else mine
            assert mine is not None
            return mine

        groups = cls(
            layout=layout,
            coordinates=layout.coordinates(rank),
            tp=make("tp") if layout.tensor > 1 else None,
            cp=make("cp") if layout.context > 1 else None,
            pp=make("pp") if layout.pipeline > 1 else None,
            pp_gradients=make("pp") if layout.pipeline > 1 else None,
            data_context=make("data_context"),
            model=make("model"),
        )
        mine = (groups.tp, groups.cp, groups.pp, groups.pp_gradients, groups.data_context, groups.model)
        for group in mine:
            if group is not None:
                device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
                dist.all_reduce(torch.zeros(1, device=device), group=group)
        return groups
