"""Rank arithmetic: coordinates and groups of every small layout."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from megatron_b2.config.schema import ParallelConfig
from megatron_b2.parallel.layout import VARYING, Coordinates, GroupKind, Layout

LAYOUTS = [
    Layout(tensor=t, context=c, data=d, pipeline=p)
    for t, c, d, p in product((1, 2, 4), (1, 2, 3), (1, 2, 5), (1, 2, 4))
]
KINDS: tuple[GroupKind, ...] = get_args(GroupKind)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_and_ranks_are_inverse(layout: Layout) -> None:
    seen = set()
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        seen.add(place)
        assert layout.rank_of(tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp) == rank
    assert len(seen) == layout.world_size


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_partition_the_ranks(layout: Layout) -> None:
    sizes = {
        "tp": layout.tensor,
        "cp": layout.context,
        "dp": layout.data,
        "pp": layout.pipeline,
        "data_context": layout.data * layout.context,
        "model": layout.tensor * layout.pipeline,
    }
    for kind in KINDS:
        groups = layout.groups(kind)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {sizes[kind]}
        assert all(group == sorted(group) for group in groups)
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)
        for rank in range(layout.world_size):
            assert rank in layout.group_of(rank, kind)
            assert layout.group_of(rank, kind) in groups


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_members_differ_in_the_coordinates_of_their_kind_only(layout: Layout) -> None:
    for kind in KINDS:
        for group in layout.groups(kind):
            places = [layout.coordinates(rank) for rank in group]
            fixed = {name for name in ("tp", "cp", "dp", "pp") if name not in VARYING[kind]}
            assert all(len({getattr(place, name) for place in places}) == 1 for name in fixed)
            if len(VARYING[kind]) == 1:
                assert [getattr(place, VARYING[kind][0]) for place in places] == list(range(len(group)))


def test_neighbours() -> None:
    layout = Layout(tensor=2, context=2, data=2, pipeline=2)
    assert layout.groups("tp") == [[rank, rank + 1] for rank in range(0, 16, 2)]
    assert layout.group_of(0, "cp") == [0, 2]
    assert layout.group_of(0, "dp") == [0, 4]
    assert layout.group_of(0, "pp") == [0, 8]
    assert layout.group_of(0, "data_context") == [0, 2, 4, 6]
    assert layout.group_of(0, "model") == [0, 1, 8, 9]
    assert layout.coordinates(13) == Coordinates(tp=1, cp=0, dp=1, pp=1)


def test_data_is_what_the_others_leave() -> None:
    parallel = ParallelConfig(tensor=8, pipeline=4)
    assert Layout.of(parallel, world_size=1024) == Layout(tensor=8, data=32, pipeline=4)
    with pytest.raises(
        ValueError, match="1000 ranks are no multiple of tensor x context x pipeline = 8 x 1 x 4 = 32"
    ):
        Layout.of(parallel, world_size=1000)


def test_what_does_not_exist_is_an_error() -> None:
    layout = Layout(tensor=2, data=2)
    with pytest.raises(ValueError, match="rank 4 is outside 0 to 3"):
        layout.coordinates(4)
    with pytest.raises(ValueError, match="dp = 2 is outside 0 to 1"):
        layout.rank_of(dp=2)
    with pytest.raises(ValueError, match="each must be 1 or more"):
        Layout(tensor=0)
