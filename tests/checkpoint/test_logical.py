"""Rectangles and coverage against counting every element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.checkpoint import flat_pieces, rectangles
from megatron_b2.checkpoint.logical import coverage_problem, overlap

shapes = st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    size = int(np.prod(shape))
    start = draw(st.integers(0, size))
    return shape, start, draw(st.integers(start, size))


@settings(deadline=None)
@given(ranges())
def test_rectangles_are_the_flat_range_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    found = rectangles(shape, start, stop)
    elements: list[int] = []
    for part in found:
        index = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.shape, strict=True))
        values = numbers[index].reshape(-1).tolist()
        assert values == list(range(part.start, part.stop))
        elements += values
    assert elements == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_flat_range_of_a_matrix_is_three_rectangles() -> None:
    found = rectangles((4, 10), 7, 33)
    assert [(p.offsets, p.shape, p.start) for p in found] == [
        ((0, 7), (1, 3), 7),
        ((1, 0), (2, 10), 10),
        ((3, 0), (1, 3), 30),
    ]


def test_range_outside_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 7\) is outside a tensor of shape \[2, 3\]"):
        rectangles((2, 3), 0, 7)


def test_flat_pieces_are_views_at_the_shard_position() -> None:
    flat = torch.zeros(5)
    pieces = flat_pieces(flat, local_shape=(2, 4), start=2, offsets=(10, 20), write=False)
    assert [(p.offsets, tuple(p.tensor.shape), p.write) for p in pieces] == [
        ((10, 22), (1, 2), False),
        ((11, 20), (1, 3), False),
    ]
    for piece in pieces:
        piece.tensor.fill_(1)
    assert flat.tolist() == [1] * 5


boxes = st.integers(1, 3).flatmap(
    lambda n: st.lists(
        st.tuples(st.tuples(*[st.integers(0, 3)] * n), st.tuples(*[st.integers(0, 3)] * n)), max_size=5
    ).map(lambda parts: (n, parts))
)


@settings(deadline=None, max_examples=300)
@given(boxes)
def test_coverage_is_right_exactly_when_every_element_is_there_once(
    case: tuple[int, list[tuple[tuple[int, ...], tuple[int, ...]]]],
) -> None:
    dims, parts = case
    shape = (3,) * dims
    counts = np.zeros((8,) * dims, dtype=int)
    for offsets, extent in parts:
        counts[tuple(slice(o, o + n) for o, n in zip(offsets, extent, strict=True))] += 1
    inside = all(o + n <= 3 for offsets, extent in parts for o, n in zip(offsets, extent, strict=True))
    exact = inside and bool((counts[(slice(0, 3),) * dims] == 1).all())
    assert (coverage_problem(shape, parts) is None) == exact


def test_coverage_names_the_fault() -> None:
    halves = [((0, 0), (2, 4)), ((2, 0), (2, 4))]
    assert coverage_problem((4, 4), halves) is None
    assert coverage_problem((), [((), ())]) is None
    assert "only 8 of 16" in str(coverage_problem((4, 4), halves[:1]))
    assert "overlap" in str(coverage_problem((4, 4), [*halves, ((1, 1), (1, 1))]))
    assert "outside" in str(coverage_problem((4, 4), [((3, 0), (2, 4))]))
    assert overlap((0,), (2,), (2,), (2,)) is None
