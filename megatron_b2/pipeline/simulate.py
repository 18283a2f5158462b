"""Run a schedule on paper: when each instruction starts and ends, or where it is stuck. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_b2.pipeline.schedule import Instruction, Schedule

Time = int | float


class ScheduleError(ValueError):
    """A schedule or its communication is wrong: a fault of the program, not of its user."""


class Message(NamedTuple):
    """A tensor that one virtual stage hands to a neighbour."""

    direction: Literal["activation", "gradient"]
    stage: int
    """Virtual stage that takes it."""
    micro: int
    source: int
    """Pipeline rank that makes it."""
    target: int
    """Pipeline rank that takes it."""

    def describe(self) -> str:
        """For messages to people."""
        return (
            f"{self.direction} of micro-batch {self.micro} for stage {self.stage} "
            f"(pipeline rank {self.source} to {self.target})"
        )


@dataclass(frozen=True)
class Stages:
    """Virtual stages over ranks, and what an instruction takes and makes."""

    num_ranks: int
    num_chunks: int

    @classmethod
    def of(cls, schedule: Schedule) -> Stages:
        """The stages that a schedule speaks of."""
        chunks = {instruction.chunk for order in schedule for instruction in order}
        return cls(len(schedule), max(chunks, default=0) + 1)

    @property
    def count(self) -> int:
        """Number of virtual stages."""
        return self.num_ranks * self.num_chunks

    def stage(self, rank: int, chunk: int) -> int:
        """Virtual stage of a chunk of a rank."""
        return chunk * self.num_ranks + rank

    def needs(self, instruction: Instruction, rank: int) -> Message | None:
        """What must have arrived; none for the first stage's forward, the last stage's backward, and W."""
        stage = instruction.chunk * self.num_ranks + rank
        if instruction.kind == "F" and stage > 0:
            return Message("activation", stage, instruction.micro, (stage - 1) % self.num_ranks, rank)
        if instruction.kind in "BI" and stage < self.count - 1:
            return Message("gradient", stage, instruction.micro, (stage + 1) % self.num_ranks, rank)
        return None

    def makes(self, instruction: Instruction, rank: int) -> Message | None:
        """What is handed over afterwards."""
        stage = instruction.chunk * self.num_ranks + rank
        if instruction.kind == "F" and stage < self.count - 1:
            return Message("activation", stage + 1, instruction.micro, rank, (stage + 1) % self.num_ranks)
        if instruction.kind in "BI" and stage > 0:
            return Message("gradient", stage - 1, instruction.micro, rank, (stage - 1) % self.num_ranks)
        return None


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Time of each instruction, in any unit; the default is a stage whose matrices dominate."""

    forward: Time = 1
    backward: Time = 2
    input: Time = 1
    weight: Time = 1
    transfer: Time = 0
    """From the end of an instruction until its message is there."""
    stage_factors: tuple[Time, ...] = field(default=())
    """Factor of each virtual stage; empty when all are equal."""

    def of(self, instruction: Instruction, stage: int) -> Time:
        """Time of an instruction on a virtual stage."""
        unit = {"F": self.forward, "B": self.backward, "I": self.input, "W": self.weight}[instruction.kind]
        return unit * self.stage_factors[stage] if self.stage_factors else unit


@dataclass(frozen=True)
class Timeline:
    """When every instruction runs if it starts as soon as it can."""

    spans: tuple[tuple[tuple[Time, Time], ...], ...]
    """(start, end) of the instructions of each rank, in their order."""

    @property
    def makespan(self) -> Time:
        """From the first start to the last end."""
        return max((end for rank in self.spans for _, end in rank), default=0)

    def busy(self, rank: int) -> Time:
        """Time in which a rank computes."""
        return sum(end - start for start, end in self.spans[rank])


def simulate(schedule: Schedule, durations: Durations | None = None) -> Timeline:
    """Run every rank in its order, each instruction as soon as its message is there.

    Raises:
        ScheduleError: ranks wait for each other; names what each of them waits for.
    """
    durations = durations or Durations()
    stages = Stages.of(schedule)
    arrival: dict[Message, Time] = {}
    blocked: dict[Message, int] = {}
    clock: list[Time] = [0] * len(schedule)
    spans: list[list[tuple[Time, Time]]] = [[] for _ in schedule]
    runnable = list(range(len(schedule)))
    while runnable:
        rank = runnable.pop()
        order, done = schedule[rank], spans[rank]
        while len(done) < len(order):
            instruction = order[len(done)]
            start = clock[rank]
            need = stages.needs(instruction, rank)
            if need is not None:
                if need not in arrival:
                    blocked[need] = rank
                    break
                start = max(start, arrival[need])
            clock[rank] = end = start + durations.of(instruction, stages.stage(rank, instruction.chunk))
            done.append((start, end))
            made = stages.makes(instruction, rank)
            if made is not None:
                arrival[made] = end + durations.transfer
                if made in blocked:
                    runnable.append(blocked.pop(made))
    if blocked:
        raise ScheduleError(f"deadlock: {stuck(blocked)}")
    return Timeline(tuple(tuple(rank) for rank in spans))


def stuck(blocked: dict[Message, int]) -> str:
    """Who waits for what, for messages."""
    waits: Sequence[str] = [
        f"rank {rank} waits for the {message.describe()}" for message, rank in blocked.items()
    ]
    return "; ".join(sorted(waits))
