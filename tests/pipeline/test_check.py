"""Schedules proven right for every legal size, and the checker proven to see what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_b2.errors import ConfigError
from megatron_b2.pipeline import check
from megatron_b2.pipeline.check import check_schedule, transfers
from megatron_b2.pipeline.plan import LOOKAHEAD, RankPlan, plan_communication
from megatron_b2.pipeline.schedule import (
    Instruction,
    Schedule,
    build_schedule,
    forward_only,
    ideal_bubble,
    ideal_in_flight,
    schedule_problem,
)
from megatron_b2.pipeline.simulate import Durations, ScheduleError, simulate

MAX_RANKS, MAX_MICRO, MAX_CHUNKS = 16, 64, 4
NAMES = ("gpipe", "1f1b", "interleaved", "zero_bubble")


def legal_sizes() -> Iterator[tuple[str, int, int, int]]:
    """(schedule, ranks, micro-batches, chunks)."""
    for name in NAMES:
        for ranks in range(1, MAX_RANKS + 1):
            for micro in range(1, MAX_MICRO + 1):
                for chunks in range(1, MAX_CHUNKS + 1):
                    if schedule_problem(name, num_ranks=ranks, num_micro=micro, num_chunks=chunks) is None:
                        yield name, ranks, micro, chunks


def prove(name: str, ranks: int, micro: int, chunks: int) -> None:
    sizes = {"num_ranks": ranks, "num_micro": micro, "num_chunks": chunks}
    schedule = build_schedule(name, **sizes)
    report = check_schedule(schedule, num_micro=micro, num_chunks=chunks)
    assert report.bubble_ratio == ideal_bubble(name, **sizes)
    assert report.peak_in_flight == tuple(ideal_in_flight(name, rank, **sizes) for rank in range(ranks))
    assert report.num_messages == 2 * micro * (ranks * chunks - 1)
    assert max(report.peak_receives) <= LOOKAHEAD + 2


COVERING = (1, 2, 3, 4, 5, 8, 11, 16)


def is_covering(size: tuple[str, int, int, int]) -> bool:
    _, ranks, micro, _ = size
    return (
        ranks in COVERING and micro in (ranks, ranks + 1, 2 * ranks, 3 * ranks, 33) and micro * ranks <= 400
    )


def test_proofs_hold_for_a_covering_subset() -> None:
    sizes = [size for size in legal_sizes() if is_covering(size)]
    assert {name for name, *_ in sizes} == set(NAMES)
    assert {chunks for name, _, _, chunks in sizes if name == "interleaved"} == {2, 3, 4}
    assert len(sizes) > 100
    for size in sizes:
        prove(*size)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_proofs_hold_for_every_legal_size(name: str) -> None:
    sizes = [size for size in legal_sizes() if size[0] == name]
    assert len(sizes) == (3 * sum(64 // p for p in range(2, 17)) if name == "interleaved" else 904)
    for size in sizes:
        prove(*size)


def test_the_closed_forms() -> None:
    ratio = ideal_bubble("1f1b", num_ranks=4, num_micro=8)
    report = check_schedule(build_schedule("1f1b", num_ranks=4, num_micro=8), num_micro=8)
    assert float(ratio) == 3 / 8
    assert float(report.bubble_fraction) == 3 / 11
    assert report.peak_in_flight == (4, 3, 2, 1)
    zero = check_schedule(build_schedule("zero_bubble", num_ranks=4, num_micro=8), num_micro=8)
    assert zero.bubble_ratio == ratio / 3
    assert max(zero.peak_in_flight) == max(report.peak_in_flight)


@pytest.mark.parametrize(("ranks", "micro", "chunks"), [(1, 3, 1), (4, 1, 1), (4, 9, 2), (16, 64, 4)])
def test_forward_only_plans_are_free_of_deadlock(ranks: int, micro: int, chunks: int) -> None:
    schedule = forward_only(num_ranks=ranks, num_micro=micro, num_chunks=chunks)
    for channels in (1, 2):
        plans = plan_communication(schedule, channels=channels)
        assert check.check_plans(plans, channels=channels) == micro * (ranks * chunks - 1)
        assert max(check._peak_receives(plan) for plan in plans) <= LOOKAHEAD + 2


@pytest.mark.parametrize(
    ("name", "ranks", "micro", "chunks", "message"),
    [
        ("1f1b", 4, 3, 1, "3 micro-batches are fewer than 4 pipeline ranks"),
        ("gpipe", 4, 8, 2, "has 1 chunk a rank, not 2"),
        ("interleaved", 4, 8, 1, "needs 2 or more chunks a rank, not 1"),
        ("interleaved", 1, 8, 2, "needs 2 or more pipeline ranks, not 1"),
        ("interleaved", 4, 10, 2, "do not divide 10 micro-batches; make .* a multiple of 4"),
    ],
)
def test_illegal_sizes_are_refused_with_the_fix(
    name: str, ranks: int, micro: int, chunks: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_schedule(name, num_ranks=ranks, num_micro=micro, num_chunks=chunks)


def F(micro: int) -> Instruction:
    return Instruction("F", micro)


def B(micro: int) -> Instruction:
    return Instruction("B", micro)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (((F(0), B(0)), (F(0),)), "rank 1: .* ends after 'F'"),
        (((F(0), B(0)), (B(0), F(0))), "rank 1: .* comes after 'nothing'"),
        (((F(0), F(0), B(0)),), "comes after 'F'"),
        (((F(0), B(0), F(1), B(1)),), "is missing, or is not one of the step"),
        (((F(0), Instruction("I", 0)),), "ends after 'FI'"),
        (((F(0), B(0), Instruction("W", 0)),), "comes after 'FB'"),
    ],
)
def test_a_wrong_instruction_list_is_seen(schedule: Schedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_schedule(schedule, num_micro=1)


def test_a_deadlock_is_seen_and_names_the_ranks() -> None:
    schedule = ((F(0), B(0), F(1), B(1)), (F(0), F(1), B(0), B(1)))
    with pytest.raises(ScheduleError) as raised:
        check_schedule(schedule, num_micro=2)
    assert str(raised.value) == (
        "deadlock: rank 0 waits for the gradient of micro-batch 0 for stage 0 (pipeline rank 1 to 0); "
        "rank 1 waits for the activation of micro-batch 1 for stage 1 (pipeline rank 0 to 1)"
    )


def test_a_receive_that_is_posted_late_or_never_is_seen() -> None:
    plans = list(plan_communication(build_schedule("1f1b", num_ranks=2, num_micro=4)))
    without = RankPlan((), plans[1].steps)
    with pytest.raises(ScheduleError, match="rank 1 uses before it posts the activation of micro-batch 0"):
        check._check_matching([plans[0], without], 2)
    with pytest.raises(ScheduleError, match="deadlock"):
        check._check_rendezvous([plans[0], without], 2)


def test_transfers_in_crossed_order_are_seen() -> None:
    plans = list(plan_communication(build_schedule("gpipe", num_ranks=2, num_micro=4)))
    first, second, *rest = plans[1].receives
    crossed = RankPlan((second, first, *rest), plans[1].steps)
    with pytest.raises(ScheduleError, match="ranks 0 and 1 post in different orders"):
        check._check_matching([plans[0], crossed], 2)
    with pytest.raises(ScheduleError, match="deadlock of transfers"):
        check._check_rendezvous([plans[0], crossed], 2)


def test_posting_receives_only_when_needed_deadlocks_on_one_ordered_channel() -> None:
    """The mistake that a tagged transport hides: both neighbours send first and receive afterwards."""
    plans = plan_communication(build_schedule("1f1b", num_ranks=4, num_micro=8), channels=1)
    lazy = []
    for plan in plans:
        needs = [() if step.needs is None else (step.needs,) for step in plan.steps]
        steps = tuple(
            replace(step, receives=later, delivered=())
            for step, later in zip(plan.steps, [*needs[1:], ()], strict=True)
        )
        lazy.append(RankPlan(needs[0], steps))
    assert sum(map(len, map(transfers, lazy))) == sum(map(len, map(transfers, plans)))
    with pytest.raises(ScheduleError, match=r"deadlock of transfers|different orders"):
        check.check_plans(lazy, channels=1)


def computations_ahead(plan: RankPlan) -> list[int]:
    """For each receive, how many computations lie between posting and use."""
    posted = dict.fromkeys(plan.receives, -1)
    posted |= {m: index for index, step in enumerate(plan.steps) for m in step.receives}
    return [index - posted[step.needs] - 1 for index, step in enumerate(plan.steps) if step.needs is not None]


@pytest.mark.parametrize("name", NAMES)
def test_receives_are_posted_a_computation_ahead(name: str) -> None:
    """So that a transfer overlaps with it."""
    sizes = {"num_ranks": 4, "num_micro": 16, "num_chunks": 2 if name == "interleaved" else 1}
    for plan in plan_communication(build_schedule(name, **sizes)):
        ahead = computations_ahead(plan)
        assert min(ahead) >= 0
        assert sum(count >= 1 for count in ahead) >= 0.75 * len(ahead)


def test_sends_are_let_go_long_before_the_end() -> None:
    """Under 1F1B all but the last few gradients; otherwise they would pile up."""
    for plan in plan_communication(build_schedule("1f1b", num_ranks=4, num_micro=32)):
        made = sum(step.makes is not None for step in plan.steps)
        gone = sum(len(step.delivered) for step in plan.steps)
        assert made - gone <= 4


def test_durations_and_transfers_stretch_the_timeline() -> None:
    schedule = build_schedule("1f1b", num_ranks=2, num_micro=2)
    assert simulate(schedule).makespan == 9
    assert simulate(schedule, Durations(stage_factors=(2, 1))).makespan > 9
    assert simulate(schedule, Durations(transfer=0.5)).makespan > 9
    assert simulate(schedule, Durations(forward=2, backward=4)).makespan == 18
