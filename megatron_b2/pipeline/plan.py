"""When each rank posts its sends and receives, so that no transport can make the ranks wait for each other.

All messages get one global order: that of a simulation of the schedule. On each channel (process group) a
rank posts its sends and receives in this order: each send right after the computation that makes it, each
receive as early as the order allows. A message depends only on messages before it, so the smallest one that
is not through has both ends posted and first in line, on whatever rank. That is free of deadlock even when
the transfers of a channel run strictly one after the other and a send waits for its receive, as on an NCCL
stream (`check.py` plays exactly that). The order is fixed before the step, so real durations cannot break it.

Activations and gradients have a channel each: then a receive waits behind sends of its own direction only,
and is posted at least one computation ahead in the steady state of every schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_b2.pipeline.schedule import Instruction, Schedule
from megatron_b2.pipeline.simulate import Message, Stages, Time, simulate

Channels = Literal[1, 2]
"""Ordered transports that a rank has: one for all messages, or one for each direction."""

LOOKAHEAD = 4
"""Instructions by which a receive is posted ahead of its use at most: it bounds the buffers."""


@dataclass(frozen=True)
class Step:
    """One instruction and the communication around it."""

    instruction: Instruction
    needs: Message | None
    """Wait for it first."""
    delivered: tuple[Message, ...]
    """Own sends that are through once `needs` is here: the other rank had taken them when it sent."""
    makes: Message | None
    """Send it afterwards."""
    receives: tuple[Message, ...]
    """Receives to post after the send."""


@dataclass(frozen=True)
class RankPlan:
    """Everything one rank does in a step."""

    receives: tuple[Message, ...]
    """Receives to post before the first instruction."""
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class _Ends:
    """Where the two ranks of a message make it and use it: indices into their instructions."""

    made_at: int
    used_at: int


def plan_communication(schedule: Schedule, *, channels: Channels = 2) -> tuple[RankPlan, ...]:
    """The plan of every rank.

    Args:
        schedule: the instructions of every rank.
        channels: 2 if activations and gradients cannot block each other, as on two process groups or on any
            transport that matches by tag; 1 if all transfers of a rank run in one order.

    Raises:
        ScheduleError: the schedule deadlocks.
    """
    stages = Stages.of(schedule)
    messages = _global_order(schedule, stages)
    ends = _find_ends(schedule, stages)
    by_rank: list[list[Message]] = [[] for _ in schedule]
    for message in messages:
        by_rank[message.source].append(message)
        by_rank[message.target].append(message)
    delivered = _deliveries(messages, ends, num_ranks=stages.num_ranks)
    return tuple(
        _rank_plan(rank, order, by_rank[rank], ends, delivered[rank], stages, channels)
        for rank, order in enumerate(schedule)
    )


def channel(message: Message, channels: Channels) -> int:
    """Channel of a message, 0-based."""
    return int(channels == 2 and message.direction == "gradient")


def _global_order(schedule: Schedule, stages: Stages) -> list[Message]:
    """Messages by the time at which they are made; of those made at once, the ones for earlier stages on the
    way (last stages for gradients) first, so that a rank posts the next receive before its send."""
    spans = simulate(schedule).spans
    made: list[tuple[Time, int, Message]] = []
    for rank, order in enumerate(schedule):
        for instruction, (_, end) in zip(order, spans[rank], strict=True):
            message = stages.makes(instruction, rank)
            if message is not None:
                place = message.stage if message.direction == "activation" else -message.stage
                made.append((end, place, message))
    return [message for _, _, message in sorted(made)]


def _find_ends(schedule: Schedule, stages: Stages) -> dict[Message, _Ends]:
    made: dict[Message, int] = {}
    used: dict[Message, int] = {}
    for rank, order in enumerate(schedule):
        for index, instruction in enumerate(order):
            for found, message in (
                (used, stages.needs(instruction, rank)),
                (made, stages.makes(instruction, rank)),
            ):
                if message is not None:
                    found[message] = index
    return {message: _Ends(made[message], used[message]) for message in made}


def _deliveries(
    messages: Sequence[Message], ends: dict[Message, _Ends], *, num_ranks: int
) -> list[dict[int, list[Message]]]:
    """For each rank and instruction: own sends of which the message taken there tells that they are through.

    A rank that has made a message at instruction i has used every message that it used before i.
    """
    between: dict[tuple[int, int], list[Message]] = {}
    for message in messages:
        between.setdefault((message.source, message.target), []).append(message)
    found: list[dict[int, list[Message]]] = [{} for _ in range(num_ranks)]
    for (source, target), sent in between.items():
        answers = sorted(between.get((target, source), ()), key=lambda message: ends[message].made_at)
        position = 0
        for message in sorted(sent, key=lambda message: ends[message].used_at):
            while position < len(answers) and ends[answers[position]].made_at < ends[message].used_at:
                position += 1
            if position < len(answers):
                found[source].setdefault(ends[answers[position]].used_at, []).append(message)
    return found


def _rank_plan(
    rank: int,
    order: Sequence[Instruction],
    messages: Sequence[Message],
    ends: dict[Message, _Ends],
    delivered: dict[int, list[Message]],
    stages: Stages,
    channels: Channels,
) -> RankPlan:
    slots: dict[Message, int] = {}
    for key in range(channels):
        slots |= _receive_slots(rank, [m for m in messages if channel(m, channels) == key], ends)
    receives: dict[int, list[Message]] = {}
    for message in messages:
        if message in slots:
            receives.setdefault(slots[message], []).append(message)
    steps = tuple(
        Step(
            instruction=instruction,
            needs=stages.needs(instruction, rank),
            delivered=tuple(delivered.get(index, ())),
            makes=stages.makes(instruction, rank),
            receives=tuple(receives.get(index, ())),
        )
        for index, instruction in enumerate(order)
    )
    return RankPlan(receives=tuple(receives.get(-1, ())), steps=steps)


def _receive_slots(rank: int, messages: Sequence[Message], ends: dict[Message, _Ends]) -> dict[Message, int]:
    """Instruction after which each receive of a channel is posted, -1 for the start; in the order of posting.

    Not before the last send that precedes it in the global order, and no more than LOOKAHEAD ahead of its use
    where the next send leaves room.
    """
    slots: dict[Message, int] = {}
    earliest = -1
    run: list[Message] = []

    def place(next_send: int | None) -> None:
        latest = next_send - 1 if next_send is not None else None
        chosen = []
        for message in reversed(run):
            wanted = max(earliest, ends[message].used_at - 1 - LOOKAHEAD)
            latest = wanted if latest is None else min(wanted, latest)
            chosen.append((message, max(earliest, latest)))
        slots.update(reversed(chosen))
        run.clear()

    for message in messages:
        if message.target == rank:
            run.append(message)
        else:
            made_at = ends[message].made_at
            place(made_at)
            earliest = made_at
    place(None)
    return slots
