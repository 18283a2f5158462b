"""Prove a schedule and its communication right without running it.

`check_schedule` raises at the first violation and reports what the schedule costs. It holds for every
schedule of the package (tests/pipeline/test_check.py runs all legal sizes) and works on hand-written ones.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_b2.pipeline.plan import Channels, RankPlan, channel, plan_communication
from megatron_b2.pipeline.schedule import Instruction, Schedule
from megatron_b2.pipeline.simulate import Durations, Message, ScheduleError, simulate, stuck


@dataclass(frozen=True)
class ScheduleReport:
    """What a schedule costs."""

    peak_in_flight: tuple[int, ...]
    """For each rank, the most forwards (of one chunk each) whose activations it holds at once."""
    peak_receives: tuple[int, ...]
    """For each rank, the most receives posted and not yet used: buffers beyond the activations."""
    num_messages: int
    """Messages between ranks."""
    bubble_ratio: Fraction
    """Idle time over computing time, summed over the ranks."""

    @property
    def bubble_fraction(self) -> Fraction:
        """Idle time over all time."""
        return self.bubble_ratio / (1 + self.bubble_ratio)


def check_schedule(
    schedule: Schedule, *, num_micro: int, num_chunks: int = 1, durations: Durations | None = None
) -> ScheduleReport:
    """Check everything that can be known before running.

    Each micro-batch goes forward and back through each chunk exactly once and in this order; every send has
    its receive, in the same order on both ranks; no rank waits for ever, neither with transfers that buffer
    nor with transfers that run one after the other and wait for their other end.

    Args:
        schedule: the instructions of every rank.
        num_micro: micro-batches that it must run.
        num_chunks: chunks that each rank must run.
        durations: for the bubble; the default is F = I = W = 1, B = 2.

    Raises:
        ScheduleError: what is wrong, with rank and instruction.
    """
    for rank, order in enumerate(schedule):
        _check_rank(rank, order, num_micro=num_micro, num_chunks=num_chunks)
    timeline = simulate(schedule, durations)
    one_channel = plan_communication(schedule, channels=1)
    check_plans(one_channel, channels=1)
    plans = plan_communication(schedule, channels=2)
    num_messages = check_plans(plans, channels=2)
    busy = sum(Fraction(timeline.busy(rank)) for rank in range(len(schedule)))
    return ScheduleReport(
        peak_in_flight=tuple(_peak_in_flight(order) for order in schedule),
        peak_receives=tuple(_peak_receives(plan) for plan in plans),
        num_messages=num_messages,
        bubble_ratio=len(schedule) * Fraction(timeline.makespan) / busy - 1,
    )


def _check_rank(rank: int, order: Sequence[Instruction], *, num_micro: int, num_chunks: int) -> None:
    """Each (chunk, micro-batch) has F then B, or F then I then W, each once."""
    done: dict[tuple[int, int], str] = {}
    for instruction in order:
        place = (instruction.chunk, instruction.micro)
        before = done.get(place, "")
        if before + instruction.kind not in ("F", "FB", "FI", "FIW"):
            raise ScheduleError(
                f"rank {rank}: {instruction} comes after {before or 'nothing'!r} of its micro-batch"
            )
        done[place] = before + instruction.kind
    expected = {(chunk, micro) for chunk in range(num_chunks) for micro in range(num_micro)}
    if set(done) != expected:
        odd = sorted(set(done) ^ expected)[0]
        raise ScheduleError(f"rank {rank}: (chunk, micro-batch) {odd} is missing, or is not one of the step")
    for place, kinds in done.items():
        if kinds not in ("FB", "FIW"):
            raise ScheduleError(f"rank {rank}: (chunk, micro-batch) {place} ends after {kinds!r}")


def transfers(plan: RankPlan) -> list[Message]:
    """All sends and receives of a rank in the order in which it posts them."""
    order = list(plan.receives)
    for step in plan.steps:
        order += [step.makes] if step.makes is not None else []
        order += step.receives
    return order


def check_plans(plans: Sequence[RankPlan], *, channels: Channels) -> int:
    """Check communication alone, also of schedules without backward; returns the number of messages."""
    num_messages = _check_matching(plans, channels)
    _check_rendezvous(plans, channels)
    return num_messages


def _check_matching(plans: Sequence[RankPlan], channels: Channels) -> int:
    """Every message is sent once and received once, and two ranks post what is between them in one order."""
    between: dict[tuple[int, int, int], list[list[Message]]] = {}
    for rank, plan in enumerate(plans):
        posted = transfers(plan)
        twice = [message for message, count in Counter(posted).items() if count > 1]
        if twice:
            raise ScheduleError(f"rank {rank} posts twice the {twice[0].describe()}")
        for message in posted:
            if rank not in (message.source, message.target):
                raise ScheduleError(f"rank {rank} has no part in the {message.describe()}")
            low, high = sorted((message.source, message.target))
            between.setdefault((low, high, channel(message, channels)), [[], []])[rank == high].append(
                message
            )
        _check_deliveries(rank, plan)
    for (low, high, _), (first, second) in between.items():
        if first != second:
            a, b = next(
                pair for pair in zip([*first, None], [*second, None], strict=False) if pair[0] != pair[1]
            )
            raise ScheduleError(f"ranks {low} and {high} post in different orders: {a} against {b}")
    return sum(len(first) for first, _ in between.values())


def _check_deliveries(rank: int, plan: RankPlan) -> None:
    """A receive is posted before it is used; a send is let go after it was made, at most once."""
    receives, sends = set(plan.receives), set[Message]()
    for step in plan.steps:
        if step.needs is not None and step.needs not in receives:
            raise ScheduleError(f"rank {rank} uses before it posts the {step.needs.describe()}")
        for message in step.delivered:
            if message not in sends:
                raise ScheduleError(f"rank {rank} lets go before it sends the {message.describe()}")
            sends.remove(message)
        receives.update(step.receives)
        if step.makes is not None:
            sends.add(step.makes)


def _check_rendezvous(plans: Sequence[RankPlan], channels: Channels) -> None:
    """Play the plans on the strictest transport: the transfers of a rank's channel run one after the other in
    the order of posting, and each waits until both ends are first in line."""
    queues: list[list[deque[Message]]] = [[deque() for _ in range(channels)] for _ in plans]
    position = [0] * len(plans)
    through: set[Message] = set()

    def post(rank: int, messages: Iterable[Message]) -> None:
        for message in messages:
            queues[rank][channel(message, channels)].append(message)

    def transfer(rank: int, key: int) -> Iterator[int]:
        """Peers with which transfers are through now."""
        mine = queues[rank][key]
        while mine:
            peer = mine[0].source + mine[0].target - rank
            theirs = queues[peer][key]
            if not theirs or theirs[0] != mine[0]:
                break
            through.add(mine.popleft())
            theirs.popleft()
            yield peer

    for rank, plan in enumerate(plans):
        post(rank, plan.receives)
    runnable = deque(range(len(plans)))
    while runnable:
        rank = runnable.popleft()
        steps = plans[rank].steps
        while position[rank] < len(steps):
            step = steps[position[rank]]
            if step.needs is not None and step.needs not in through:
                break
            _check_gone(rank, step.delivered, through)
            post(rank, [] if step.makes is None else [step.makes])
            post(rank, step.receives)
            position[rank] += 1
        peers = [peer for key in range(channels) for peer in transfer(rank, key)]
        runnable.extend({*peers, rank} if peers else ())
    _check_finished(plans, position, queues)


def _check_finished(
    plans: Sequence[RankPlan], position: Sequence[int], queues: Sequence[Sequence[deque[Message]]]
) -> None:
    heads = {queue[0]: rank for rank, own in enumerate(queues) for queue in own if queue}
    if heads:
        raise ScheduleError(f"deadlock of transfers: {stuck(heads)}")
    waiting = {
        need: rank
        for rank, plan in enumerate(plans)
        if position[rank] < len(plan.steps) and (need := plan.steps[position[rank]].needs) is not None
    }
    if waiting:
        raise ScheduleError(f"deadlock: {stuck(waiting)}")


def _check_gone(rank: int, messages: Sequence[Message], through: set[Message]) -> None:
    for message in messages:
        if message not in through:
            raise ScheduleError(f"rank {rank} would wait for its send: the {message.describe()}")


def _peak_in_flight(order: Sequence[Instruction]) -> int:
    held = peak = 0
    for instruction in order:
        held += {"F": 1, "B": -1, "I": 0, "W": -1}[instruction.kind]
        peak = max(peak, held)
    return peak


def _peak_receives(plan: RankPlan) -> int:
    held = peak = len(plan.receives)
    for step in plan.steps:
        held += len(step.receives) - (step.needs is not None)
        peak = max(peak, held)
    return peak
