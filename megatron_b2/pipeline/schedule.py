"""Pipeline schedules as pure instruction lists: what each rank computes, in which order.

A schedule says nothing about communication: `plan.py` derives it, `check.py` proves both, `runner.py`
executes them. Chunk c of rank r is virtual stage c * num_ranks + r, so consecutive stages are on consecutive
ranks and the last rank hands over to the first one when there are several chunks.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, NamedTuple

from megatron_b2.errors import ConfigError

Kind = Literal["F", "B", "I", "W"]
"""Forward; whole backward; gradient of the stage's input only; gradients of its parameters only."""

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]


class Instruction(NamedTuple):
    """One computation of one rank."""

    kind: Kind
    micro: int
    """Micro-batch, 0-based."""
    chunk: int = 0
    """Which of the rank's chunks of layers."""


Schedule = tuple[tuple[Instruction, ...], ...]
"""The instructions of each rank."""


def schedule_problem(
    name: ScheduleName, *, num_ranks: int, num_micro: int, num_chunks: int = 1
) -> str | None:
    """Why a schedule cannot be built, with the fix; none if it can."""
    if name == "interleaved":
        if num_ranks < 2:
            return f'schedule "interleaved" needs 2 or more pipeline ranks, not {num_ranks}; use "1f1b"'
        if num_chunks < 2:
            return f'schedule "interleaved" needs 2 or more chunks a rank, not {num_chunks}; use "1f1b" for 1'
        if num_micro % num_ranks:
            return (
                f'schedule "interleaved" runs micro-batches in rounds of {num_ranks} (one a pipeline rank), '
                f"which do not divide {num_micro} micro-batches; make the number of micro-batches a multiple "
                f"of {num_ranks}"
            )
    elif num_chunks != 1:
        return f'schedule "{name}" has 1 chunk a rank, not {num_chunks}; use "interleaved" for more'
    if num_micro < num_ranks:
        return (
            f"{num_micro} micro-batches are fewer than {num_ranks} pipeline ranks, so ranks would always "
            f"idle; use {num_ranks} or more micro-batches, or fewer pipeline ranks"
        )
    return None


def build_schedule(name: ScheduleName, *, num_ranks: int, num_micro: int, num_chunks: int = 1) -> Schedule:
    """The instructions of every rank.

    Args:
        name: which schedule.
        num_ranks: pipeline ranks.
        num_micro: micro-batches of a step, at least num_ranks.
        num_chunks: chunks of layers a rank, 1 except for "interleaved".

    Raises:
        ConfigError: the combination is not legal.
    """
    problem = schedule_problem(name, num_ranks=num_ranks, num_micro=num_micro, num_chunks=num_chunks)
    if problem is not None:
        raise ConfigError(problem)
    if name == "gpipe":
        return tuple(gpipe(num_micro) for _ in range(num_ranks))
    if name == "1f1b":
        return tuple(one_f_one_b(rank, num_ranks, num_micro) for rank in range(num_ranks))
    if name == "interleaved":
        return tuple(interleaved(rank, num_ranks, num_micro, num_chunks) for rank in range(num_ranks))
    return tuple(zero_bubble(rank, num_ranks, num_micro) for rank in range(num_ranks))


def gpipe(num_micro: int) -> tuple[Instruction, ...]:
    """All forwards, then all backwards (Huang et al. 2019)."""
    forwards = [Instruction("F", micro) for micro in range(num_micro)]
    backwards = [Instruction("B", micro) for micro in range(num_micro)]
    return (*forwards, *backwards)


def one_f_one_b(rank: int, num_ranks: int, num_micro: int) -> tuple[Instruction, ...]:
    """Forwards until the first gradient can arrive, then one forward and one backward in turn
    (PipeDream-Flush, Narayanan et al. 2021): the bubble of GPipe with at most num_ranks - rank micro-batches
    in flight."""
    warmup = min(num_ranks - rank - 1, num_micro)
    order = [Instruction("F", micro) for micro in range(warmup)]
    for micro in range(num_micro):
        if warmup + micro < num_micro:
            order.append(Instruction("F", warmup + micro))
        order.append(Instruction("B", micro))
    return tuple(order)


def interleaved(rank: int, num_ranks: int, num_micro: int, num_chunks: int) -> tuple[Instruction, ...]:
    """1F1B over several chunks a rank, in rounds of num_ranks micro-batches a chunk: a num_chunks-th of the
    bubble (Narayanan et al. 2021, section 2.2)."""
    round_size = num_ranks * num_chunks

    def operation(kind: Kind, index: int) -> Instruction:
        round_index, place = divmod(index, round_size)
        chunk, micro = divmod(place, num_ranks)
        return Instruction(
            kind, round_index * num_ranks + micro, chunk if kind == "F" else num_chunks - 1 - chunk
        )

    total = num_micro * num_chunks
    warmup = min(2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks, total)
    order = [operation("F", index) for index in range(warmup)]
    for index in range(total):
        if warmup + index < total:
            order.append(operation("F", warmup + index))
        order.append(operation("B", index))
    return tuple(order)


def zero_bubble(rank: int, num_ranks: int, num_micro: int) -> tuple[Instruction, ...]:
    """ZB-H1 (Qi et al. 2024): 1F1B whose backward first makes the gradient that the stage before waits for.

    Rank r does parameter gradients r micro-batches late and fills its bubble at the end with them. Every rank
    has at most num_ranks micro-batches in flight, as rank 0 has under 1F1B; the bubble is a third.
    """
    warmup = min(num_ranks - rank - 1, num_micro)
    order = [Instruction("F", micro) for micro in range(warmup)]
    for micro in range(num_micro):
        if warmup + micro < num_micro:
            order.append(Instruction("F", warmup + micro))
        order.append(Instruction("I", micro))
        if micro >= rank:
            order.append(Instruction("W", micro - rank))
    order += [Instruction("W", micro) for micro in range(max(num_micro - rank, 0), num_micro)]
    return tuple(order)


def forward_only(*, num_ranks: int, num_micro: int, num_chunks: int = 1) -> Schedule:
    """Forwards of any number of micro-batches, for evaluation: rounds of num_ranks micro-batches a chunk."""
    order = [
        Instruction("F", micro, chunk)
        for start in range(0, num_micro, num_ranks)
        for chunk in range(num_chunks)
        for micro in range(start, min(start + num_ranks, num_micro))
    ]
    return tuple(tuple(order) for _ in range(num_ranks))


def ideal_bubble(name: ScheduleName, *, num_ranks: int, num_micro: int, num_chunks: int = 1) -> Fraction:
    """Idle time of a rank over its computing time, when stages are equal, B = I + W, F = I = W and sending
    takes no time: (p - 1) / m for GPipe and 1F1B, (p - 1) / (v m) interleaved, (p - 1) / (3 m)
    zero-bubble."""
    parts = {"interleaved": num_chunks, "zero_bubble": 3}.get(name, 1)
    return Fraction(num_ranks - 1, parts * num_micro)


def ideal_in_flight(
    name: ScheduleName, rank: int, *, num_ranks: int, num_micro: int, num_chunks: int = 1
) -> int:
    """Largest number of forwards (of one chunk each) whose activations the rank holds at once."""
    if name == "gpipe":
        return num_micro
    if name == "1f1b":
        return min(num_ranks - rank, num_micro)
    if name == "zero_bubble":
        return min(num_ranks, num_micro)
    return min(2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks + 1, num_micro * num_chunks)
