"""Where every rank stands: node, coordinates, and how the groups lie over the nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from megatron_b2.parallel.layout import GroupKind, Layout

SHOWN_KINDS: Final[tuple[GroupKind, ...]] = ("tp", "cp", "data_context", "pp", "model")


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """One rank."""

    rank: int
    node: int
    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """All groups of one kind."""

    kind: GroupKind
    count: int
    size: int
    first: tuple[int, ...]
    """Ranks of the first group."""
    max_nodes: int
    """Nodes over which the most spread group lies."""


def rank_rows(layout: Layout, *, ranks_per_node: int) -> list[RankRow]:
    """Every rank in order."""
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    return [
        RankRow(rank=rank, node=rank // ranks_per_node, tp=at.tp, cp=at.cp, dp=at.dp, pp=at.pp)
        for rank, at in enumerate(places)
    ]


def node_rows(rows: Sequence[RankRow]) -> list[dict[str, str]]:
    """One row a node, with the ranges of ranks and coordinates that it holds."""
    nodes: dict[int, list[RankRow]] = {}
    for row in rows:
        nodes.setdefault(row.node, []).append(row)
    columns = ("rank", "tp", "cp", "dp", "pp")
    return [
        {"node": str(node), **{name: span([getattr(row, name) for row in members]) for name in columns}}
        for node, members in nodes.items()
    ]


def group_summaries(layout: Layout, *, ranks_per_node: int) -> list[GroupSummary]:
    """How the groups of each kind with more than one rank lie over the nodes."""
    found = []
    for kind in SHOWN_KINDS:
        groups = layout.groups(kind)
        if len(groups[0]) > 1:
            nodes = max(len({rank // ranks_per_node for rank in group}) for group in groups)
            found.append(
                GroupSummary(
                    kind=kind,
                    count=len(groups),
                    size=len(groups[0]),
                    first=tuple(groups[0]),
                    max_nodes=nodes,
                )
            )
    return found


def span(numbers: Sequence[int]) -> str:
    """Distinct numbers as ranges: 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)
