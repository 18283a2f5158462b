"""Stop requests: a signal sets a flag, all ranks agree on it at a step boundary.

A scheduler sends SIGTERM (preemption) or SIGUSR1 (time limit) to all ranks, at slightly different moments, at
any moment, perhaps twice, perhaps right after the start. Nothing is done in the handler; the loop asks once a
step, and because the answer is the maximum over ranks, all of them stop after the same step.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Protocol

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_REQUEUE = 75
"""Exit status of a run that saved because it was told to stop (EX_TEMPFAIL): the job wants to be requeued."""


class MaxReducer(Protocol):
    """The part of `Comm` that is needed here."""

    def all_reduce_max(self, value: int) -> int:
        """The largest `value` of all ranks."""
        ...


class StopSignals:
    """Context manager that holds the stop signals of this process; must be entered in the main thread."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the last stop signal this process got; 0 for none."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def ignore(self) -> None:
        """Ignore the stop signals until the process ends, also after this context.

        For a process that has saved and leaves: as soon as the first rank has exited, srun sends SIGTERM to
        those that are still shutting down, and their status would be 143 instead of EXIT_REQUEUE.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number

    def agreed(self, comm: MaxReducer) -> int:
        """The signal that any rank has received, 0 for none: the same answer on all ranks. Collective."""
        return comm.all_reduce_max(self.received)
