"""Length of a step's pipeline: our own schedules, run by our own simulator, with unequal stages.

A schedule repeats itself: after the first rounds every further `p` micro-batches take the same time, at least
the work of the slowest rank. So a long step is simulated with few micro-batches and continued, after two
equal differences have shown that the rhythm is there; where they are not equal, all are simulated. Mostly
that is exact; where the rhythm changes late, the length is up to 1 % off.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

from megatron_b2.pipeline.schedule import Instruction, Schedule, ScheduleName, build_schedule
from megatron_b2.pipeline.simulate import Durations, Time, Timeline, simulate

ROUNDS: Final = 2
"""Rounds of p micro-batches until the rhythm is looked for."""
WHOLE: Final = 8192
"""Instructions up to which a step is simulated as a whole."""
TOLERANCE: Final = 1e-9
"""Of two differences that count as equal, relative."""


@dataclass(frozen=True, kw_only=True)
class StageTimes(Durations):
    """Seconds of each virtual stage, whose forward and backward have their own proportions."""

    stages: tuple[tuple[float, float, float], ...]
    """(forward, gradients, computed again) of a micro-batch, by virtual stage."""

    def of(self, instruction: Instruction, stage: int) -> Time:
        """Seconds of an instruction: what is computed again comes before the first gradient; the gradients of
        the input and of the parameters take half of the backward each."""
        forward, gradients, again = self.stages[stage]
        match instruction.kind:
            case "F":
                return forward
            case "B":
                return gradients + again
            case "I":
                return gradients / 2 + again
            case _:
                return gradients / 2


@lru_cache(maxsize=4096)
def makespan(
    name: ScheduleName,
    stages: tuple[tuple[float, float, float], ...],
    *,
    num_ranks: int,
    num_micro: int,
    transfer: float = 0.0,
) -> float:
    """Seconds from the first start to the last end of a step.

    Args:
        name: the schedule.
        stages: seconds of each virtual stage, as in `StageTimes`; a multiple of num_ranks.
        num_ranks: pipeline ranks p.
        num_micro: micro-batches m.
        transfer: seconds of a send between stages.
    """
    if num_ranks == 1 and len(stages) == 1:
        return num_micro * sum(stages[0])
    times = StageTimes(stages=stages, transfer=transfer)
    chunks = len(stages) // num_ranks

    def run(micro: int) -> Timeline:
        return simulate(schedule_of(name, num_ranks, micro, chunks), times)

    first = ROUNDS * num_ranks + num_micro % num_ranks
    if num_micro <= first + 2 * num_ranks or 2 * num_micro * len(stages) <= WHOLE:
        return float(run(num_micro).makespan)
    lines = [run(first + extra * num_ranks) for extra in range(3)]
    step, again = (float(b.makespan - a.makespan) for a, b in pairwise(lines))
    last = lines[2]
    if abs(again - step) > TOLERANCE * last.makespan:
        return float(run(num_micro).makespan)
    slowest = max(_busy(stages[rank::num_ranks]) for rank in range(num_ranks))
    rounds = (num_micro - first - 2 * num_ranks) / num_ranks
    return float(last.makespan) + max(again, num_ranks * slowest) * rounds


def _busy(stages: tuple[tuple[float, float, float], ...]) -> float:
    """Seconds of a micro-batch on one rank."""
    return sum(sum(stage) for stage in stages)


@lru_cache(maxsize=256)
def schedule_of(name: ScheduleName, num_ranks: int, num_micro: int, num_chunks: int) -> Schedule:
    """Instructions of each pipeline rank, made once: layouts of a search share them."""
    return build_schedule(name, num_ranks=num_ranks, num_micro=num_micro, num_chunks=num_chunks)
