"""Length of a step: closed forms, and the whole simulation where only its beginning is simulated."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.pipeline.schedule import ScheduleName, build_schedule, ideal_bubble
from megatron_b2.pipeline.simulate import simulate
from megatron_b2.planner import pipeline
from megatron_b2.planner.pipeline import StageTimes, makespan

STAGE = (1.0, 2.0, 1.0)
"""Forward, gradients, and the forward again."""


def whole(
    name: ScheduleName, stages: list[tuple[float, float, float]], p: int, m: int, transfer: float
) -> float:
    schedule = build_schedule(name, num_ranks=p, num_micro=m, num_chunks=len(stages) // p)
    return float(simulate(schedule, StageTimes(stages=tuple(stages), transfer=transfer)).makespan)


@pytest.mark.parametrize(
    ("name", "p", "v", "m"),
    [
        *[("1f1b", 4, 1, 8), ("1f1b", 12, 1, 2000), ("gpipe", 4, 1, 16)],
        *[("interleaved", 4, 3, 8), ("interleaved", 8, 2, 4000)],
    ],
)
def test_bubble_of_equal_stages(name: ScheduleName, p: int, v: int, m: int) -> None:
    """(p - 1) / (v m) of the work, also where the step is too long to be simulated as a whole."""
    length = makespan(name, (STAGE,) * (p * v), num_ranks=p, num_micro=m)
    work = m * v * sum(STAGE)
    assert length / work - 1 == pytest.approx((p - 1) / (v * m), rel=1e-9)
    assert float(ideal_bubble(name, num_ranks=p, num_micro=m, num_chunks=v)) == (p - 1) / (v * m)


def test_bubble_of_zero_bubble() -> None:
    """A third, where the forward and both halves of the backward take the same time."""
    p, m = 4, 16
    length = makespan("zero_bubble", ((1.0, 2.0, 0.0),) * p, num_ranks=p, num_micro=m)
    assert length == 3 * m * (1 + (p - 1) / (3 * m))


def test_one_rank_never_waits() -> None:
    assert makespan("1f1b", (STAGE,), num_ranks=1, num_micro=1000) == 4000


@pytest.mark.parametrize("m", [2, 3, 4, 50, 51, 10_000])
def test_sends_of_two_ranks(m: int) -> None:
    """Two ranks with two micro-batches in flight: each pair of micro-batches waits for one send there and one
    back (written out by hand for m up to 4)."""
    p, transfer = 2, 0.5
    length = makespan("1f1b", (STAGE,) * p, num_ranks=p, num_micro=m, transfer=transfer)
    free = makespan("1f1b", (STAGE,) * p, num_ranks=p, num_micro=m)
    assert length - free == pytest.approx(2 * transfer * ceil(m / 2), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["1f1b", "interleaved", "zero_bubble"]),
    p=st.integers(2, 6),
    v=st.integers(2, 3),
    rounds=st.integers(6, 40),
    first=st.floats(0.8, 1.5),
    last=st.floats(1.0, 1.5),
    transfer=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_continued_length(
    name: ScheduleName, p: int, v: int, rounds: int, first: float, last: float, transfer: float
) -> None:
    """With an embedding and a head: within 1 % of the whole simulation."""
    chunks, m = (v, rounds * p) if name == "interleaved" else (1, rounds * p + rounds % p)
    stages = [STAGE] * (p * chunks)
    stages[0] = tuple(first * time for time in STAGE)  # type: ignore[assignment]
    stages[-1] = (last, 2 * last, 1.0)
    expected = whole(name, stages, p, m, transfer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "WHOLE", 0)
        continued = makespan.__wrapped__(name, tuple(stages), num_ranks=p, num_micro=m, transfer=transfer)
    assert continued == pytest.approx(expected, rel=0.01)


def test_busiest_stage_is_the_limit() -> None:
    """In the long run a micro-batch takes as long as on the slowest rank."""
    stages = (STAGE, (1.5, 3.0, 1.5), STAGE, STAGE)
    lengths = [makespan("1f1b", stages, num_ranks=4, num_micro=m) for m in (3000, 4000)]
    assert (lengths[1] - lengths[0]) / 1000 == pytest.approx(6.0, rel=1e-9)
