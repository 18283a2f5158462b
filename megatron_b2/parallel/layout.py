"""Which rank holds what: pure arithmetic, no process groups.

rank = ((pp * data + dp) * context + cp) * tensor + tp: tensor-parallel ranks are neighbours (one node),
then context, then data, and pipeline stages are furthest apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from megatron_b2.config.schema import ParallelConfig

GroupKind = Literal["tp", "cp", "dp", "pp", "data_context", "model"]
"""What varies in a group: one coordinate; or dp and cp (ranks with the same parameters: ZeRO and gradient
sums); or tp and pp (ranks that together hold one copy of the model)."""

VARYING: Final[Mapping[GroupKind, tuple[str, ...]]] = MappingProxyType(
    {
        "tp": ("tp",),
        "cp": ("cp",),
        "dp": ("dp",),
        "pp": ("pp",),
        "data_context": ("cp", "dp"),
        "model": ("tp", "pp"),
    }
)
"""Coordinates in which the members of a group differ."""


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Place of a rank in the layout, each 0-based."""

    tp: int = 0
    """Part of every matrix."""
    cp: int = 0
    """Part of every sequence."""
    dp: int = 0
    """Part of the global batch."""
    pp: int = 0
    """Pipeline rank: part of the layers."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the four dimensions."""

    tensor: int = 1
    context: int = 1
    data: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        sizes = (self.tensor, self.context, self.data, self.pipeline)
        if min(sizes) < 1:
            raise ValueError(f"tensor, context, data and pipeline are {sizes}: each must be 1 or more")

    @classmethod
    def of(cls, parallel: ParallelConfig, *, world_size: int) -> Layout:
        """The layout of a run on `world_size` ranks; data is what the other dimensions leave."""
        if world_size < 1 or world_size % parallel.model_ranks:
            raise ValueError(
                f"{world_size} ranks are no multiple of tensor x context x pipeline = {parallel.tensor} x "
                f"{parallel.context} x {parallel.pipeline} = {parallel.model_ranks}"
            )
        return cls(
            tensor=parallel.tensor,
            context=parallel.context,
            data=parallel.data_size(world_size),
            pipeline=parallel.pipeline,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def data_context(self) -> int:
        """Ranks that hold the same parameters, over which ZeRO shards and gradients are summed."""
        return self.data * self.context

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a rank."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside 0 to {self.world_size - 1}")
        rest, tp = divmod(rank, self.tensor)
        rest, cp = divmod(rest, self.context)
        pp, dp = divmod(rest, self.data)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank_of(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """Rank at a place."""
        sizes = {"tp": self.tensor, "cp": self.context, "dp": self.data, "pp": self.pipeline}
        for (name, size), value in zip(sizes.items(), (tp, cp, dp, pp), strict=True):
            if not 0 <= value < size:
                raise ValueError(f"{name} = {value} is outside 0 to {size - 1}")
        return ((pp * self.data + dp) * self.context + cp) * self.tensor + tp

    def groups(self, kind: GroupKind) -> list[list[int]]:
        """All groups of a kind: ascending ranks, ordered by their first rank. They partition the ranks.

        Ascending ranks mean that the n-th member of a "tp", "cp", "dp" or "pp" group has coordinate n, that
        of "data_context" dp * context + cp, and that of "model" pp * tensor + tp.
        """
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            members.setdefault(self._fixed(rank, kind), []).append(rank)
        return list(members.values())

    def group_of(self, rank: int, kind: GroupKind) -> list[int]:
        """The group of a kind that a rank belongs to."""
        place = self._fixed(rank, kind)
        return [peer for peer in range(self.world_size) if self._fixed(peer, kind) == place]

    def _fixed(self, rank: int, kind: GroupKind) -> tuple[int, ...]:
        """The coordinates that a rank shares with its group of a kind."""
        place = self.coordinates(rank)
        return tuple(getattr(place, name) for name in ("tp", "cp", "dp", "pp") if name not in VARYING[kind])
